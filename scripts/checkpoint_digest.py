"""Reads a checkpoint's images with stock h5py, knowing nothing of Holdfast's code, and computes the
digests that tiny_lm prints of what it has restored (examples/tiny_lm/state.h, DigestOf), and its blobs;
and the same digests of a view."""

import collections
import json

import h5py
import numpy

CHUNK_ELEMENTS = 1 << 22


def mix(x):
    """SplitMix64's finaliser over an array of uint64."""
    x = x + numpy.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return x ^ (x >> numpy.uint64(31))


def box_index(local, lo, size, shape):
    """Indices in a tensor of this shape of the elements `local` of a box of it."""
    coordinates = numpy.unravel_index(local, size)
    moved = [axis + numpy.intp(first) for axis, first in zip(coordinates, lo)]
    return numpy.ravel_multi_index(moved, shape).astype(numpy.uint64)


def piece_digest(path, offset, count, element_bytes, begin, box=None):
    """Of `count` elements at `offset` of the file, the first of which is element `begin`: of the tensor,
    or of `box`, (first elements, extents, the tensor's shape)."""
    if count == 0:
        return 0
    kind = numpy.dtype(f"<u{element_bytes}")
    data = numpy.memmap(path, dtype=kind, mode="r", offset=offset, shape=(count,))
    total = 0
    with numpy.errstate(over="ignore"):
        for at in range(0, count, CHUNK_ELEMENTS):
            bits = data[at:at + CHUNK_ELEMENTS].astype(numpy.uint64)
            index = numpy.arange(begin + at, begin + at + len(bits), dtype=numpy.uint64)
            if box:
                index = box_index(index.astype(numpy.intp), *box)
            total += int(numpy.sum(mix(mix(index) + bits), dtype=numpy.uint64))
    return total % 2**64


def checkpoint_digests(directory):
    """(tensor, state) -> (digest of the whole tensor, elements) from all images of the manifest."""
    manifest = json.loads((directory / "MANIFEST.json").read_text(encoding="utf-8"))
    digests = collections.defaultdict(int)
    elements = collections.defaultdict(int)
    for image in manifest["images"]:
        path = directory / image["file"]
        with h5py.File(path, "r") as file:
            for group in file["tensors"].values():
                state = group.attrs["name"]
                for dataset in group.values():
                    begin, end = (int(value) for value in dataset.attrs["range"])
                    box = None
                    if "box_lo" in dataset.attrs:
                        box = [tuple(int(value) for value in dataset.attrs[name])
                               for name in ("box_lo", "box_size", "shape")]
                    key = (text(dataset.attrs["name"]), text(state))
                    elements[key] += end - begin
                    digests[key] += piece_digest(path, dataset.id.get_offset() or 0, end - begin,
                                                 dataset.id.get_type().get_size(), begin, box)
    return {key: (digests[key] % 2**64, elements[key]) for key in digests}


def view_digests(path):
    """The same from a view of the checkpoint, in which every tensor is whole."""
    digests = {}
    with h5py.File(path, "r") as file:
        for group in file["tensors"].values():
            for dataset in group.values():
                kind = numpy.dtype(f"<u{dataset.id.get_type().get_size()}")
                data = numpy.ravel(whole_bits(dataset, kind)).astype(numpy.uint64)
                with numpy.errstate(over="ignore"):
                    index = numpy.arange(len(data), dtype=numpy.uint64)
                    total = int(numpy.sum(mix(mix(index) + data), dtype=numpy.uint64)) % 2**64
                digests[text(dataset.attrs["name"]), text(group.attrs["name"])] = total, len(data)
    return digests


def whole_bits(dataset, kind):
    """All elements of a dataset, its own type's bits as unsigned integers."""
    out = numpy.empty(dataset.shape, dtype=kind)
    dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, out, dataset.id.get_type())
    return out


def checkpoint_blobs(directory):
    """Numbers of 8 bytes that are no tensors: {name: value} of the job, {name: {rank: value}} of ranks.
    Blobs of another length are left out."""
    manifest = json.loads((directory / "MANIFEST.json").read_text(encoding="utf-8"))
    job, ranks = {}, collections.defaultdict(dict)
    for image in manifest["images"]:
        with h5py.File(directory / image["file"], "r") as file:
            rank = int(file.attrs["rank"])
            for scope in file.get("blobs", {}):
                for dataset in file["blobs"][scope].values():
                    if int(dataset.attrs["bytes"]) != 8:
                        continue
                    value = int.from_bytes(bytes(dataset[:8]), "little")
                    name = text(dataset.attrs["name"])
                    if scope == "global":
                        job[name] = value
                    else:
                        ranks[name][rank] = value
    return job, dict(ranks)


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def restored_digests(lines):
    """The same out of the lines ("restore_digest") of all ranks of one attempt."""
    copies = collections.defaultdict(lambda: [0, 0])
    for line in lines:
        for piece in line["pieces"]:
            copy = copies[piece["tensor"], piece["state"], piece["replica"]]
            copy[0] = (copy[0] + int(piece["digest"], 16)) % 2**64
            copy[1] += piece["count"]
    whole = {}
    for (tensor, state, replica), found in copies.items():
        if whole.setdefault((tensor, state), tuple(found)) != tuple(found):
            raise ValueError(f"copy {replica} of {tensor} {state} differs")
    return whole
