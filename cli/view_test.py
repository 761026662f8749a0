#!/usr/bin/python3
"""`holdfast view` as users of stock h5py and h5dump meet it.

The oracle reads the images themselves: names and ranges from their attributes, bytes from their offsets,
put together by index arithmetic, with nothing of Holdfast in between.
Usage: view_test.py HOLDFAST GOLDEN_ROOT MAKE_CHECKPOINT LAUNCH TINY_LM HOLDFASTD CORPUS"""

import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import unittest

import h5py
import numpy as np

from checkpoint_files import Command

HOLDFAST, GOLDEN, MAKE_CHECKPOINT = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
PROGRAMS = sys.argv[4:8]
sys.path.insert(0, str(pathlib.Path(PROGRAMS[0]).parent / "tiny_lm"))
import runs  # noqa: E402  (the path comes first)

run = Command(HOLDFAST)
FLOAT32_NAN, FILES_MAX = np.float32(np.nan), 256


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def raw(dataset):
    """The bytes of a dataset's elements as its file has them: no conversion to a numpy type."""
    out = np.zeros((math.prod(dataset.shape), dataset.id.get_type().get_size()), np.uint8)
    if out.size:
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, out, mtype=dataset.id.get_type())
    return out


def elements_of(dataset):
    """Numbers, in the whole tensor, of the elements of an image's dataset, in its order."""
    shape = [int(x) for x in dataset.attrs["shape"]]
    begin, end = (int(x) for x in dataset.attrs["range"])
    numbers = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    if "box_lo" in dataset.attrs:
        numbers = numbers[tuple(slice(int(lo), int(lo) + int(size)) for lo, size in
                                zip(dataset.attrs["box_lo"], dataset.attrs["box_size"]))]
    return numbers.reshape(-1)[begin:end]


class Images:
    """All tensors of a checkpoint, out of its images: (state, tensor) -> bytes, shape, dtype, HDF5 type."""

    def __init__(self, checkpoint):
        self.tensors = {}
        self.files = {}  # (state, tensor) -> names of images
        for path in sorted(checkpoint.glob("rank-*.h5")):
            data = np.fromfile(path, np.uint8)
            with h5py.File(path) as image:
                for group in image["tensors"].values():
                    for dataset in group.values():
                        self.add(text(group.attrs["name"]), dataset, data, path.name)

    def add(self, state, dataset, data, file):
        key = state, text(dataset.attrs["name"])
        shape = tuple(int(x) for x in dataset.attrs["shape"])
        size = dataset.id.get_type().get_size()
        whole = self.tensors.setdefault(key, (np.zeros((math.prod(shape), size), np.uint8), shape,
                                              text(dataset.attrs["dtype"]), dataset.id.get_type().copy()))[0]
        elements = elements_of(dataset)
        offset = dataset.id.get_offset()
        whole[elements] = data[offset:offset + elements.size * size].reshape(-1, size)
        self.files.setdefault(key, set()).add(file)


def escaped(name):
    return "".join(f"%{ord(c):02X}" if c in "/.%" or ord(c) < 32 or ord(c) == 127 else c for c in name)


def made(directory, layout, step=7):
    """A checkpoint of this layout in directory/job."""
    document = directory / "layout.json"
    document.write_text(json.dumps(layout))
    subprocess.run([MAKE_CHECKPOINT, document, directory / "job", str(step)], check=True)
    return next((directory / "job").glob(f"s{step:012d}.a*"))


SCHEMA = json.loads((pathlib.Path(__file__).resolve().parents[1] / "docs" / "layout.schema.json").read_text())
DTYPES = SCHEMA["$defs"]["state"]["properties"]["dtype"]["enum"]


def shard(dim, axis="dp", rule="ceil"):
    return [{"op": "shard", "dim": dim, "axis": axis, "rule": rule}]


def state(name, dtype, place=None, **more):
    return {"state": name, "dtype": dtype, **({"place": place} if place else {}), **more}


def layout(tensors, mesh, **more):
    return {"holdfast_layout": 1, "mesh": [{"axis": axis, "size": size} for axis, size in mesh], **more,
            "tensors": [{"name": name, "shape": shape, "states": states} for name, shape, states in tensors]}


