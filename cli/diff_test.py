#!/usr/bin/python3
"""`holdfast diff` as a user meets it: checkpoints of trainings in several layouts, the golden checkpoint
changed by hand, and every exit code. Usage: diff_test.py HOLDFAST GOLDEN_ROOT LAUNCH TINY_LM HOLDFASTD"""

import json
import pathlib
import resource
import shutil
import struct
import sys
import tempfile
import unittest

import checkpoint_files
from checkpoint_files import fingerprint_reference, tensor_bytes, write_fingerprints

GOLDEN, LAUNCH, TINY_LM, HOLDFASTD = sys.argv[2:6]
EXAMPLES = pathlib.Path(LAUNCH).parent
sys.path.insert(0, str(EXAMPLES / "tiny_lm"))
import runs  # noqa: E402  (the path comes first)

run = checkpoint_files.Command(sys.argv[1])
MODEL = ("--layers", "3", "--batch", "5", "--bytes", "200K")


def diff(*arguments, expected=None, **options):
    """The report as an object. `expected`: the exit code."""
    code, text, error = run("diff", *arguments, "--json", **options)
    assert code == expected, (code, text, error)
    return json.loads(text)


def values(dtype, data):
    if dtype == "bfloat16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2))
    code = {"bfloat16": "f", "float32": "f", "int64": "q", "uint64": "Q"}[dtype]
    return [value for value, in struct.iter_unpack("<" + code, data)]


