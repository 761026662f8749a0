#!/usr/bin/python3
"""The command as a user meets it: output and exit code of every verb on a good checkpoint and on every
way of spoiling one. Usage: cli_test.py HOLDFAST GOLDEN_ROOT"""

import json
import os
import pathlib
import re
import shutil
import struct
import sys
import tempfile
import unittest

import checkpoint_files
from checkpoint_files import crc32c, fingerprint_reference, tensor_bytes, write_fingerprints

GOLDEN = pathlib.Path(sys.argv[2])
JOB = "golden.job-1"
run = checkpoint_files.Command(sys.argv[1])

# C0 without the newline, DEL, C1.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Cli(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.root = pathlib.Path(self.temporary.name) / "root"
        shutil.copytree(GOLDEN, self.root)
        self.job = self.root / JOB
        self.checkpoint = next(self.job.glob("s*.a*"))

    def tearDown(self):
        self.temporary.cleanup()

    def image(self):
        return next(self.checkpoint.glob("rank-00000*.h5"))

    def test_ls_lists_a_root_and_a_job_alike(self):
        for path in (self.root, self.job):
            code, text, _ = run("ls", path)
            self.assertEqual(code, 0)
            self.assertIn("committed", text)
            self.assertIn("more saves fit", text)
        code, text, _ = run("ls", "--json", self.root)
        self.assertEqual(code, 0)
        job = json.loads(text)["jobs"][0]
        self.assertEqual(job["newest"], {"step": 42, "attempt": 3})
        on_disk = sum(path.stat().st_size for path in self.checkpoint.iterdir())
        self.assertEqual(job["bytes"], on_disk)
        self.assertGreater(job["saves_that_fit"], 0)

    def test_ls_of_nothing_is_not_found(self):
        code, _, error = run("ls", self.root / "nothing")
        self.assertEqual(code, 5)
        self.assertIn("nothing", error)

    def test_a_marked_checkpoint_is_the_newest_no_more_until_that_is_taken_back(self):
        def listed():
            return json.loads(run("ls", "--json", self.job)[1])["jobs"][0]

        code, text, error = run("mark-bad", self.checkpoint, "--reason", "the loss \u2192 NaN")
        self.assertEqual(code, 0, error)
        self.assertIn("marked bad", text)
        self.assertIsNone(listed()["newest"])
        self.assertEqual(listed()["checkpoints"][0]["state"], "committed (bad)")
        mark = json.loads((self.checkpoint / "BAD.1").read_text(encoding="utf-8"))
        self.assertEqual(mark["reason"], "the loss \u2192 NaN")
        run("mark-bad", self.checkpoint, "--reason", "the loss \u2192 NaN")  # said twice, it is one mark
        run("mark-bad", str(self.checkpoint) + "/", "--reason", "another")
        self.assertEqual(len(list(self.checkpoint.glob("BAD.*"))), 2)
        code, _, error = run("mark-bad", "--undo", self.checkpoint)
        self.assertEqual(code, 0, error)
        self.assertEqual(list(self.checkpoint.glob("BAD.*")), [])
        self.assertEqual(listed()["newest"], {"step": 42, "attempt": 3})

    def test_what_cannot_be_marked_is_named(self):
        for path, expected in ((self.job, 2), (self.root / "nothing", 5)):
            code, _, error = run("mark-bad", path)
            self.assertEqual(code, expected, error)
            self.assertIn(path.name, error)
        code, _, error = run("mark-bad", self.checkpoint, "--reason", "x" * 4097)
        self.assertEqual(code, 2)
        self.assertIn("4097", error)
        self.assertEqual(list(self.checkpoint.glob("BAD.*")), [])

    def test_inspect_names_every_tensor(self):
        for path in (self.job, self.checkpoint):
            code, text, _ = run("inspect", path, "--tensors", "--blobs", "--json")
            self.assertEqual(code, 0)
            found = json.loads(text)
            self.assertEqual((found["step"], found["attempt"], found["world_size"]), (42, 3, 2))
            self.assertTrue(found["tensors"])
            for tensor in found["tensors"]:
                for piece in tensor["pieces"]:
                    self.assertTrue((self.checkpoint / piece["file"]).exists())
        self.assertIn(found["tensors"][0]["name"], run("inspect", self.job, "--tensors")[1])

    def test_verify_of_a_good_checkpoint_reads_every_block(self):
        code, text, _ = run("verify", self.job, "--json")
        self.assertEqual(code, 0)
        report = json.loads(text)
        images = sum(path.stat().st_size for path in self.checkpoint.glob("*.h5"))
        self.assertEqual(report["verdict"], "good")
        self.assertEqual(report["blocks_checked"] * 4096, images)

    def test_fingerprints_are_shown_and_checked(self):
        tensors = json.loads(run("inspect", self.job, "--tensors", "--json")[1])["tensors"]
        self.assertEqual({tensor["fingerprint"] for tensor in tensors}, {None})
        self.assertIn("fingerprint not computed", run("inspect", self.job, "--tensors")[1])
        code, text, _ = run("verify", self.job)
        self.assertEqual(code, 0)
        self.assertIn(f"0 fingerprints checked, {len(tensors)} not computed", text)

        right = [fingerprint_reference.fingerprint(tensor["dtype"], tensor["shape"],
                                                   tensor_bytes(self.checkpoint, tensor))
                 for tensor in tensors]
        write_fingerprints(self.checkpoint, right)
        code, text, error = run("verify", self.job, "--json")
        self.assertEqual(code, 0, text + error)
        self.assertEqual(json.loads(text)["fingerprints"], {"checked": len(tensors), "not_computed": 0})
        found = json.loads(run("inspect", self.job, "--tensors", "--json")[1])["tensors"]
        self.assertEqual([int(tensor["fingerprint"], 16) for tensor in found], right)
        self.assertIn(f"fingerprint {right[0]:032x}", run("inspect", self.job, "--tensors")[1])

        wrong = [value ^ (i == 2) for i, value in enumerate(right)]
        write_fingerprints(self.checkpoint, wrong)
        code, text, _ = run("verify", self.job)
        self.assertEqual(code, 4)
        for part in (tensors[2]["name"], tensors[2]["state"], f"expected fingerprint {wrong[2]:032x}",
                     f"found {right[2]:032x}", f"{len(tensors) - 1} fingerprints checked"):
            self.assertIn(part, text)

    def test_verify_names_the_file_of_a_flipped_byte(self):
        report = json.loads(run("inspect", self.job, "--tensors", "--json")[1])
        tensor, piece = next((tensor, piece) for tensor in report["tensors"]
                             for piece in tensor["pieces"] if piece["file"] == self.image().name)
        # A tensor's byte is lost; one of the HDF5 head is damage that no restore meets.
        for offset, expected in ((piece["offset"], 4), (100, 3)):
            image = self.image()
            good = image.read_bytes()
            data = bytearray(good)
            data[offset] ^= 1
            image.write_bytes(data)
            code, text, _ = run("verify", self.checkpoint)
            self.assertEqual(code, expected, offset)
            self.assertIn(image.name, text)
            if expected == 4:
                line = next(line for line in text.splitlines() if image.name in line)
                self.assertEqual(line.count(f"{tensor['name']} ({tensor['state']})"), 1, line)
            image.write_bytes(good)

    def test_what_is_no_checkpoint_is_named_with_what_was_expected(self):
        for path in (self.root.parent, self.checkpoint / "MANIFEST.json", "/etc"):
            for verb in ("inspect", "verify"):
                code, _, errors = run(verb, path)
                self.assertEqual(code, 5, errors)
                self.assertIn(f"{path}: expected a checkpoint's directory, or ROOT/JOB", errors)

    def test_verify_names_a_truncated_and_a_missing_image(self):
        image = self.image()
        image.write_bytes(image.read_bytes()[:-4096])
        code, text, _ = run("verify", self.checkpoint)
        self.assertEqual((code, image.name in text), (4, True))
        image.unlink()
        code, text, _ = run("verify", self.checkpoint)
        self.assertEqual((code, image.name in text), (4, True))

    def test_verify_sees_swapped_images(self):
        first, second = sorted(self.checkpoint.glob("rank-*.h5"))
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
        self.assertEqual(run("verify", self.checkpoint)[0], 4)

    def test_a_manifest_of_another_step_is_damage(self):
        other = self.job / "s000000000043.a0003"
        shutil.copytree(self.checkpoint, other)
        for verb in ("verify", "inspect"):
            code, text, error = run(verb, other)
            self.assertEqual(code, 4, verb)
            self.assertIn("43", text + error)

    def test_without_a_manifest_there_is_no_checkpoint(self):
        (self.checkpoint / "MANIFEST.json").unlink()
        for verb in ("verify", "inspect"):
            self.assertEqual(run(verb, self.checkpoint)[0], 5, verb)
            self.assertEqual(run(verb, self.job)[0], 5, verb)
        code, text, _ = run("ls", self.job)
        self.assertEqual((code, "incomplete" in text), (0, True))

    def reseal(self, old, new):
        """A hostile checkpoint: `old` in INDEX becomes `new`, of equal length, under good checksums."""
        index = (self.checkpoint / "INDEX").read_bytes()
        self.assertEqual((index.count(old), len(old)), (1, len(new)))
        index = index.replace(old, new)[:-8]
        index += struct.pack("<II", crc32c(index), crc32c(index) ^ 0xFFFFFFFF)
        (self.checkpoint / "INDEX").write_bytes(index)
        manifest = self.checkpoint / "MANIFEST.json"
        lines = manifest.read_bytes()[:-22]
        lines = re.sub(rb'("index": .*"crc32c": ")[0-9a-f]{8}', rb"\g<1>%08x" % crc32c(index), lines)
        manifest.write_bytes(lines + b'"crc32c": "%08x"}\n' % crc32c(lines))

    def test_names_of_strangers_do_not_control_the_terminal(self):
        hostile = "s\x1b[2J"  # clears the screen; still the last name, as the order asks for
        self.reseal(b"maskscaleargs", b"mask" + hostile.encode() + b"args")
        code, text, _ = run("inspect", self.job, "--tensors", "--blobs", "--layout")
        self.assertEqual(code, 0)
        self.assertIn("\\x1b[2J", text)
        self.assertIsNone(CONTROL.search(text))
        # Exact for programs.
        code, text, _ = run("inspect", self.job, "--tensors", "--json")
        tensor = json.loads(text)["tensors"][-1]
        self.assertEqual((code, tensor["name"]), (0, hostile))
        piece = tensor["pieces"][0]
        image = self.checkpoint / piece["file"]
        data = bytearray(image.read_bytes())
        data[piece["offset"]] ^= 1
        image.write_bytes(data)
        code, text, _ = run("verify", self.job)
        self.assertEqual(code, 4)
        self.assertIn("\\x1b[2J", text)
        self.assertIsNone(CONTROL.search(text))

    def test_a_layout_that_is_no_text_is_damage(self):
        self.reseal(b'"holdfast_layout"', b'"holdfast_layou\xff"')
        for arguments in (("inspect", "--layout", "--json"), ("inspect", "--layout"), ("verify",)):
            code, text, error = run(*arguments, self.job)
            self.assertEqual(code, 4, arguments)
            self.assertIn("UTF-8", text + error)

    def test_a_path_that_is_no_text_is_listed(self):
        place = pathlib.Path(os.fsdecode(os.fsencode(self.temporary.name) + b"/\xff\x1b"))
        self.root.rename(place)
        for verb in ("ls", "inspect", "verify"):
            target = place if verb == "ls" else place / JOB
            code, text, _ = run(verb, target, "--json")
            self.assertEqual(code, 0, verb)
            self.assertIn("\ufffd", str(json.loads(text)))
            code, text, _ = run(verb, target)
            self.assertEqual(code, 0, verb)
            self.assertIsNone(CONTROL.search(text))

    def test_usage_errors_are_two(self):
        for arguments in (("frobnicate",), ("inspect",), ("ls", "--nonsense"),
                          ("preflight", "--seconds", "nan"), ("preflight", "--join-seconds", "inf"),
                          ("monitor", "record", "FILE", "--seconds", "nan"),
                          ("monitor", "window", "--job", "j", "--rank", "0", "--seconds", "1x")):
            self.assertEqual(run(*arguments)[0], 2, arguments)
        self.assertEqual(run("--help")[0], 0)
        self.assertEqual(run("--version")[0], 0)

    def test_status_without_an_agent_may_be_retried(self):
        code, _, error = run("status", "--socket", self.root / "agent.sock")
        self.assertEqual(code, 75)
        self.assertIn("agent.sock", error)
        # Where an agent of this user listens unless it is told otherwise.
        _, _, error = run("status", XDG_RUNTIME_DIR=str(self.root))
        expected = "/run" if os.geteuid() == 0 else self.root
        self.assertIn(f"agent at {expected}/holdfast/agent.sock: ", error)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