# Every form of a piece: ranges of a tensor and of a box that are up to 2 * dims - 1 boxes, boxes, several
# pieces of one state on a rank, nothing, tied tensors; every dtype; names that HDF5 or its views would
# understand.
TANGLED = layout(
    [("a/b", [5, 7, 3], [state("param", "float32", shard(1, "tp")),
                         state("exp.avg", "float32", shard(1, "tp") + [{"op": "pack", "pack": "m"}])]),
     ("a", [7, 5, 3], [state("param", "bfloat16", [{"op": "flat", "axis": "dp", "rule": "ceil"}])]),
     ("a%b", [11], [state("param", "int64", shard(0))]),
     ("a%2Fb.c", [2, 2, 5, 5], [state("param", "float16", shard(3, "tp") + [
         {"op": "flat", "axis": "dp", "rule": "balanced"}])]),
     ("w13", [8, 6], [state("param", "float64", [{"op": "view", "shape": [2, 4, 6]}] + shard(1, "tp", "even"))]),
     ("w31", [8, 6], [state("param", "float32", [{"op": "view", "shape": [2, 4, 6]}] + shard(1, "tp", "even") + [
         {"op": "flat", "axis": "dp", "rule": "ceil"}])]),
     ("scalar", [], [state("param", "float32")]), ("step", [], [state("param", "uint64")]),
     ("none", [0, 3], [state("param", "float32", shard(0))]), ("none2", [4, 0], [state("param", "bool")]),
     ("wte", [9, 4], [state("param", "float32", shard(0, "tp"), buffer="shared")]),
     ("head", [9, 4], [state("param", "float32", shard(0, "tp"), buffer="shared")])] +
    [(f"of {dtype}", [6, 5], [state("other", dtype, shard(1, "tp") + [
        {"op": "flat", "axis": "dp", "rule": "ceil"}])])
     for dtype in DTYPES],
    [("tp", 2), ("dp", 3)], packs=[{"pack": "m", "axis": "dp", "buffer": "m"}])


def cut_over(ranks, dtype="float32", rows=2):
    return layout([("w", [rows * ranks, 3], [state("param", dtype, shard(0))]),
                   ("b", [rows * ranks], [state("param", "int32", shard(0))])], [("dp", ranks)])