class OfTrainings(unittest.TestCase):
    """Steps 2 and 4 of one training in other layouts: exact, so that equal steps are equal tensors."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.jobs = [cls.train("a", 4, "--zero", "1"), cls.train("b", 2, "--tp", "2"),
                    cls.train("c", 3, "--pp", "3", "--pp-layers", "1,0,2")]

    @classmethod
    def train(cls, name, ranks, *layout):
        place = pathlib.Path(cls.temporary.name, name)
        place.mkdir()
        for steps in (2, 4):
            training = runs.Run((LAUNCH, TINY_LM, HOLDFASTD, EXAMPLES), place, f"to-{steps}", ranks,
                                *MODEL, *layout, "--steps", str(steps), "--save-every", "1000")
            status, errors = training.finish()
            assert status == 0, errors
        return place / "root" / "test"

    def step(self, job, step):
        return next(self.jobs[job].glob(f"s{step:012d}.a*"))

    def tensors(self, checkpoint):
        listed = json.loads(run("inspect", checkpoint, "--tensors", "--json")[1])["tensors"]
        return {(tensor["name"], tensor["state"]): tensor for tensor in listed}

    def test_one_step_is_equal_in_every_layout(self):
        count = len(self.tensors(self.step(0, 2)))
        self.assertGreater(count, 20)
        for first in range(3):
            for second in range(3):
                pair = self.step(first, 2), self.step(second, 2)
                report = diff(*pair, expected=0)
                self.assertEqual((report["verdict"], report["states_equal"], report["tensors"]),
                                 ("equal", count, []))
                report = diff(*pair, "--bytes", expected=0)
                self.assertEqual((report["compared_by"], report["verdict"], report["states_equal"]),
                                 ("bytes", "equal", count))
                self.assertEqual((report["fingerprints_checked"], report["damage"]), (2 * count, []))
                self.assertGreater(report["bytes_read"], 400_000)

    def test_two_steps_differ_in_what_training_changed(self):
        pair = self.step(0, 2), self.step(1, 4)
        by_fingerprints = diff(*pair, expected=1)
        by_bytes = diff(*pair, "--bytes", expected=1)
        names = [(tensor["name"], tensor["state"]) for tensor in by_bytes["tensors"]]
        self.assertEqual(names, [(tensor["name"], tensor["state"])
                                 for tensor in by_fingerprints["tensors"]])
        self.assertEqual(names, sorted(names))
        self.assertGreater(len(names), 20)
        a, b = (self.tensors(checkpoint) for checkpoint in pair)
        for found in by_bytes["tensors"]:
            name = found["name"], found["state"]
            self.assertEqual(found["what"], "differs")
            x, y = (values(tensors[name]["dtype"], tensor_bytes(checkpoint, tensors[name]))
                    for checkpoint, tensors in zip(pair, (a, b)))
            self.assertEqual(len(x), found["elements"])
            places = [i for i, (p, q) in enumerate(zip(x, y)) if p != q]
            first = 0
            for coordinate, extent in zip(found["first"], a[name]["shape"]):
                first = first * extent + coordinate
            self.assertEqual((found["elements_different"], first), (len(places), places[0]), name)
            self.assertEqual(found["max_absolute"], max(abs(x[i] - y[i]) for i in places))
            relative = max(abs(x[i] - y[i]) / max(abs(x[i]), abs(y[i])) for i in places)
            self.assertAlmostEqual(found["max_relative"], relative if "float" in a[name]["dtype"] else 0, places=12)

    def test_text_names_at_most_twenty(self):
        code, text, _ = run("diff", self.step(0, 2), self.step(0, 4), "--bytes")
        self.assertEqual(code, 1)
        self.assertEqual(sum(line.startswith("  differs: ") and " elements, first [" in line
                             for line in text.splitlines()), 20)
        self.assertRegex(text, r"  and \d+ more\n")
        self.assertIn("different by bytes: ", text)

    def test_a_job_stands_for_its_newest(self):
        report = diff(self.jobs[0], self.jobs[2], expected=0)
        self.assertEqual([report[side]["step"] for side in "ab"], [4, 4])
        self.assertEqual([report[side]["world_size"] for side in "ab"], [4, 3])


class OfTheGolden(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.checkpoints = []
        for name in "ab":
            root = pathlib.Path(temporary.name) / name
            shutil.copytree(GOLDEN, root)
            self.checkpoints.append(next(root.glob("*/s*.a*")))
        self.a, self.b = self.checkpoints

    def tensors(self):
        return json.loads(run("inspect", self.a, "--tensors", "--json")[1])["tensors"]

    def give_fingerprints(self, checkpoint):
        right = [fingerprint_reference.fingerprint(tensor["dtype"], tensor["shape"],
                                                   tensor_bytes(checkpoint, tensor))
                 for tensor in self.tensors()]
        write_fingerprints(checkpoint, right)
        return right

    def flip(self, checkpoint):
        tensor = next(tensor for tensor in self.tensors() if tensor["name"] == "h.0.attn")
        piece = tensor["pieces"][0]
        image = checkpoint / piece["file"]
        data = bytearray(image.read_bytes())
        data[piece["offset"]] ^= 1
        image.write_bytes(data)
        return image

    def test_without_fingerprints_there_is_no_answer_but_by_bytes(self):
        code, text, _ = run("diff", self.a, self.b)
        self.assertEqual(code, 2)
        for part in ("unknown by fingerprints: 0 of 8", "no fingerprint: h.0.attn param: in A and B",
                     "only --bytes can compare", "blobs: 0 equal, 3 not compared"):
            self.assertIn(part, text)
        self.assertNotIn("equal by", text)
        self.assertEqual(diff(self.a, self.b, expected=2)["verdict"], "unknown")
        report = diff(self.a, self.b, "--bytes", expected=0)
        self.assertEqual((report["verdict"], report["blobs_equal"]), ("equal", 3))
        self.give_fingerprints(self.a)
        self.assertIn("no fingerprint: h.0.attn param: in B", run("diff", self.a, self.b)[1])
        self.give_fingerprints(self.b)
        self.assertEqual(diff(self.a, self.b, expected=0)["states_equal"], 8)

    def test_another_fingerprint_differs_and_by_bytes_is_a_lie(self):
        right = self.give_fingerprints(self.a)
        write_fingerprints(self.b, [value ^ (i == 5) for i, value in enumerate(right)])
        report = diff(self.a, self.b, expected=1)
        self.assertEqual([tensor["name"] for tensor in report["tensors"]], [self.tensors()[5]["name"]])
        report = diff(self.a, self.b, "--bytes", expected=4)
        self.assertEqual((report["verdict"], report["damage_count"]), ("equal", 1))
        self.assertIn(str(self.b), report["damage"][0])
        self.assertIn(f"found {right[5]:032x}", run("diff", self.a, self.b, "--bytes")[1])

    def test_damage_is_four_and_named(self):
        image = self.flip(self.b)
        code, text, error = run("diff", self.a, self.b, "--bytes")
        self.assertEqual((code, text), (4, ""))
        for part in (str(image), "expected CRC32C", "h.0.attn (param)"):
            self.assertIn(part, error)
        image.write_bytes(image.read_bytes()[:-4096])
        code, _, error = run("diff", self.b, self.a, "--bytes")
        self.assertEqual((code, str(image) in error), (4, True))
        image.unlink()
        self.assertEqual(run("diff", self.a, self.b, "--bytes")[0], 4)
        index = self.b / "INDEX"
        index.write_bytes(index.read_bytes()[:-1])
        self.assertEqual(run("diff", self.a, self.b)[0], 4)

    def test_what_is_not_there_is_five(self):
        self.assertEqual(run("diff", self.a, self.b / "nothing")[0], 5)
        (self.b / "MANIFEST.json").unlink()
        for path in (self.b, self.b.parent):
            for arguments in ((self.a, path), (path, self.a)):
                self.assertEqual(run("diff", *arguments)[0], 5)

    def test_wrong_usage_is_two(self):
        for arguments in ((), (self.a,), (self.a, self.b, self.b), (self.a, self.b, "--byte")):
            self.assertEqual(run("diff", *arguments)[0], 2)

    def test_trouble_with_reading_is_seventyfive_and_never_one(self):
        def limit(count):
            return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
        # Descriptors for the catalog, not for all images.
        code, _, error = run("diff", self.a, self.b, "--bytes", before=limit(5))
        self.assertEqual(code, 75)
        self.assertIn("descriptors", error)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
