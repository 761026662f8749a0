#!/usr/bin/python3
"""The test vectors of docs/FORMAT.md, computed a second time by format/fingerprint_reference.py. Usage:
fingerprint_test.py FORMAT.md"""

import math
import pathlib
import re
import sys
import unittest

import fingerprint_reference as reference

PAGE = pathlib.Path(sys.argv[1])


def contents(kind, dtype, shape):
    """(first element, bytes) of what the page says; elements that are zero may be left out."""
    element_bytes = reference.DTYPES[dtype][1]
    elements = math.prod(shape)
    if kind == "zeros":
        return 0, b""
    if kind == "counting":
        return 0, bytes((151 * n + n // 256) % 256 for n in range(elements * element_bytes))
    if kind == "last":
        return elements - 1, (1).to_bytes(element_bytes, "little")
    raise ValueError(kind)


class Fingerprints(unittest.TestCase):
    def test_the_key_stream_is_that_of_rfc_8439(self):
        # Section 2.3.2.
        block = reference.chacha20_block(bytes(range(32)), 1, bytes.fromhex("000000090000004a00000000"))
        self.assertEqual(block.hex(), "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
                                      "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e")

    def test_the_vectors_of_the_page(self):
        page = PAGE.read_text(encoding="utf-8")
        block = re.search(r"^```example fingerprints\n(.*?)^```$", page, re.S | re.M).group(1)
        vectors = re.findall(r"^(\w+) +\[([\d, ]*)\] +(\w+) +([0-9a-f]{32})$", block, re.M)
        self.assertEqual(len(vectors), len(block.splitlines()))
        self.assertGreater(len(vectors), 10)
        for dtype, sizes, kind, expected in vectors:
            shape = [int(size) for size in sizes.split(",") if size]
            first, data = contents(kind, dtype, shape)
            found = (reference.shape_term(dtype, shape) + reference.elements_term(dtype, first, data))
            self.assertEqual(f"{found % reference.P:032x}", expected, (dtype, shape, kind))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
