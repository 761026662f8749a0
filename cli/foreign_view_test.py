#!/usr/bin/python3
"""`holdfast view` of other frameworks' checkpoints, as users of stock h5py meet it: every tensor that the view shows has
the bytes that training held, and what it does not show is named.

The truth is expected.json beside each checkpoint, of the samples in tests/data and of ../shared/fixtures where it is
there, and safetensors files that this test writes itself.
Usage: foreign_view_test.py HOLDFAST [UNITTEST ARGUMENT...]"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np

from checkpoint_files import Command

HOLDFAST = sys.argv.pop(1)
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
FIXTURES = ROOT.parent / "shared" / "fixtures"
run = Command(HOLDFAST)
# Where the file does not tell which of these a tensor is, a reader cannot either.
ONE_CLASS = {"param", "buffer", "tensor", "other", "rng", "ema"}


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def raw(dataset):
    """The bytes of its elements, little-endian, as no numpy type can have them all."""
    kind = dataset.id.get_type()
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        return np.asarray(dataset[()]).astype(f"<c{kind.get_size()}").tobytes()
    if isinstance(kind, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID)):
        kind = kind.copy()
        kind.set_order(h5py.h5t.ORDER_LE)
    out = np.zeros((dataset.size, kind.get_size()), np.uint8)
    if out.size:
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, out, mtype=kind)
    return out.tobytes()


def contents(view):
    """{(name, state): (dtype, shape, sha256)}, and what the view says of itself."""
    found = {}
    with h5py.File(view) as file:
        for group in file["tensors"].values():
            for dataset in group.values():
                key = text(dataset.attrs.get("name", "")), text(dataset.attrs["state"])
                assert (key[0] == "") == (dataset.name.rsplit("/", 1)[1] == "%")
                assert text(group.attrs["name"]) == key[1] and key not in found
                assert list(dataset.attrs["shape"]) == list(dataset.shape)
                found[key] = text(dataset.attrs["dtype"]), dataset.shape, hashlib.sha256(raw(dataset)).hexdigest()
        source = file["holdfast/source"][()]
    return found, json.loads(source)


def safetensors(tensors):
    """{name: (dtype, shape, bytes)} as a file."""
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


class ForeignViewTest(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.addCleanup(self.temporary.cleanup)
        self.place = Path(self.temporary.name).resolve()
        self.count = 0

    def view(self, checkpoint, *options, at=None):
        """The report of `view`, with what h5py finds."""
        self.count += 1
        path = at or self.place / f"view{self.count}.h5"
        code, out, err = run("view", checkpoint, path, "--json", *options)
        self.assertEqual((code, err), (0, ""), checkpoint)
        return json.loads(out), path

    def expect_view(self, checkpoint, truth, *options):
        """All that `inspect` knows is in the view or left out of it by name, and is what `truth` says. What was found."""
        code, out, err = run("inspect", checkpoint, "--tensors", "--sha256", "--json", *options)
        self.assertEqual(code, 0, err)
        inspected = json.loads(out)
        records = {(r["name"], r["state"]): (r["dtype"], tuple(r["shape"]), r["sha256"]) for r in inspected["tensors"]}
        report, path = self.view(checkpoint, *options)
        found, source = contents(path)
        self.assertEqual(report["left_out"], source["left_out"])
        self.assertEqual([each["file"] for each in source["files"]], [each["file"] for each in inspected["files"]])
        left_out = {(each["name"], each["state"]): each["reason"] for each in report["left_out"]}
        self.assertEqual({key: records[key] for key in found}, found, checkpoint)
        self.assertEqual(set(records) | {(each["name"], "") for each in inspected["unreadable"]},
                         set(found) | set(left_out), checkpoint)
        self.assertEqual(report["tensors"], len(found))
        # The records themselves are the readers' tests' matter; here, that they are the truth's.
        known = {(r["name"], "param" if r["state"] in ONE_CLASS else r["state"], r["sha256"]) for r in truth}
        agree = sum((name, "param" if state in ONE_CLASS else state, sha256) in known
                    for (name, state), (_, _, sha256) in found.items())
        return found, left_out, agree

    def expect_all(self, checkpoint, truth, *options):
        found, left_out, agree = self.expect_view(checkpoint, truth, *options)
        self.assertEqual(agree, len(found), checkpoint)
        return found, left_out

    def test_deepspeed_and_universal_samples(self):
        rounded = 0
        for sample in sorted((DATA / "deepspeed").iterdir()):
            truth = json.loads((sample / "expected.json").read_text())["tensors"]
            found, left_out = self.expect_all(sample / "ckpt", truth)
            self.assertGreater(len(found), 10, sample)
            for reason in left_out.values():  # only the weights that ZeRO-3 does not store
                self.assertIn("made by rounding float32", reason)
            rounded += len(left_out)
        self.assertGreater(rounded, 0)

    def test_dcp_and_fsdp_samples(self):
        boxes = 0
        for sample in sorted((DATA / "sharded").iterdir()):
            truth = json.loads((sample / "expected.json").read_text())
            names = self.place / f"{sample.name}.json"
            names.write_text(json.dumps({"units": truth["layout"].get("units", []),
                                         "parameters": truth["layout"].get("optimizer_index", [])}))
            found, left_out = self.expect_all(sample / "ckpt", truth["tensors"], "--names", names)
            self.assertEqual((left_out, len(found)), ({}, len(truth["tensors"])), sample)
            boxes += self.view(sample / "ckpt", "--names", names)[0]["tensors_in_parts"]
        self.assertGreater(boxes, 0)  # strided shards are no ranges

    def test_torch_samples_with_strides_of_all_kinds(self):
        everything = json.loads((DATA / "torch" / "expected.json").read_text())
        reasons, parts = set(), 0
        for name, truth in everything.items():
            found, left_out = self.expect_all(DATA / "torch" / name, truth)
            self.assertEqual(len(found) + len(left_out), len(truth))
            reasons |= set(left_out.values())
            parts += self.view(DATA / "torch" / name)[0]["tensors_in_parts"]
        self.assertTrue(any("conjugated" in reason for reason in reasons), reasons)
        self.assertGreater(parts, 0)

    @unittest.skipUnless(FIXTURES.is_dir(), f"no {FIXTURES.name} beside this clone")
    def test_every_fixture(self):
        cases = tensors = agreed = 0
        orders, storages = set(), set()
        for family in ("torch", "safetensors", "hf", "dcp", "fsdp", "deepspeed", "ucp"):
            for case in sorted((FIXTURES / family).iterdir()):
                truth = json.loads((case / "expected.json").read_text()).get("tensors", [])
                checkpoints = [case / "ckpt"]
                if family in ("torch", "safetensors"):
                    checkpoints = sorted(path for path in (case / "ckpt").iterdir() if path.is_file())
                for checkpoint in checkpoints:
                    code, _, err = run("view", checkpoint, self.place / "probe.h5")
                    if code != 0:
                        # As inspect refuses it; or verify finds it damaged; or there is nothing that could be shown.
                        inspected = run("inspect", checkpoint)
                        if inspected[0] != 0:
                            self.assertEqual(code, inspected[0], (checkpoint, err))
                        elif code == 4:
                            self.assertEqual(run("verify", checkpoint)[0], 4, (checkpoint, err))
                        else:
                            self.assertEqual((code, "found none:" in err), (1, True), (checkpoint, err))
                        continue
                    (self.place / "probe.h5").unlink()
                    found, _, agree = self.expect_view(checkpoint, truth)
                    cases += 1
                    tensors += len(found)
                    agreed += agree
                    with h5py.File(self.place / f"view{self.count}.h5") as file:
                        for group in file["tensors"].values():
                            for dataset in group.values():
                                kind = dataset.id.get_type()
                                if isinstance(kind, h5py.h5t.TypeFloatID):
                                    orders.add(kind.get_order())
                                storages.add("virtual" if dataset.is_virtual else
                                             "external" if dataset.external else "inside")
        print(f"{cases} checkpoints, {tensors} tensors, {agreed} of them as expected.json names them")
        self.assertGreater(cases, 60)
        self.assertGreater(agreed, 0.8 * tensors)
        self.assertEqual(orders, {h5py.h5t.ORDER_LE, h5py.h5t.ORDER_BE})
        self.assertEqual(storages, {"virtual", "external", "inside"})

    TENSORS = {
        "wte": ("F32", [5, 7], struct.pack("<35f", *range(35))),
        "half": ("BF16", [3], struct.pack("<3H", 0x3F80, 0x4000, 0xC040)),
        "a/b.c %": ("I64", [], struct.pack("<q", -3)),
        "empty": ("F16", [0, 9], b""),
        "bits": ("BOOL", [4], bytes([0, 1, 1, 0])),
    }

    def write(self, path, tensors=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(safetensors(tensors or self.TENSORS))
        return path

    def test_its_users_see_numbers_and_no_byte_is_copied(self):
        file = self.write(self.place / "model.safetensors")
        before = file.read_bytes()
        report, path = self.view(file)
        self.assertEqual((report["tensors"], report["copied_bytes"], report["left_out"], report["format"]),
                         (5, 0, [], "safetensors"))
        with h5py.File(path) as view:
            group = view["tensors/tensor"]
            self.assertEqual(group["wte"][1:3, 2].tolist(), [9.0, 16.0])
            self.assertEqual(group["half"][:].tolist(), [1.0, 2.0, -3.0])
            self.assertEqual(group["a%2Fb%2Ec %25"][()], -3)
            self.assertEqual(group["bits"][:].tolist(), [False, True, True, False])
            self.assertEqual(group["empty"].shape, (0, 9))
            name, offset, size = group["wte"].external[0]
            self.assertEqual((text(name), size), (str(file), 140))
            self.assertEqual(before[offset:offset + size], self.TENSORS["wte"][2])
            self.assertEqual({key: text(value) for key, value in view.attrs.items()}, {
                "holdfast_view": "1", "source": str(file), "format": "safetensors",
                "writer": text(view.attrs["writer"])})
        self.assertEqual(file.read_bytes(), before)
        # Not a copy: what is written to the original afterwards is what is read.
        changed = before.replace(struct.pack("<f", 34.0), struct.pack("<f", 35.0))
        file.write_bytes(changed)
        with h5py.File(path) as view:
            self.assertEqual(view["tensors/tensor/wte"][4, 6], 35.0)

    def test_h5dump_reads_the_same(self):
        file = self.write(self.place / "model.safetensors")
        _, path = self.view(file)
        out = self.place / "out"
        subprocess.run(["h5dump", "-d", "/tensors/tensor/wte", "-b", "LE", "-o", out, path], check=True,
                       capture_output=True)
        self.assertEqual(out.read_bytes(), self.TENSORS["wte"][2])

    READ = "import h5py, sys; print(h5py.File(sys.argv[1])['tensors/tensor/wte'][4, 6])"

    def read(self, view, **variables):
        done = subprocess.run([sys.executable, "-c", self.READ, view], cwd="/", capture_output=True, text=True,
                              check=False, env={**os.environ, **variables})
        return done.returncode, done.stdout, done.stderr

    def test_a_relative_view_moves_with_its_checkpoint_and_an_absolute_one_without(self):
        for inside in ("beside", "ckpt"):  # of the folder, or in it
            file = self.write(self.place / inside / "here" / "ckpt" / "model.safetensors")
            at = file.parent if inside == "ckpt" else file.parent.parent
            _, relative = self.view(file, "--relative", at=at / "relative.h5")
            _, absolute = self.view(file, at=at / "absolute.h5")
            alone = self.place / inside / "alone.h5"
            shutil.copy(absolute, alone)
            self.assertEqual(self.read(alone)[:2], (0, "34.0\n"))
            self.assertEqual(self.read(relative, HDF5_EXTFILE_PREFIX="${ORIGIN}")[:2], (0, "34.0\n"))
            code, out, err = self.read(relative)
            self.assertEqual((code != 0, out), (True, ""))
            self.assertIn("external raw data file", err)
            (self.place / inside / "here").rename(self.place / inside / "there")
            moved = self.place / inside / "there" / relative.relative_to(self.place / inside / "here")
            self.assertEqual(self.read(moved, HDF5_EXTFILE_PREFIX="${ORIGIN}")[:2], (0, "34.0\n"))
            self.assertNotEqual(self.read(alone)[0], 0)  # gone is an error, never a fill
            original = self.place / inside / "there" / "ckpt" / file.name
            self.assertIn("HDF5_EXTFILE_PREFIX", run("view", original, moved.parent / "again.h5", "--relative")[1])

    def test_a_folder_of_shards_is_one_view_and_a_missing_shard_is_named(self):
        folder = self.place / "hf"
        shards = {"model-1.safetensors": ["wte", "half"], "model-2.safetensors": ["a/b.c %", "empty", "bits"]}
        for shard, names in shards.items():
            self.write(folder / shard, {name: self.TENSORS[name] for name in names})
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        truth = [{"name": name, "state": "param", "sha256": hashlib.sha256(content).hexdigest()}
                 for name, (_, _, content) in self.TENSORS.items()]
        found, left_out = self.expect_all(folder, truth)
        self.assertEqual((len(found), left_out), (5, {}))
        (folder / "model-2.safetensors").unlink()
        report, _ = self.view(folder)
        self.assertEqual(report["tensors"], 2)
        self.assertTrue(any("model-2.safetensors" in loss for loss in report["losses"]), report)

    def test_what_cannot_be_is_refused_and_leaves_no_file(self):
        good = self.write(self.place / "model.safetensors")
        six = self.write(self.place / "six.safetensors", {"six": ("F6_E2M3", [4], b"abc")})
        broken = self.place / "broken.safetensors"
        broken.write_bytes(good.read_bytes()[:-1])
        taken = self.place / "taken.h5"
        taken.write_bytes(b"mine")
        nobody = self.place / "nobody.txt"
        nobody.write_text("no checkpoint\n")
        before = sorted(path.name for path in self.place.iterdir())
        for code, part, arguments in ((1, "taken.h5 exists", (good, taken)),
                                      (1, "six is of dtype F6_E2M3", (six, self.place / "view.h5")),
                                      (4, "broken.safetensors", (broken, self.place / "view.h5")),
                                      (5, "expected a checkpoint", (nobody, self.place / "view.h5")),
                                      (5, "nowhere", (self.place / "nowhere", self.place / "view.h5")),
                                      (2, "name of a new file", (good, f"{self.place}/")),
                                      (5, "directory of", (good, self.place / "nowhere" / "view.h5"))):
            found, out, err = run("view", *arguments)
            self.assertEqual((found, out), (code, ""), err)
            self.assertIn(part, err)
        self.assertEqual(sorted(path.name for path in self.place.iterdir()), before)
        self.assertEqual(taken.read_bytes(), b"mine")

    def test_force_replaces_a_file_and_nothing_of_the_checkpoint(self):
        good = self.write(self.place / "model.safetensors")
        folder = self.place / "folder"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        self.write(folder / "model.safetensors")
        taken = self.place / "taken.h5"
        taken.write_bytes(b"mine")
        for checkpoint in (good, folder, good):
            self.assertGreater(self.view(checkpoint, "--force", at=taken)[0]["tensors"], 0)
        held = good.read_bytes()
        for checkpoint, out, part in ((good, good, "is the checkpoint"),
                                      (folder, folder / "model.safetensors", "is in the checkpoint"),
                                      (folder, folder / "view.h5", "is in the checkpoint")):
            code, _, err = run("view", checkpoint, out, "--force")
            self.assertEqual(code, 1, err)
            self.assertIn(part, err)
        self.assertEqual((good.read_bytes(), (folder / "model.safetensors").read_bytes()), (held, held))


if __name__ == "__main__":
    unittest.main(argv=sys.argv)