class ViewTest(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.place = pathlib.Path(self.temporary.name).resolve()

    def tearDown(self):
        self.temporary.cleanup()

    def view(self, checkpoint, *arguments, at=None):
        path = at or self.place / "view.h5"
        code, out, error = run("view", checkpoint, path, *arguments)
        self.assertEqual(code, 0, error)
        self.assertIn("tensors", out)
        self.assertEqual([p.name for p in path.parent.iterdir() if "partial" in p.name], [])
        return path

    def expect_whole(self, view, images, missing=()):
        """Every tensor of the images is in the view, whole, and nothing else but `missing`: empty ones."""
        found = {}
        with h5py.File(view) as file:
            for group_name, group in file["tensors"].items():
                for name, dataset in group.items():
                    key = text(dataset.attrs["state"]), text(dataset.attrs["name"])
                    self.assertEqual((group_name, name), tuple(map(escaped, key)))
                    self.assertEqual(text(group.attrs["name"]), key[0])
                    found[key] = dataset.shape
                    self.assertEqual(list(dataset.attrs["shape"]), list(dataset.shape))
                    if key in missing:
                        self.assertEqual(math.prod(dataset.shape), 0)
                        self.assertEqual(dataset.attrs["source_files"], 0)
                        dataset[()]
                        continue
                    bytes_, shape, dtype, of_type = images.tensors[key]
                    self.assertEqual(dataset.shape, shape)
                    self.assertEqual(text(dataset.attrs["dtype"]), dtype)
                    self.assertTrue(dataset.id.get_type().equal(of_type), key)
                    self.assertEqual(dataset.attrs["source_files"], len(images.files[key]))
                    self.assertTrue(dataset.is_virtual)
                    np.testing.assert_array_equal(raw(dataset), bytes_, str(key))
        self.assertEqual(set(found), set(images.tensors) | set(missing))
        return found

    def test_every_tensor_of_the_golden_checkpoint_is_whole(self):
        shutil.copytree(GOLDEN, self.place / "root")
        checkpoint = next((self.place / "root" / "golden.job-1").glob("s*.a*"))
        found = self.expect_whole(self.view(checkpoint), Images(checkpoint), missing={("param", "empty")})
        self.assertEqual(found["param", "scale"], ())
        with h5py.File(self.place / "view.h5") as file:
            self.assertEqual({key: text(value) for key, value in file.attrs.items()}, {
                "holdfast_view": "1", "job": "golden.job-1", "step": "42", "attempt": "3", "world_size": "2",
                "job_uuid": "c0ffee00-1234-4abc-8def-0123456789ab", "directory": str(checkpoint),
                "writer": text(file.attrs["writer"])})
            # As its users see it: numpy types, and a name with a slash and dots.
            self.assertEqual(file["tensors/param/mask"][()].tolist(), [False, True, False, True, False])
            self.assertEqual(file["tensors/param/h%2E0%2Eattn"][1:3, 2:].shape, (2, 2))

    def test_every_form_of_a_piece_is_whole(self):
        checkpoint = made(self.place, TANGLED)
        images = Images(checkpoint)
        view = self.view(checkpoint.parent)  # by the job: its newest
        self.expect_whole(view, images, missing={("param", "none"), ("param", "none2")})
        with h5py.File(view) as file:
            # Not vacuous: ranges that are no boxes, and of boxes too.
            mappings = {name: len(file["tensors/param"][name].virtual_sources())
                        for name in ("a", "a%2Fb", "a%252Fb%2Ec")}
            self.assertGreater(mappings["a"], 2 * 3)
            self.assertIn("/tensors/param/w31.g1", [source.dset_name for source in
                                                    file["tensors/param/w31"].virtual_sources()])
            self.assertGreater(mappings["a%252Fb%2Ec"], 2 * 2 * 3)
            self.assertEqual(file["tensors/param/a%2Fb"][4, 6, 2], 5 * 7 * 3 - 1)

    def test_what_a_tensor_parallel_zero_3_training_saved_is_whole(self):
        training = runs.Run(PROGRAMS, str(self.place), "run", 4, "--layers", "1", "--batch", "4", "--tp", "2",
                            "--zero", "3", "--tied", "--steps", "1", "--save-every", "1", HOLDFAST_LINGER="0s")
        status, errors = training.finish()
        self.assertEqual(status, 0, errors)
        job = self.place / "root" / "test"
        images = Images(next(job.glob("s*.a*")))
        self.assertGreater(len(images.tensors), 20)
        self.assertTrue(any(len(files) > 1 for files in images.files.values()))
        self.expect_whole(self.view(job), images)

    def test_h5dump_reads_the_same_bytes(self):
        checkpoint = made(self.place, TANGLED)
        images = Images(checkpoint)
        view = self.view(checkpoint)
        result = subprocess.run(["h5dump", "-H", view], capture_output=True, text=True, check=True)
        self.assertEqual(result.stderr, "")
        for state_name, tensor in (("param", "a/b"), ("exp.avg", "a/b"), ("param", "a%b"), ("param", "a"),
                                   ("param", "step"), ("param", "w13")):
            out = self.place / "out"
            subprocess.run(["h5dump", "-d", f"/tensors/{escaped(state_name)}/{escaped(tensor)}", "-b", "FILE",
                            "-o", out, view], check=True, capture_output=True)
            self.assertEqual(out.read_bytes(), images.tensors[state_name, tensor][0].tobytes(), tensor)

    def test_a_relative_view_moves_with_its_checkpoint_and_an_absolute_one_without(self):
        for inside in (".", "job", "job/s000000000007.a0001", "elsewhere/deep"):
            place = self.place / inside.replace("/", "-")
            (place / "here" / inside).mkdir(parents=True)
            checkpoint = made(place / "here", TANGLED)
            images = Images(checkpoint)
            empty = {("param", "none"), ("param", "none2")}
            relative = self.view(checkpoint, "--relative", at=place / "here" / inside / "relative.h5")
            absolute = self.view(checkpoint, at=place / "here" / inside / "absolute.h5")
            self.expect_whole(relative, images, empty)
            alone = (place / "alone.h5").resolve()
            shutil.copy(absolute, alone)
            self.expect_whole(alone, images, empty)
            (place / "here").rename(place / "there")
            self.expect_whole(place / "there" / inside / "relative.h5", images, empty)
            with h5py.File(alone) as file:
                self.assertTrue(np.isnan(file["tensors/param/a%2Fb"][()]).all())

    def test_what_is_missing_reads_as_nan_and_never_as_zeros(self):
        checkpoint = made(self.place, TANGLED)
        images = Images(checkpoint)
        view = self.view(checkpoint)
        lost = checkpoint / "rank-00003.h5"
        with h5py.File(lost) as image:
            lost_elements = {}
            for group in image["tensors"].values():
                for dataset in group.values():
                    key = text(group.attrs["name"]), text(dataset.attrs["name"])
                    lost_elements.setdefault(key, []).append(elements_of(dataset))
        lost.unlink()
        fills = {"bool": 1, "float8_e4m3fn": 0x7f, **{f"uint{n}": 2 ** n - 1 for n in (8, 16, 32, 64)},
                 **{f"int{n}": 2 ** (n - 1) for n in (8, 16, 32, 64)},
                 "float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "complex32": 0x7e007e00, "bits16": 0xffff,
                 **dict.fromkeys(("float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), 0xff)}
        seen = set()
        with h5py.File(view) as file:
            for key, (expected, _, dtype, _) in images.tensors.items():
                dataset = file["tensors"]["/".join(map(escaped, key))]
                gone = np.zeros(len(expected), bool)
                for elements in lost_elements.get(key, []):
                    gone[elements] = True
                found = raw(dataset)
                np.testing.assert_array_equal(found[~gone], expected[~gone], str(key))
                if not gone.any():
                    continue
                seen.add(dtype)
                if dtype in fills:
                    filled = np.frombuffer(fills[dtype].to_bytes(found.shape[1], "little"), np.uint8)
                    np.testing.assert_array_equal(found[gone], np.broadcast_to(filled, found[gone].shape), str(key))
                else:  # bfloat16 and float8_e5m2 too, as h5py converts them
                    values = np.asarray(dataset[()]).reshape(-1).astype(np.complex128)[gone]
                    self.assertTrue(np.isnan(values.real).all(), key)
                    if dtype.startswith("complex"):
                        self.assertTrue(np.isnan(values.imag).all(), key)
        self.assertEqual(seen, set(DTYPES))  # every dtype was hit

    def test_no_other_checkpoint_is_read_in_the_place_of_one_that_is_gone(self):
        """HDF5 looks for the last component of an absolute name in the working directory and beside the view."""
        first = made(self.place, cut_over(2), step=7)
        other = made(self.place, cut_over(2), step=8)
        views = [self.view(first, at=other / "absolute.h5"), self.view(first, "--relative", at=other / "relative.h5"),
                 self.view(first, "--relative", at=first / "inside.h5")]
        shutil.copy(views[2], other / "inside.h5")
        for path in first.glob("rank-*.h5"):
            path.unlink()
        for view in views + [other / "inside.h5"]:
            script = f"import h5py, sys; print(h5py.File('{view}')['tensors/param/w'][()].sum())"
            for place in (other, self.place):
                out = subprocess.run([sys.executable, "-c", script], cwd=place, check=True, capture_output=True,
                                     text=True).stdout
                self.assertEqual(out, "nan\n", view)

    READ = """
import h5py, resource, sys
view, limit, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
with h5py.File(view) as file:
    count = len(file['tensors/param/w'])
    for first in range(0, count, rows):
        sys.stdout.buffer.write(file['tensors/param/w'][first:first + rows].tobytes())
"""

    def read(self, view, descriptors, rows, **variables):
        """Tensor w, so many rows at once, by a process that may open so many files."""
        return subprocess.run([sys.executable, "-c", self.READ, view, str(descriptors), str(rows)],
                              capture_output=True, check=False, env={**os.environ, **variables})

    def test_more_images_than_descriptors_show_as_nan_unless_read_in_slices(self):
        ranks, descriptors = 60, 32  # both below FILES_MAX: no parts
        checkpoint = made(self.place, cut_over(ranks))
        view = self.view(checkpoint)
        expected = Images(checkpoint).tensors["param", "w"][0].tobytes()
        at_once = np.frombuffer(self.read(view, descriptors, 2 * ranks).stdout, np.float32)
        right = np.frombuffer(expected, np.float32)
        self.assertTrue(np.isnan(at_once).any())
        self.assertTrue((np.isnan(at_once) | (at_once == right)).all())
        self.assertEqual(self.read(view, descriptors, 20).stdout, expected)
        self.assertEqual(self.read(view, ranks + 32, 2 * ranks).stdout, expected)

    def test_a_tensor_in_very_many_images_needs_few_descriptors_and_misses_none_silently(self):
        ranks = FILES_MAX + 1
        checkpoint = made(self.place, cut_over(ranks, rows=1))
        images = Images(checkpoint)
        code, out, _ = run("view", checkpoint, self.place / "view.h5", "--json")
        self.assertEqual(code, 0)
        report = json.loads(out)
        self.assertEqual((report["tensors"], report["tensors_in_parts"], report["images_of_one_tensor_max"]),
                         (2, 2, ranks))
        expected = images.tensors["param", "w"][0].tobytes()
        self.assertEqual(self.read(self.place / "view.h5", 16, ranks).stdout, expected)
        self.expect_whole(self.place / "view.h5", images)
        relative = self.view(checkpoint, "--relative", at=self.place / "relative.h5")
        self.assertIn("HDF5_EXTFILE_PREFIX", run("view", checkpoint, self.place / "r2.h5", "--relative")[1])
        self.assertEqual(self.read(relative, 16, ranks, HDF5_EXTFILE_PREFIX="${ORIGIN}").stdout, expected)
        result = self.read(relative, 16, ranks)
        self.assertEqual((result.returncode == 0, result.stdout), (False, b""))
        (checkpoint / "rank-00100.h5").unlink()
        result = self.read(self.place / "view.h5", 16, ranks)
        self.assertEqual((result.returncode == 0, result.stdout), (False, b""))
        self.assertIn(b"external raw data file", result.stderr)

    def test_exactly_as_many_images_as_the_limit_need_no_parts(self):
        checkpoint = made(self.place, cut_over(FILES_MAX, rows=1))
        out = json.loads(run("view", checkpoint, self.place / "view.h5", "--json")[1])
        self.assertEqual((out["tensors_in_parts"], out["images_of_one_tensor_max"]), (0, FILES_MAX))

    def expect_refused(self, code, part, *arguments):
        before = sorted(path.name for path in self.place.iterdir())
        found, out, error = run("view", *arguments)
        self.assertEqual((found, out), (code, ""), error)
        self.assertIn(part, error)
        self.assertEqual(sorted(path.name for path in self.place.iterdir()), before)

    def test_no_file_is_replaced(self):
        checkpoint = made(self.place, cut_over(2))
        view = self.place / "view.h5"
        view.write_bytes(b"mine")
        self.expect_refused(1, "view.h5 exists", checkpoint, view)
        self.assertEqual(view.read_bytes(), b"mine")
        (self.place / "link.h5").symlink_to("nothing")
        self.expect_refused(1, "link.h5 exists", checkpoint, self.place / "link.h5")

    def test_force_replaces_a_file_and_nothing_of_the_checkpoint(self):
        checkpoint = made(self.place, cut_over(2))
        images = Images(checkpoint)
        view = self.place / "view.h5"
        view.write_bytes(b"mine")
        for _ in range(2):
            self.expect_whole(self.view(checkpoint, "--force"), images)
        (self.place / "link.h5").symlink_to("view.h5")
        (self.place / "folder.h5").mkdir()
        for name in ("link.h5", "folder.h5"):
            self.expect_refused(1, "is no file", checkpoint, self.place / name, "--force")
        held = {path.name: path.read_bytes() for path in pathlib.Path(checkpoint).iterdir()}
        for name in [*held, "new.h5"]:
            self.expect_refused(1, "is in the checkpoint", checkpoint, pathlib.Path(checkpoint) / name, "--force")
        self.assertEqual({path.name: path.read_bytes() for path in pathlib.Path(checkpoint).iterdir()}, held)

    def test_an_absolute_view_below_more_directories_than_it_goes_up_is_refused(self):
        checkpoint = made(self.place, cut_over(2))
        images = Images(checkpoint)
        deepest = self.place.resolve()
        deepest = deepest.joinpath(*["d"] * (64 - len(deepest.parts) + 1))
        (deepest / "more").mkdir(parents=True)
        self.expect_whole(self.view(checkpoint, at=deepest / "view.h5"), images)
        self.expect_refused(2, "at most 64 directories", checkpoint, deepest / "more" / "view.h5")
        self.view(checkpoint, "--relative", at=deepest / "more" / "view.h5")

    def test_what_is_damaged_or_not_committed_is_refused(self):
        checkpoint = made(self.place, cut_over(2))
        view = self.place / "view.h5"
        self.expect_refused(5, "directory of", checkpoint, self.place / "nowhere" / "view.h5")
        self.expect_refused(2, "name of a new file", checkpoint, f"{self.place}/")
        image = checkpoint / "rank-00001.h5"
        data = image.read_bytes()
        image.write_bytes(data[:-4096])
        self.expect_refused(4, "rank-00001.h5", checkpoint, view)
        image.unlink()
        self.expect_refused(4, "rank-00001.h5", checkpoint, view)
        image.write_bytes(data)
        index = checkpoint / "INDEX"
        data = bytearray(index.read_bytes())
        data[100] ^= 1
        index.write_bytes(data)
        self.expect_refused(4, "INDEX", checkpoint, view)
        data[100] ^= 1
        index.write_bytes(data)
        manifest = checkpoint / "MANIFEST.json"
        data = manifest.read_bytes()
        manifest.write_bytes(data[:-1])
        self.expect_refused(4, "MANIFEST.json", checkpoint, view)
        manifest.unlink()
        self.expect_refused(5, "not committed", checkpoint, view)
        self.expect_refused(5, "no committed checkpoint", checkpoint.parent, view)
        manifest.write_bytes(data)
        self.view(checkpoint)


if __name__ == "__main__":
    # Hundreds of images are read at once where a test wants them to be.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    unittest.main(argv=sys.argv[:1])
