#!/usr/bin/python3
"""holdfast reshard as a user meets it: a checkpoint that tiny_lm saved with 4 ranks (ZeRO-1) becomes one
of other layouts, is verified, read with h5py, trained on, and resharded back; and what is refused.
Usage: reshard_test.py HOLDFAST LAUNCH TINY_LM HOLDFASTD CORPUS MAKE_CHECKPOINT"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

import h5py
import numpy as np

HOLDFAST, LAUNCH, TINY_LM, HOLDFASTD, CORPUS, MAKE_CHECKPOINT = sys.argv[1:7]
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples" / "tiny_lm"))
import runs  # noqa: E402

PROGRAMS = LAUNCH, TINY_LM, HOLDFASTD, CORPUS
MODEL = ("--layers", "2", "--batch", "5", "--bytes", "12M", "--save-every", "2")
JOB = "test"  # as runs.Run calls it
TO = "tp=2,dp=2,zero=1"
# AddressSanitizer has memory of its own beside every allocation. Line by line: what this process has in memory counts
# in the tests of memory (see run).
with open(HOLDFAST, "rb") as program:
    MEMORY_FACTOR = 2 if any(b"__asan_init" in line for line in program) else 1


def run(*arguments):
    """Exit code, outputs, and the greatest resident size of the process in bytes, but at least this one's:
    the kernel counts what it was before it became another program."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([HOLDFAST, *map(str, arguments)], stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        return process.returncode, out.read(), errors.read(), usage.ru_maxrss * 1024


def tensors_by_h5py(checkpoint):
    """{(state, tensor): array of bytes per element} out of the images alone, each element once."""
    whole, seen = {}, {}
    for path in sorted(checkpoint.glob("*.h5")):
        with h5py.File(path, "r") as image:
            for state in image["/tensors"].values():
                for piece in state.values():
                    key = state.attrs["name"], piece.attrs["name"]
                    shape = [int(size) for size in piece.attrs["shape"]]
                    begin, end = map(int, piece.attrs["range"])
                    lo = [int(x) for x in piece.attrs.get("box_lo", [0] * len(shape))]
                    size = [int(x) for x in piece.attrs.get("box_size", shape)]
                    values = np.asarray(piece[()]).reshape(-1)
                    places = np.unravel_index(np.arange(begin, end), size) if shape else ()
                    at = (np.ravel_multi_index([a + b for a, b in zip(places, lo)], shape)
                          if shape else np.zeros(1, int))
                    count = int(np.prod(shape, dtype=int))
                    whole.setdefault(key, np.zeros(count, values.dtype))[at] = values
                    seen.setdefault(key, np.zeros(count, int))[at] += 1
    for key, counts in seen.items():
        assert (counts == 1).all(), key
    return whole


def fingerprints(checkpoint):
    code, text, errors, _ = run("inspect", checkpoint, "--tensors", "--json")
    assert code == 0, errors
    return {(tensor["state"], tensor["name"]): tensor["fingerprint"]
            for tensor in json.loads(text)["tensors"]}


class ReshardTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.place = pathlib.Path(cls.temporary.name)
        (cls.place / "root").mkdir()
        (cls.place / "run").mkdir(mode=0o700)
        cls.train("source", 4, "--zero", "1", "--steps", "2")
        cls.job = cls.place / "root" / JOB
        cls.source = next(cls.job.glob("s*.a*"))

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    @classmethod
    def train(cls, name, world, *flags, programs=PROGRAMS, **environment):
        (cls.place / "root").mkdir(exist_ok=True)
        training = runs.Run(programs, str(cls.place), name, world, *MODEL, *flags, **environment)
        status, errors = training.finish()
        assert status == 0, errors
        return training

    def setUp(self):
        self.out = self.place / self.id().rsplit(".", 1)[-1]

    def reshard(self, *arguments, source=None, out=None):
        code, text, errors, peak = run("reshard", source or self.job, out or self.out, *arguments,
                                       "--json")
        self.assertEqual(code, 0, errors)
        return json.loads(text), peak

    def test_the_same_tensors_in_another_layout(self):
        found, _ = self.reshard("--to", TO)
        target = pathlib.Path(found["target"]["directory"])
        self.assertEqual(target, self.out / JOB / "s000000000002.a0000")
        self.assertEqual(found["target"]["mesh"], "pp=1,dp=2,tp=2")
        before = fingerprints(self.source)
        self.assertEqual(found["result"]["fingerprints"], {"equal": len(before), "not_computed": 0})
        self.assertEqual(fingerprints(target), before)
        code, text, _, _ = run("verify", self.out / JOB, "--json")
        self.assertEqual((code, json.loads(text)["verdict"]), (0, "good"))
        expected, tensors = tensors_by_h5py(self.source), tensors_by_h5py(target)
        self.assertEqual(expected.keys(), tensors.keys())
        for key, values in expected.items():
            self.assertTrue(np.array_equal(values, tensors[key], equal_nan=values.dtype.kind == "f"), key)

        job = json.loads(run("ls", self.out, "--json")[1])["jobs"][0]
        source = json.loads(run("ls", self.job, "--json")[1])["jobs"][0]
        self.assertEqual(job["source"], {"step": 2, "attempt": 1, "job": JOB, "uuid": source["uuid"],
                                         "directory": str(self.source.resolve())})
        self.assertNotEqual(job["uuid"], source["uuid"])
        self.assertIn("made from step 2 of attempt 1", run("ls", self.out)[1])
        self.assertIsNone(job["checkpoints"][0]["parent"])

    def test_a_training_goes_on_from_it_bit_for_bit(self):
        reference = self.train("reference", 1, "--steps", "4", programs=(LAUNCH, TINY_LM, None, CORPUS))
        self.reshard("--to", TO)
        (self.place / "run2").mkdir(mode=0o700)
        training = self.train("further", 4, "--tp", "2", "--zero", "1", "--steps", "4",
                              HOLDFAST_ROOT=str(self.out), HOLDFAST_RUNTIME_DIR=str(self.place / "run2"))
        self.assertEqual({event[0]["step"] for event in training.events("restored").values()}, {2})
        expected = {step: loss for step, loss in reference.losses().items() if step > 2}
        self.assertEqual(training.losses(), expected)
        job = json.loads(run("ls", self.out, "--json")[1])["jobs"][0]
        self.assertEqual([(point["step"], point["attempt"]) for point in job["checkpoints"]],
                         [(2, 0), (4, 1)])
        self.assertEqual(job["checkpoints"][1]["parent"], {"step": 2, "attempt": 0})

    def test_there_and_back_again(self):
        self.reshard("--to", TO)
        self.reshard("--to", "tp=1,dp=4,zero=1", "--job", "back", source=self.out / JOB)
        back = next((self.out / "back").glob("s*.a*"))
        self.assertEqual(fingerprints(back), fingerprints(self.source))
        # All ranks' blobs have come along, from 4 ranks to 4, and to 3 and 5 as well.
        for ranks in (3, 5):
            self.reshard("--to", f"dp={ranks}", "--job", f"job{ranks}", source=back)
            blobs = json.loads(run("inspect", self.out / f"job{ranks}", "--blobs", "--json")[1])["blobs"]
            of_ranks = {blob["rank"] for blob in blobs if blob["scope"] == "rank"}
            self.assertEqual(of_ranks, {0, 1, 2, 3})

    def test_rules_and_documents_are_layouts_too(self):
        rules = self.place / "rules.json"
        rules.write_text(json.dumps({
            "holdfast_layout_rules": 1, "mesh": [{"axis": "x", "size": 3}],
            "rules": [{"tensors": "*", "states": ["ballast"],
                       "place": [{"op": "flat", "axis": "x", "rule": "ceil"}]},
                      {"tensors": "*"}]}))
        found, _ = self.reshard("--layout", rules)
        self.assertEqual(found["target"]["mesh"], "x=3")
        self.assertEqual(fingerprints(self.out / JOB), fingerprints(self.source))
        text = run("inspect", self.job, "--layout")[1]
        document = self.place / "layout.json"
        document.write_text(text[text.index('{"holdfast_layout"'):])
        self.reshard("--layout", document, "--job", "same")
        self.assertEqual(fingerprints(self.out / "same"), fingerprints(self.source))

    def test_a_dry_run_prints_the_plan_and_writes_nothing(self):
        before = sorted(self.place.rglob("*"))
        found, _ = self.reshard("--to", TO, "--dry-run")
        self.assertEqual(before, sorted(self.place.rglob("*")))
        self.assertNotIn("result", found)
        images = found["target"]["image_bytes"]
        self.assertEqual(len(images), 4)
        self.assertEqual(sum(images), found["plan"]["bytes_to_write"])
        self.assertGreaterEqual(found["plan"]["bytes_to_read"], found["plan"]["bytes_to_read_once"])
        code, text, _, _ = run("reshard", self.job, self.out, "--to", TO, "--dry-run")
        self.assertEqual(code, 0)
        self.assertRegex(text, r"rank 3: [\d.]+ MiB\n  to read [\d.]+ MiB \(.* again\), to write")
        done, _ = self.reshard("--to", TO)
        self.assertEqual(done["plan"], found["plan"])
        self.assertEqual(done["target"]["image_bytes"],
                         [path.stat().st_size for path in sorted((self.out / JOB).glob("*/rank*"))])

    def test_out_is_what_its_links_lead_to(self):
        (self.place / "a" / "b").mkdir(parents=True)
        (self.place / "link").symlink_to("a/b")
        found, _ = self.reshard("--to", TO, out=self.place / "link" / ".." / "new")
        self.assertEqual(found["target"]["directory"],
                         str(next((self.place / "a" / "new" / JOB).glob("s*.a*")).resolve()))
        self.assertFalse((self.place / "new").exists())

    def test_memory_keeps_to_its_bound(self):
        for number, megabytes in enumerate((MEMORY_FACTOR * 96, MEMORY_FACTOR * 256)):
            found, peak = self.reshard("--to", TO, "--memory", f"{megabytes}M", "--job", f"job{number}")
            self.assertLessEqual(peak, MEMORY_FACTOR * megabytes << 20)
            self.assertLessEqual(found["result"]["peak_memory_bytes"], peak)
            self.assertGreater(found["result"]["peak_memory_bytes"], found["plan"]["buffer_bytes"])
        code, _, errors, _ = run("reshard", self.job, self.out, "--to", TO, "--memory", "8M", "--job", "x")
        self.assertEqual(code, 2)
        self.assertRegex(errors, r"--memory: expected at least \d+M ")
        self.assertFalse((self.out / "x").exists())
        # What it asks for suffices, and is kept to.
        least = int(errors.split("at least ")[1].split("M ")[0])
        found, _ = self.reshard("--to", TO, "--memory", f"{least}M", "--job", "x")
        self.assertLessEqual(found["result"]["peak_memory_bytes"], MEMORY_FACTOR * least << 20)

    def slow_source(self):
        """Blocks of 4 KiB, each of which is written by itself, so that a reshard takes a while."""
        document = self.place / "slow.json"
        document.write_text(json.dumps({
            "holdfast_layout": 1, "mesh": [{"axis": "dp", "size": 4}],
            "tensors": [{"name": f"w{i}", "shape": [1024, 512], "states": [
                {"state": "param", "dtype": "float32",
                 "place": [{"op": "shard", "dim": 0, "axis": "dp", "rule": "ceil"}]}]} for i in range(8)]}))
        subprocess.run([MAKE_CHECKPOINT, document, self.out / "slow", "7"], check=True)
        return self.out / "slow"

    def signalled(self, number, handler, source, job):
        """Exit code and error output of a reshard that gets a signal once it has made an image. `handler`:
        what the signal does where the command is started."""
        with subprocess.Popen([HOLDFAST, "reshard", source, self.out, "--to", "dp=3", "--job", job],
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              preexec_fn=lambda: signal.signal(number, handler)) as child:
            while child.poll() is None and not any(self.out.glob(f"{job}/*/rank-*.h5")):
                pass
            child.send_signal(number)
            _, errors = child.communicate(timeout=60)
        return child.returncode, errors

    def test_ctrl_c_leaves_no_image_and_the_next_run_begins_anew(self):
        source = self.slow_source()
        for attempt in range(20):  # until the signal comes in time
            job = f"job{attempt}"
            code, errors = self.signalled(signal.SIGINT, signal.SIG_DFL, source, job)
            if code != 0:
                break
        self.assertEqual(code, 1, errors)
        self.assertIn("stopped", errors)
        self.assertEqual(list((self.out / job).rglob("*.h5")), [])
        self.reshard("--to", "dp=3", "--job", job, source=source)
        self.assertEqual(run("verify", self.out / job)[0], 0)

    def test_a_signal_that_nohup_ignores_does_not_stop_it(self):
        source = self.slow_source()
        for number in (signal.SIGHUP, signal.SIGINT):
            code, errors = self.signalled(number, signal.SIG_IGN, source, f"job{number}")
            self.assertEqual(code, 0, errors)

    def test_what_cannot_be_done_has_its_exit_code_and_leaves_nothing(self):
        def refused(code, pattern, *arguments):
            found, _, errors, _ = run("reshard", *arguments)
            self.assertEqual(found, code, errors)
            self.assertRegex(errors, pattern)

        refused(2, "tp", self.job, self.out, "--to", "tq=2")
        refused(2, "required", self.job, self.out)
        refused(2, "2 were given", self.job, self.out, "--to", TO, "--layout", "x")
        for memory in ("-5", "-5M", "lots"):
            refused(2, "--memory", self.job, self.out, "--to", TO, f"--memory={memory}")
        for text, pattern in (('{"holdfast_layout": 1,', "JSON line 1"), ("{}", "holdfast_layout"),
                              ('{"holdfast_layout_rules": 1, "mesh": [], "rules": []}', "no rule fits")):
            (self.place / "wrong.json").write_text(text)
            refused(2, rf"holdfast: /.*/wrong\.json: .*{pattern}", self.job, self.out, "--layout",
                    self.place / "wrong.json")
        refused(5, "nothing", self.place / "nothing", self.out, "--to", TO)
        refused(5, "nothing.json", self.job, self.out, "--layout", self.place / "nothing.json")
        self.assertFalse(self.out.exists())
        self.reshard("--to", TO)
        refused(1, "made before", self.job, self.out, "--to", TO)
        refused(1, "a job of its own", self.job, self.job.parent, "--to", TO)

        spoilt = self.place / "spoilt"
        shutil.copytree(self.job.parent, spoilt)
        image = next((spoilt / JOB).glob("s*/rank-00002.h5"))
        with open(image, "r+b") as file:
            file.seek(image.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        refused(4, r"rank-00002\.h5.*ballast", spoilt / JOB, self.out, "--to", TO, "--job", "spoilt")
        self.assertEqual(list((self.out / "spoilt").rglob("*.h5")), [])
        next((spoilt / JOB).glob("s*/MANIFEST.json")).unlink()
        refused(5, "no committed checkpoint", spoilt / JOB, self.out, "--to", TO, "--job", "none")
        (self.source / "BAD.1").write_text("spoilt")
        try:
            refused(1, "marked bad", self.source, self.out, "--to", TO, "--job", "bad")
        finally:
            (self.source / "BAD.1").unlink()


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
