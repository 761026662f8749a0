"""What the tests of the command share: running it, and checkpoints changed by hand (docs/FORMAT.md)."""

import itertools
import math
import os
import pathlib
import re
import struct
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "format"))
import fingerprint_reference  # noqa: E402  (the path comes first)


class Command:
    """Runs `holdfast` with some arguments: (exit code, standard output, standard error)."""

    def __init__(self, path):
        self.path = path

    def __call__(self, *arguments, before=None, **variables):
        environment = {key: value for key, value in os.environ.items() if key != "HOLDFAST_SOCKET"}
        result = subprocess.run([self.path, *map(str, arguments)], capture_output=True, text=True,
                                check=False, timeout=60, env=environment | variables, preexec_fn=before)
        return result.returncode, result.stdout, result.stderr


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def tensor_bytes(checkpoint, tensor):
    """All bytes of a tensor that `inspect --tensors --json` lists, put together from its pieces."""
    element_bytes = fingerprint_reference.DTYPES[tensor["dtype"]][1]
    shape = tensor["shape"]
    whole = bytearray(math.prod(shape) * element_bytes)
    for piece in tensor["pieces"]:
        data = (checkpoint / piece["file"]).read_bytes()[piece["offset"]:]
        lo = piece.get("box_lo", [0] * len(shape))
        size = piece.get("box_size", shape)
        places = itertools.product(*(range(a, a + n) for a, n in zip(lo, size)))
        for number, place in enumerate(itertools.islice(places, piece["begin"], piece["end"])):
            element = 0
            for x, extent in zip(place, shape):
                element = element * extent + x
            whole[element * element_bytes:(element + 1) * element_bytes] = \
                data[number * element_bytes:(number + 1) * element_bytes]
    return bytes(whole)


def write_fingerprints(checkpoint, fingerprints):
    """Puts them into INDEX, one per tensor state, and seals INDEX and the manifest anew (docs/FORMAT.md)."""
    index = bytearray((checkpoint / "INDEX").read_bytes())
    _, record_bytes, offset, count = struct.unpack_from("<IIQQ", index, 64 + 5 * 24)
    assert (record_bytes, count) == (80, len(fingerprints))
    for i, fingerprint in enumerate(fingerprints):
        at = offset + 80 * i
        index[at + 45] |= 1
        index[at + 46] = 1
        index[at + 48:at + 64] = fingerprint.to_bytes(16, "little")
    crc = crc32c(index[:-8])
    index[-8:] = struct.pack("<II", crc, crc ^ 0xffffffff)
    (checkpoint / "INDEX").write_bytes(index)
    manifest = (checkpoint / "MANIFEST.json").read_text()
    manifest = re.sub(r'("index": \{"bytes": \d+, "crc32c": ")\w+', rf"\g<1>{crc32c(index):08x}", manifest)
    body = manifest[:-22]
    (checkpoint / "MANIFEST.json").write_text(f'{body}"crc32c": "{crc32c(body.encode()):08x}"}}\n')
