"""Reads an image with h5py and compares it with what image_test.cc says it wrote.

Usage: image_test_reader.py IMAGE EXPECTED.json

The oracle is independent of libhdf5: raw bytes are read from the file at the offsets that the
template gave, and turned into values by numpy alone.
"""
import json
import sys

import h5py
import numpy as np

NATIVE = {
    "bool": "?", "uint8": "u1", "int8": "i1", "uint16": "<u2", "int16": "<i2", "uint32": "<u4",
    "int32": "<i4", "uint64": "<u8", "int64": "<i8", "float16": "<f2", "float32": "<f4",
    "float64": "<f8", "complex64": "<c8", "complex128": "<c16",
}
OPAQUE = {
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1, "bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1,
    "complex32": 4,
}


def decode(dtype, raw):
    if dtype in NATIVE:
        return np.frombuffer(raw, NATIVE[dtype])
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    if dtype == "float8_e5m2":
        return (np.frombuffer(raw, "u1").astype("<u2") << 8).view("<f2")
    if dtype in OPAQUE:
        return np.frombuffer(raw, f"V{OPAQUE[dtype]}")
    raise SystemExit(f"unknown dtype {dtype}")


def check(what, expected, found):
    if expected != found:
        raise SystemExit(f"{what}: expected {expected!r}, found {found!r}")


def text(value):
    return value.decode("utf-8") if isinstance(value, bytes) else value


def check_dataset(image, raw_file, want):
    path = want["path"]
    dataset = image[path]
    check(path + " shape", want["dataset_shape"], list(dataset.shape))
    for key in ("name", "dtype"):
        check(path + " " + key, want[key], text(dataset.attrs[key]))
    for key in ("shape", "range", "box_lo", "box_size"):
        found = [int(x) for x in dataset.attrs[key]] if key in dataset.attrs else None
        check(path + " " + key, want.get(key), found)
    count = int(np.prod(want["dataset_shape"], dtype=np.uint64))
    if count == 0:
        return
    check(path + " offset", want["offset"], dataset.id.get_offset())
    if want["tail_only"]:
        raw_file.seek(want["offset"] + want["bytes"] - 64)
        expected = decode(want["dtype"], raw_file.read(64))
        found = dataset[-len(expected):]
    else:
        raw_file.seek(want["offset"])
        expected = decode(want["dtype"], raw_file.read(want["bytes"]))
        found = dataset[()]
    expected = expected.reshape(np.shape(found))
    found = np.asarray(found)
    if want["dtype"] in OPAQUE:
        check(path + " class", h5py.h5t.OPAQUE, dataset.id.get_type().get_class())
        check(path + " values", expected.tobytes(), found.tobytes())
        return
    check(path + " numpy dtype", expected.dtype.str, found.dtype.str)
    equal_nan = expected.dtype.kind in "fc"
    if not np.array_equal(expected, found, equal_nan=equal_nan):
        raise SystemExit(f"{path}: values differ: {expected.ravel()[:8]} {found.ravel()[:8]}")


def main():
    with open(sys.argv[2], encoding="utf-8") as file:
        expected = json.load(file)
    count = 0
    with h5py.File(sys.argv[1], "r") as image, open(sys.argv[1], "rb") as raw_file:
        for key, value in expected["attributes"].items():
            found = image.attrs[key]
            check("attribute " + key, value, text(found) if isinstance(value, str) else int(found))
        check("layout", expected["layout"], text(image["/holdfast/layout"][()]))
        for want in expected["datasets"]:
            check_dataset(image, raw_file, want)
            count += 1
        names = []
        image["/tensors"].visititems(
            lambda path, node: names.append(path) if isinstance(node, h5py.Dataset) else None)
        check("datasets under /tensors", count, len(names))
        states = [text(group.attrs["name"]) for group in image["/tensors"].values()]
        check("states", sorted(expected["states"]), sorted(states))
        for want in expected["blobs"]:
            blob = image[want["path"]]
            check(want["path"] + " name", want["name"], text(blob.attrs["name"]))
            saved_by = int(blob.attrs["saved_by"]) if "saved_by" in blob.attrs else None
            check(want["path"] + " saved_by", want["saved_by"], saved_by)
            check(want["path"] + " bytes", want["bytes"], int(blob.attrs["bytes"]))
            check(want["path"] + " capacity", [want["capacity"]], list(blob.shape))
            if want["bytes"] <= want["capacity"]:
                found = bytes(blob[: want["bytes"]]).decode("ascii")
                check(want["path"] + " contents", want["contents"], found)
    print(f"{count} datasets, {len(expected['blobs'])} blobs")


main()
