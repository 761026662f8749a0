#!/usr/bin/python3
"""holdfast inspect, verify, export and convert on safetensors files that this test writes itself, byte by byte.

Usage: foreign_test.py HOLDFAST
"""

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path

HOLDFAST = sys.argv.pop(1)


def run(*arguments, **options):
    done = subprocess.run([HOLDFAST, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False,
                          **options)
    return done.returncode, done.stdout, done.stderr


def safetensors(tensors, metadata=None):
    """{name: (dtype, shape, bytes)} as a file."""
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parse(content):
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    begin = 8 + length
    assert begin % 8 == 0
    metadata = header.pop("__metadata__", None)
    return metadata, {name: (entry["dtype"], entry["shape"],
                             content[begin + entry["data_offsets"][0]:begin + entry["data_offsets"][1]])
                      for name, entry in header.items()}


class ForeignTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory(dir=".")
        self.addCleanup(self.directory.cleanup)
        self.path = Path(self.directory.name).resolve()
        seed = 20261126
        rng = random.Random(seed)
        self.tensors = {
            "wte": ("F32", [5, 7], struct.pack("<35f", *(rng.random() for _ in range(35)))),
            "half": ("BF16", [3], struct.pack("<3H", 0x3F80, 0x4000, 0x4040)),
            "größe \n\"": ("I64", [], struct.pack("<q", -3)),
            "empty": ("F16", [0, 9], b""),
            "bits": ("BOOL", [4], bytes([0, 1, 1, 0])),
        }

    def write(self, name, content):
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def test_inspect_gives_every_record(self):
        file = self.write("x.safetensors", safetensors(self.tensors, {"format": "pt", "tied": "wte"}))
        code, out, err = run("inspect", file, "--tensors", "--sha256", "--json")
        self.assertEqual((code, err), (0, ""))
        found = json.loads(out)
        self.assertEqual(found["format"], "safetensors")
        self.assertEqual(found["scalars"]["metadata"], {"format": "pt", "tied": "wte"})
        self.assertEqual(found["sandbox_missing"], [])
        records = {record["name"]: record for record in found["tensors"]}
        names = {"F32": "float32", "BF16": "bfloat16", "I64": "int64", "F16": "float16", "BOOL": "bool"}
        self.assertEqual(records.pop("tied")["alias_of"], "wte")
        self.assertEqual(set(records), set(self.tensors))
        for name, (dtype, shape, content) in self.tensors.items():
            record = records[name]
            self.assertEqual((record["dtype"], record["shape"]), (names[dtype], shape))
            self.assertEqual(record["sha256"], hashlib.sha256(content).hexdigest())
        code, out, _ = run("inspect", file, "--tensors")
        self.assertEqual(code, 0)
        self.assertIn("tied       tied = wte", out)
        self.assertIn("größe \\n\" tensor int64 []", out)

    def test_a_folder_of_files_is_listed(self):
        self.write("some/a.safetensors", safetensors(self.tensors))
        self.write("some/b.safetensors", safetensors(self.tensors)[:-1])
        self.write("some/notes.txt", b"no checkpoint\n")
        os.symlink("/etc/passwd", self.path / "some" / "c.safetensors")
        code, out, _ = run("inspect", self.path / "some", "--json")
        self.assertEqual(code, 0)
        found = json.loads(out)
        self.assertEqual(found["format"], "files")
        files = {each["file"]: each for each in found["files"]}
        self.assertEqual(files["a.safetensors"]["format"], "safetensors")
        self.assertIn("found", files["b.safetensors"]["error"])
        self.assertIn("expected a checkpoint", files["notes.txt"]["error"])
        self.assertTrue(any("symbolic link out of the folder" in name for name in files))
        code, out, err = run("inspect", self.path / "some")
        self.assertEqual((code, err), (0, ""))
        some = self.path / "some"
        for text in (f"{some}/a.safetensors\n  format     safetensors\n", f"{some}/b.safetensors\n  ",
                     f"{some}/notes.txt\n  no checkpoint\n", "  refused\n"):
            self.assertIn(text, out)
        code, out, err = run("inspect", self.path / "some" / "b.safetensors")
        self.assertEqual((code, out), (4, ""))
        self.assertIn("data", err)

    def test_what_is_no_checkpoint_is_said_so(self):
        data = self.write("data/__0_0.distcp", b"PK")
        for verb in (("verify", data.parent), ("convert", data.parent, self.path / "out", "--format", "torch"),
                     ("diff", data.parent, data.parent), ("view", data.parent, self.path / "view.h5")):
            code, _, err = run(*verb)
            self.assertEqual(code, 4, err)
            self.assertIn("expected .metadata beside __0_0.distcp", err)
        (self.path / "links").mkdir()
        (self.path / "links" / "model.safetensors").symlink_to("/etc/hostname")
        for verb in ("inspect", "verify"):
            code, _, err = run(verb, self.path / "links")
            self.assertEqual(code, 6, err)
            self.assertIn("model.safetensors: a symbolic link out of the folder", err)
        code, out, err = run("inspct", data)
        self.assertEqual((code, out), (2, ""))
        self.assertIn('expected a verb, found "inspct"; did you mean "inspect"?', err)

    def test_verify_names_what_is_wrong(self):
        good = self.write("good.safetensors", safetensors(self.tensors))
        code, out, _ = run("verify", good, "--json")
        self.assertEqual((code, json.loads(out)["verdict"]), (0, "good"))
        shard = safetensors({"a": ("F32", [1], struct.pack("<f", float("nan")))})
        self.write("hf/model-1.safetensors", shard)
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        self.write("hf/model.safetensors.index.json", json.dumps(index).encode())
        code, out, _ = run("verify", self.path / "hf", "--json")
        self.assertEqual(code, 4)
        kinds = {finding["kind"]: finding["text"] for finding in json.loads(out)["findings"]}
        self.assertIn("model-2.safetensors", kinds["lost"])
        self.assertIn("element 0 of [1]", kinds["not finite"])
        # What lacks something is written only as far as it is there, if that is asked for.
        for verb, arguments in (("export", ()), ("convert", ("--format", "torch")), ("convert", ("--format", "dcp"))):
            code, _, err = run(verb, self.path / "hf", self.path / "out", *arguments)
            self.assertEqual(code, 4)
            self.assertRegex(err, "something is lost: .*model-2.safetensors.*--drop lost")
            self.assertFalse((self.path / "out").exists())
        code, out, err = run("export", self.path / "hf", self.path / "out", "--drop", "lost")
        self.assertEqual((code, err), (0, ""))
        self.assertRegex(out, "left out: lost: .*model-2.safetensors")
        index["weight_map"]["b"] = "../good.safetensors"
        self.write("hf/model.safetensors.index.json", json.dumps(index).encode())
        for verb in ("verify", "inspect"):
            code, _, err = run(verb, self.path / "hf")
            self.assertEqual(code, 6)
            self.assertIn("leads out of the folder", err)

    def test_export_is_read_back(self):
        self.write("hf/model.safetensors", safetensors(self.tensors, {"format": "pt", "tied": "wte"}))
        self.write("hf/config.json", b'{"model_type": "none"}')
        for shard_bytes, shards in (("1GB", 1), ("100B", 2)):
            out = self.path / f"out{shards}"
            code, text, err = run("export", self.path / "hf", out, "--shard-bytes", shard_bytes, "--json")
            self.assertEqual((code, err), (0, ""))
            files = sorted(path.name for path in out.iterdir())
            named = {each["file"] for each in json.loads(text)["files"]}
            self.assertEqual(named | {"model.safetensors.index.json"} if shards > 1 else named, set(files))
            self.assertIn("config.json", files)
            weights = [name for name in files if name.endswith(".safetensors")]
            self.assertEqual(len(weights), shards)
            found = {}
            for name in weights:
                metadata, tensors = parse((out / name).read_bytes())
                self.assertEqual(metadata["format"], "pt")
                found.update(tensors)
            self.assertEqual(found, self.tensors)
            if shards > 1:
                index = json.loads((out / "model.safetensors.index.json").read_text())
                self.assertEqual(set(index["weight_map"]), set(self.tensors))
                self.assertEqual(index["metadata"]["total_size"], sum(len(c) for _, _, c in self.tensors.values()))
            code, text, _ = run("inspect", out, "--json", "--tensors", "--sha256")
            self.assertEqual((code, json.loads(text)["format"], json.loads(text)["notes"]), (0, "hf", []))
            self.assertEqual(run("verify", out)[0], 0)
            # What is there is not replaced unasked, and then whole.
            code, _, err = run("export", self.path / "hf", out)
            self.assertEqual(code, 1)
            self.assertIn("is there already", err)
            (out / "stale").write_text("stale")
            code, _, err = run("export", self.path / "hf", out, "--force")
            self.assertEqual((code, err), (0, ""))
            self.assertFalse((out / "stale").exists())
        self.assertEqual([path.name for path in self.path.iterdir() if "partial" in path.name], [])

    def test_a_changed_byte_of_a_torch_file_is_found(self):
        content = (Path(__file__).resolve().parents[1] / "tests" / "data" / "torch" / "training.pt").read_bytes()
        file = self.write("training.pt", content)
        self.assertEqual(run("verify", file)[0], 0)
        with zipfile.ZipFile(file) as archive:
            entry = next(each for each in archive.infolist() if "/data/" in each.filename and each.file_size > 0)
        name_bytes, extra_bytes = struct.unpack_from("<2H", content, entry.header_offset + 26)
        at = entry.header_offset + 30 + name_bytes + extra_bytes
        self.write("training.pt", content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        code, out, _ = run("verify", file)
        self.assertEqual(code, 4)
        self.assertIn(f'checksum: training.pt: zip: entry "{entry.filename}": expected CRC32 {entry.CRC:08x}', out)

    def test_what_was_repaired_is_said(self):
        data = Path(__file__).resolve().parents[1] / "tests" / "data" / "deepspeed" / "zero2_round_robin" / "ckpt"
        command = ("convert", data, self.path / "out", "--format", "ucp", "--dry-run")
        code, out, _ = run(*command)
        self.assertEqual(code, 0)
        self.assertIn("\n  repaired: ", out)
        self.assertEqual(len(json.loads(run(*command, "--json")[1])["repaired"]),
                         len(json.loads(run("inspect", data, "--json")[1])["repairs"]))

    def test_a_hole_is_found_before_anything_is_written(self):
        data = Path(__file__).resolve().parents[1] / "tests" / "data" / "sharded" / "dcp_strided" / "ckpt"
        copy = Path(shutil.copytree(data, self.path / "dcp"))
        command = ("convert", copy, self.path / "out", "--format", "torch", "--drop", "objects", "--drop", "lost",
                   "--dry-run")
        self.assertEqual(run(*command)[0], 0)
        (copy / "__3_0.distcp").unlink()
        code, out, err = run(*command)
        self.assertEqual((code, out), (4, ""))
        self.assertIn("expected elements", err)

    def test_a_layout_file_says_what_the_checkpoint_does_not(self):
        data = Path(__file__).resolve().parents[1] / "tests" / "data" / "deepspeed_hostile"
        untold, told = data / "tensor_parallel_untold" / "ckpt", data / "sound_tensor_parallel" / "ckpt"
        layout = self.path / "layout.json"

        def shapes(*arguments):
            code, out, err = run("inspect", untold, "--tensors", "--sha256", "--json", *arguments)
            self.assertEqual((code, err), (0, ""))
            return {(r["name"], r["state"]): (r["shape"], r["sha256"]) for r in json.loads(out)["tensors"]}

        code, _, err = run("inspect", untold)
        self.assertEqual(code, 1)
        self.assertIn("does not say how it was cut", err)
        layout.write_text('{"rules": [{"parameters": "a|b", "cut": "replicated"}]}')
        records = json.loads(run("inspect", told, "--tensors", "--sha256", "--json")[1])["tensors"]
        self.assertEqual(shapes("--layout-file", layout),
                         {(r["name"], r["state"]): (r["shape"], r["sha256"]) for r in records})
        layout.write_text('{"rules": [{"parameters": "a", "cut": 1}, {"parameters": "b", "cut": 0, "rows": 7}]}')
        found = shapes("--layout-file", layout)
        self.assertEqual((found["a", "param"][0], found["b", "fp32"][0]), ([3, 4], [7]))
        for text, code, part in (('{"rules": [{"parameters": "a", "cut": 1}]}', 1, "no rule of the layout file"),
                                 ('{"rules": [{"parameters": "a", "cuts": 1}]}', 2, 'did you mean "cut"?'),
                                 ("", 2, "an empty file")):
            layout.write_text(text)
            found, _, err = run("inspect", untold, "--layout-file", layout)
            self.assertEqual(found, code, err)
            self.assertIn(part, err)
        layout.write_text("{}")
        file = self.write("x.safetensors", safetensors(self.tensors))
        code, _, err = run("inspect", file, "--layout-file", layout)
        self.assertEqual(code, 2)
        self.assertIn("--layout-file is for checkpoints of DeepSpeed", err)

    def test_a_dry_run_and_a_wrong_format_write_nothing(self):
        file = self.write("x.safetensors", safetensors(self.tensors))
        before = sorted(self.path.iterdir())
        code, out, _ = run("convert", file, self.path / "out", "--format", "safetensors", "--dry-run")
        self.assertEqual(code, 0)
        self.assertIn("would have 5 tensors", out)
        code, _, err = run("convert", file, self.path / "out", "--format", "safetensor")
        self.assertEqual(code, 2)
        self.assertIn("did you mean", err)
        code, _, err = run("convert", self.path / "nothing", self.path / "out", "--format", "holdfast")
        self.assertEqual(code, 5)
        self.assertEqual(sorted(self.path.iterdir()), before)

    def test_what_the_format_cannot_hold_is_dropped_only_if_asked(self):
        tensors = dict(self.tensors, six=("F6_E2M3", [4], b"abc"))
        file = self.write("x.safetensors", safetensors(tensors))
        for form in ("safetensors", "holdfast"):
            code, _, err = run("convert", file, self.path / "out", "--format", form)
            self.assertEqual(code, 1)
            self.assertIn("six is of dtype F6_E2M3", err)
        code, out, _ = run("convert", file, self.path / "out", "--format", "safetensors", "--drop", "unreadable")
        self.assertEqual(code, 0)
        self.assertIn("left out: six", out)

    def test_what_cannot_be_read_is_not_equal(self):
        def made(name, six, last):
            tensors = dict(self.tensors, six=("F6_E2M3", [4], six), last=("U8", [1], last))
            return self.write(name, safetensors(tensors))

        a, b, c = made("a", b"abc", b"x"), made("b", b"xyz", b"x"), made("c", b"abc", b"y")
        code, out, _ = run("diff", a, b)
        self.assertEqual(code, 2)
        self.assertIn("unknown: 6 tensors equal, 0 different\n  not compared: A: six is of dtype F6_E2M3", out)
        code, out, _ = run("diff", a, c, "--json")
        self.assertEqual((code, json.loads(out)["verdict"], len(json.loads(out)["not_compared"])), (1, "different", 2))
        # Of which a part is lost.
        index = {"weight_map": dict.fromkeys(self.tensors, "model-1.safetensors") | {"gone": "model-2.safetensors"}}
        self.write("hf/model-1.safetensors", safetensors(self.tensors))
        self.write("hf/model.safetensors.index.json", json.dumps(index).encode())
        code, out, _ = run("diff", self.path / "hf", self.path / "hf", "--json")
        self.assertEqual((code, json.loads(out)["verdict"]), (2, "unknown"))
        # What the one has lost the other may have; what else differs is different all the same.
        whole = self.write("whole", safetensors(self.tensors | {"gone": ("U8", [1], b"x")}))
        for pair in ((whole, self.path / "hf"), (self.path / "hf", whole)):
            code, out, _ = run("diff", *pair)
            self.assertEqual((code, out.splitlines()[0]), (2, "unknown: 5 tensors equal, 0 different"))
            self.assertIn('tensor "gone", state "tensor": not found in', out)
        changed = self.write("changed", safetensors(self.tensors | {"half": ("BF16", [3], bytes(6))}))
        self.assertEqual(run("diff", changed, self.path / "hf")[0], 1)

    def test_holdfast_has_the_same_tensors(self):
        file = self.write("x.safetensors", safetensors(self.tensors, {"format": "pt", "tied": "wte"}))
        (self.path / "root").mkdir()
        job = self.path / "root" / "imported"
        code, out, err = run("convert", file, job, "--format", "holdfast")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("6 tensors", out)
        self.assertEqual(run("verify", job)[0], 0)
        code, out, _ = run("inspect", job, "--tensors", "--blobs", "--json")
        self.assertEqual(code, 0)
        found = json.loads(out)
        self.assertEqual((found["format"], found["job"], found["step"], found["state"]),
                         ("holdfast", "imported", 0, "committed"))
        self.assertEqual([blob["name"] for blob in found["blobs"]], ["foreign.json"])
        records = {each["name"]: each for each in found["tensors"]}
        self.assertEqual(records["tied"]["fingerprint"], records["wte"]["fingerprint"])
        image = next(job.glob("s*/rank-00000.h5")).read_bytes()
        for name, (_, shape, content) in self.tensors.items():
            self.assertEqual(records[name]["shape"], shape)
            for piece in records[name]["pieces"] if content else []:
                self.assertEqual(image[piece["offset"]:piece["offset"] + len(content)], content)
        code, out, _ = run("diff", file, job)
        self.assertEqual((code, out), (0, "equal: 6 tensors equal, 0 different\n"))
        back = self.path / "back"
        self.assertEqual(run("export", job, back)[0], 0)
        self.assertEqual(run("diff", job, back)[0], 0)
        self.assertEqual(run("diff", back, self.path / "nothing")[0], 5)
        other = dict(self.tensors, half=("BF16", [3], struct.pack("<3H", 0x3F80, 0x4000, 0x4080)), more=("U8", [1], b"x"))
        code, out, _ = run("diff", self.write("y.safetensors", safetensors(other)), job, "--json")
        self.assertEqual(code, 1)
        found = {(each["a"] or each["b"])["name"]: each for each in json.loads(out)["differences"]}
        self.assertEqual(set(found), {"half", "more", "tied"})
        self.assertEqual(found["half"]["elements"], {"different": 1, "first": 2, "non_finite": 0, "max_absolute": 1.0,
                                                     "max_relative": 0.25})
        self.assertEqual((found["more"]["kind"], found["tied"]["kind"]), ("only in A", "only in B"))
        self.assertEqual(run("convert", file, job, "--format", "holdfast")[0], 1)
        self.assertEqual([path.name for path in (self.path / "root").iterdir()], ["imported"])
        bad = self.write("bad.safetensors", safetensors({"": ("U8", [1], b"x")}))
        code, _, err = run("convert", bad, self.path / "root" / "bad", "--format", "holdfast")
        self.assertNotEqual(code, 0)
        self.assertEqual([path.name for path in (self.path / "root").iterdir()], ["imported"])

    def test_ctrl_c_leaves_nothing(self):
        size = 3 << 30  # sparse: no bytes on the disk
        header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        file = self.path / "big.safetensors"
        with open(file, "wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + size)
        with subprocess.Popen([HOLDFAST, "export", file, self.path / "out"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as child:
            staged = None
            while staged is None or not any(staged.iterdir()):  # until it writes
                self.assertIsNone(child.poll())
                staged = next((path for path in self.path.iterdir() if "partial" in path.name), None)
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=60)
        self.assertEqual(child.returncode, 1)
        self.assertIn("stopped", err)
        self.assertEqual([path.name for path in self.path.iterdir()], ["big.safetensors"])


if __name__ == "__main__":
    unittest.main()
