#!/usr/bin/python3
"""The options of holdfast convert and export, on a torch-free sample that this test writes itself: which tensors, under
which names, in which dtypes and formats, in how much memory.

Usage: convert_test.py HOLDFAST
"""

import hashlib
import json
import random
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

HOLDFAST = sys.argv.pop(1)
# Sanitizers have memory of their own beside every allocation.
SANITIZED = any(word in Path(HOLDFAST).read_bytes() for word in (b"__asan_init", b"__tsan_init"))


def run(*arguments):
    done = subprocess.run([HOLDFAST, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def safetensors(path, tensors, metadata=None):
    """{name: (dtype, shape, bytes)} as a file."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensors_in(path):
    code, out, err = run("inspect", path, "--tensors", "--sha256", "--json")
    assert code == 0, err
    return {each["name"]: each for each in json.loads(out)["tensors"]}


def bfloat16(number):
    """To nearest, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    return struct.pack("<H", (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


class ConvertTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory(dir=".")
        self.addCleanup(self.directory.cleanup)
        self.path = Path(self.directory.name).resolve()
        rng = random.Random(7)
        self.numbers = {f"blocks.{i}.weight": [rng.uniform(-9, 9) for _ in range(12)] for i in range(3)}
        tensors = {name: ("F32", [3, 4], struct.pack("<12f", *values)) for name, values in self.numbers.items()}
        tensors["mask"] = ("BOOL", [2], b"\0\1")
        self.file = safetensors(self.path / "x.safetensors", tensors)

    def convert(self, *arguments, out="out", form="torch"):
        code, text, err = run("convert", self.file, self.path / out, "--format", form, "--json", *arguments)
        self.assertEqual((code, err), (0, ""))
        return json.loads(text)

    def refused(self, *arguments, form="torch", code=2):
        found, _, err = run("convert", self.file, self.path / "out", "--format", form, *arguments)
        self.assertEqual(found, code, err)
        self.assertFalse((self.path / "out").exists())
        return err

    def test_which_tensors_and_what_they_are_called(self):
        rules = self.path / "rules"
        rules.write_text("# numbers first\nregex ^blocks\\.(\\d+)\\. \\1.block.\nname 0.block.weight first\n")
        said = self.convert("--only", "blocks.{n}.weight", "--rename", rules)
        self.assertEqual((said["tensors"], said["left_out"]), (3, ["1 tensors that --only does not name"]))
        found, source = tensors_in(self.path / "out"), tensors_in(self.file)
        self.assertEqual(set(found), {"first", "1.block.weight", "2.block.weight"})
        self.assertEqual(found["first"]["sha256"], source["blocks.0.weight"]["sha256"])
        self.assertEqual(run("diff", self.file, self.path / "out")[0], 1)
        (self.path / "out").unlink()
        self.assertIn("did you mean \"mask\"", self.refused("--only", "masks"))
        self.assertIn("no such", self.refused("--rename", self.path / "nothing", code=5).lower())
        rules.write_text("prefx a b\n")
        self.assertIn("line 1: expected name, prefix, suffix or regex, found \"prefx\"; did you mean",
                      self.refused("--rename", rules))
        rules.write_bytes(b"name mask m\n\nname m \xff\n")
        self.assertIn("line 3: expected UTF-8", self.refused("--rename", rules))
        rules.write_text("regex blocks\\.\\d same\n")
        self.assertIn("would both be called \"same.weight\"", self.refused("--rename", rules, code=1))

    def test_dtypes(self):
        said = self.convert("--dtype", "bfloat16")
        self.assertEqual(said["cast"], ["3 tensors from float32 to bfloat16"])
        self.assertEqual(said["became_infinite"], 0)
        found = tensors_in(self.path / "out")
        self.assertEqual(found["mask"]["dtype"], "bool")
        content = (self.path / "out").read_bytes()
        for name, values in self.numbers.items():
            self.assertEqual(found[name]["dtype"], "bfloat16")
            self.assertIn(b"".join(map(bfloat16, values)), content)
        # Widened, it is the same; what is too large for float16 is said.
        self.convert("--dtype", "float64", out="wide")
        code, _, err = run("convert", self.path / "wide", self.path / "back", "--format", "torch", "--dtype", "float32")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(run("diff", self.file, self.path / "back")[0], 0)
        big = safetensors(self.path / "big.safetensors", {"x": ("F32", [3], struct.pack("<3f", 1e6, 1, float("inf")))})
        code, out, _ = run("convert", big, self.path / "half", "--format", "safetensors", "--dtype", "float16")
        self.assertEqual(code, 0)
        self.assertIn("1 finite numbers became infinite, the first in tensor \"x\"", out)
        (self.path / "out").unlink()
        self.assertIn("did you mean \"bfloat16\"", self.refused("--dtype", "bflot16"))
        self.assertIn("expected STATE=DTYPE", self.refused("--dtype", "exp_avg=float32"))

    def test_other_frameworks_names_and_blocks(self):
        rules = self.path / "my.map"
        rules.write_text("blocks.{n}.weight = concat(2 * a.{n}, b.{n})\nshape a.{n} [rows columns]\n")
        self.assertIn("expected a rule for \"mask\"", self.refused("--map", rules, code=1))
        said = self.convert("--map", rules, "--drop", "unmapped")
        self.assertEqual(said["left_out"], [f"mask, for which --map {rules} has no rule"])
        found = tensors_in(self.path / "out")
        self.assertEqual({name: each["shape"] for name, each in found.items()},
                         {f"{part}.{i}": [rows, 4] for i in range(3) for part, rows in (("a", 2), ("b", 1))})
        content = struct.pack("<4f", *self.numbers["blocks.1.weight"][8:])
        self.assertEqual(found["b.1"]["sha256"], hashlib.sha256(content).hexdigest())
        # The same file the other way round.
        code, _, err = run("convert", self.path / "out", self.path / "back", "--format", "torch", "--map", rules)
        self.assertEqual((code, err), (0, ""))
        source = tensors_in(self.file)
        self.assertEqual({name: each["sha256"] for name, each in tensors_in(self.path / "back").items()},
                         {name: each["sha256"] for name, each in source.items() if name != "mask"})
        (self.path / "out").unlink()
        self.assertIn("did you mean \"llama\"", self.refused("--map", "lama"))
        self.assertIn("did you mean \"llama\"", self.refused("--preset", "lama"))
        self.assertIn("did you mean \"megatron\"", self.refused("--map", "llama:megatrn"))
        self.assertIn("expected names of llama", self.refused("--map", "llama", code=1))
        self.assertIn("--set: expected --map", self.refused("--set", "heads=4"))
        self.assertIn("--drop unmapped: expected --map", self.refused("--drop", "unmapped"))
        self.assertIn("did you mean \"heads\"", self.refused_after(rules, "heads * a.{n}, b.{n}", "heds=2"))

    def test_built_in_mappings_are_files(self):
        code, out, _ = run("mapping")
        self.assertEqual(code, 0)
        self.assertIn("llama:megatron", out.split())
        self.assertEqual(run("mapping", "mixtral")[1].split(), [each for each in out.split() if each[0] == "m"])
        code, table, _ = run("mapping", "llama:titan")
        self.assertEqual(code, 0)
        rules = self.path / "titan.map"
        rules.write_text(table)
        source = safetensors(self.path / "norm.safetensors", {"norm.weight": ("F32", [1], struct.pack("<f", 5))})
        code, _, err = run("convert", source, self.path / "out", "--format", "torch", "--map", rules)
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(set(tensors_in(self.path / "out")), {"model.norm.weight"})
        code, _, err = run("mapping", "llama:titen")
        self.assertEqual(code, 2)
        self.assertIn("did you mean \"titan\"", err)

    def refused_after(self, rules, parts, number):
        rules.write_text(f"blocks.{{n}}.weight = concat({parts})\ndrop mask\n")
        return self.refused("--map", rules, "--set", "heads=2", "--set", number)

    def test_layouts(self):
        for form, to, expected in (("torch", "dp=2", "expected a format with a layout"),
                                   ("fsdp", "zero=2", "column 1: expected an axis of fsdp (dp)"),
                                   ("deepspeed", "zero=1,dpp=2", "column 8: expected an axis of deepspeed (zero, dp, tp, pp, ep), "
                                                                "found \"dpp=2\"; did you mean \"dp\""),
                                   ("deepspeed", "zero=4", "expected a stage from 1 to 3"),
                                   ("fsdp", "dp=0", "expected 1 to"), ("fsdp", "dp", "expected AXIS=SIZE")):
            self.assertIn(expected, self.refused("--to", to, form=form))
        said = self.convert("--to", "dp=2", form="fsdp")
        self.assertEqual([each["file"] for each in said["files"]],
                         ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"])
        self.assertEqual(run("diff", self.file, self.path / "out")[0], 0)
        self.assertEqual(run("verify", self.path / "out")[0], 0)

    def test_ranks_of_model_parallelism(self):
        for to, code, expected in (("zero=2,pp=1", 2, "expected zero=1 with pp"),
                                   ("dp=3,ep=2", 2, "expected ep to divide dp"),
                                   ("dp=2,ep=2", 1, "the model has no experts of DeepSpeed's"),
                                   ("tp=4000,pp=2", 2, "at most"),
                                   ("dp=40000,tp=2", 2, "expected at most 65536 ranks in all"),
                                   ("tp=2", 1, "parameter \"blocks.0.weight\": nothing says how tensor-parallel ranks cut it"),
                                   ("pp=2", 1, "a pipeline's tensors are called <layer>.<name>")):
            self.assertIn(expected, self.refused("--to", to, form="deepspeed", code=code))
        self.assertIn("did you mean \"llama\"", self.refused("--to", "tp=2", "--preset", "lama", form="deepspeed"))
        layout = self.path / "layout.json"
        layout.write_text(json.dumps({"rules": [{"parameters": "blocks", "cut": 1}]}))
        self.assertIn("--layout-file is for checkpoints of DeepSpeed", self.refused("--layout-file", layout))
        said = self.convert("--to", "tp=2", "--layout-file", layout, form="deepspeed")
        self.assertEqual([each["file"] for each in said["files"]],
                         ["global_step0/mp_rank_00_model_states.pt", "global_step0/mp_rank_01_model_states.pt", "latest"])
        # It says itself how it was cut.
        self.assertEqual(run("diff", self.file, self.path / "out")[0], 0)
        rules = self.path / "rules"
        rules.write_text("regex ^blocks\\.(\\d+)\\. \\1.block.\nname mask 2.mask\n")
        layout.write_text(json.dumps({"rules": [{"parameters": "", "cut": 1}]}))
        self.convert("--to", "pp=3,tp=2", "--layout-file", layout, "--rename", rules, "--force", form="deepspeed")
        self.assertEqual(sorted(each.name for each in (self.path / "out/global_step0").glob("layer*")),
                         [f"layer_{n:02}-model_{t:02}-model_states.pt" for n in range(3) for t in range(2)])
        self.assertIn("2.block.weight", tensors_in(self.path / "out"))

    def test_what_is_no_tensor_is_refused_or_dropped(self):
        mask = {"mask": ("BOOL", [2], b"\0\1")}
        self.file = safetensors(self.path / "told.safetensors", mask, {"author": "we", "format": "pt"})
        for form in ("torch", "dcp", "safetensors", "fsdp"):
            err = self.refused(form=form, code=1)
            self.assertIn(f"--format {form} has no place for metadata; --drop objects leaves it out", err)
        for kind in ("objects", "*"):
            self.assertEqual(self.convert("--drop", kind, out=f"without-{kind}")["left_out"], ["metadata"])
        # Which framework wrote a file is nothing about the model.
        self.file = safetensors(self.path / "marked.safetensors", mask, {"format": "pt"})
        self.assertEqual(self.convert(out="marked")["left_out"], [])

    def test_a_dry_run_says_what_would_be_written(self):
        before = sorted(self.path.iterdir())
        said = self.convert("--to", "dp=3", "--dry-run", form="fsdp")
        self.assertTrue(said["dry_run"])
        self.assertEqual(sorted(self.path.iterdir()), before)
        code, out, _ = run("convert", self.file, self.path / "out", "--format", "fsdp", "--to", "dp=3", "--dry-run")
        self.assertEqual(code, 0)
        self.assertIn("would have 4 tensors", out)
        self.assertIn("model_world_size_3_rank_2.pt", out)
        real = self.convert("--to", "dp=3", form="fsdp")
        self.assertEqual([(each["file"], each["bytes"]) for each in real["files"]],
                         [(each["file"], each["bytes"]) for each in said["files"]])
        for each in real["files"]:
            self.assertEqual((self.path / "out" / each["file"]).stat().st_size, each["bytes"])

    def test_a_file_is_replaced_only_if_asked(self):
        self.convert()
        self.assertEqual(run("convert", self.file, self.path / "out", "--format", "torch")[0], 1)
        said = self.convert("--only", "mask", "--force")
        self.assertEqual((said["tensors"], set(tensors_in(self.path / "out"))), (1, {"mask"}))
        self.assertEqual([path.name for path in self.path.iterdir() if "partial" in path.name], [])
        (self.path / "folder").mkdir()
        code, _, err = run("convert", self.file, self.path / "folder", "--format", "torch", "--force")
        self.assertEqual(code, 1)
        self.assertIn("is no file", err)

    def test_nothing_that_is_read_is_replaced_with_what_is_around_it(self):
        before = sorted(self.path.iterdir())
        for out in (self.path, f"{self.path}/", self.path.parent):
            code, _, err = run("convert", self.file, out, "--format", "fsdp", "--force")
            self.assertEqual(code, 1, err)
            self.assertIn("is in it: choose another place", err)
        self.assertEqual(sorted(self.path.iterdir()), before)
        # A checkpoint may be replaced by what is made of it.
        self.convert(out="model.pt")
        expected = tensors_in(self.path / "model.pt")
        code, _, err = run("convert", self.path / "model.pt", self.path / "model.pt", "--format", "torch", "--force")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(tensors_in(self.path / "model.pt"), expected)

    def test_odd_names_of_outputs_and_tags(self):
        self.assertIn("OUT: expected the name", run("convert", self.file, "", "--format", "torch")[2])
        self.assertEqual(run("convert", self.file, f"{self.path}/folder/", "--format", "fsdp")[0], 0)
        self.assertEqual(run("diff", self.file, self.path / "folder")[0], 0)
        self.assertEqual(run("convert", self.file, f"{self.path}/file/", "--format", "torch")[0], 5)
        err = self.refused("--tag", "step-7")
        self.assertIn("--tag step-7: expected a folder of several checkpoints, found", err)
        self.assertIn("expected more than 0 bytes", self.refused("--memory", "0"))

    def test_memory_is_bounded(self):
        size = 64 << 20
        header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
        big = self.path / "big.safetensors"
        with open(big, "wb") as stream:  # sparse
            stream.write(struct.pack("<Q", len(header)) + header)
            stream.truncate(8 + len(header) + size)
        code, _, err = run("convert", big, self.path / "out", "--format", "torch", "--memory", "1M")
        self.assertEqual(code, 2)
        self.assertIn("--memory: expected", err)
        if not SANITIZED:  # of which the address space has no limit
            many = safetensors(self.path / "many.safetensors", {f"tensor.{i}": ("U8", [1], b"x") for i in range(60000)})
            code, _, err = run("convert", many, self.path / "out", "--format", "torch", "--memory", "20M")
            self.assertEqual(code, 2)
            self.assertIn("--memory: expected more than 20971520 bytes to read this checkpoint with", err)
        limit = 32 << 20  # less than what is read, and than what is written
        memory = [] if SANITIZED else ["--memory", str(limit)]
        code, out, err = run("convert", big, self.path / "out", "--format", "torch", "--dtype", "float64", "--json",
                             *memory)
        self.assertEqual((code, err), (0, ""))
        if not SANITIZED:
            self.assertLessEqual(json.loads(out)["peak_memory_bytes"], limit)
        self.assertEqual((self.path / "out").stat().st_size // size, 2)


if __name__ == "__main__":
    unittest.main()
