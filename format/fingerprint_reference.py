"""Fingerprints in plain Python, written from docs/FORMAT.md, section 4, and sharing nothing with the C++
code: the second opinion of its tests, and a model for whoever writes another reader."""

import functools
import struct

P = 2**127 - 1
KEY = b"holdfast fingerprint function 01"
BLOCK_WORDS = 1024
# Number and bytes of an element.
DTYPES = {
    "bool": (1, 1), "uint8": (2, 1), "int8": (3, 1), "uint16": (4, 2), "int16": (5, 2), "uint32": (6, 4),
    "int32": (7, 4), "uint64": (8, 8), "int64": (9, 8), "float16": (10, 2), "bfloat16": (11, 2),
    "float32": (12, 4), "float64": (13, 8), "float8_e4m3fn": (14, 1), "float8_e5m2": (15, 1),
    "float8_e4m3fnuz": (16, 1), "float8_e5m2fnuz": (17, 1), "float8_e8m0fnu": (18, 1), "float4_e2m1fn_x2": (19, 1),
    "complex32": (20, 4), "complex64": (21, 8), "complex128": (22, 16), "bits8": (23, 1), "bits16": (24, 2),
    "bits1x8": (25, 1), "bits2x4": (26, 1), "bits4x2": (27, 1),
}


def chacha20_block(key, counter, nonce):
    """RFC 8439, section 2.3."""
    state = (list(struct.unpack("<4I", b"expand 32-byte k")) + list(struct.unpack("<8I", key)) + [counter]
             + list(struct.unpack("<3I", nonce)))
    x = list(state)

    def rotate(value, bits):
        return (value << bits | value >> (32 - bits)) % 2**32

    def quarter_round(a, b, c, d):
        for p, q, r, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) % 2**32
            x[r] = rotate(x[r] ^ x[p], bits)

    for _ in range(10):
        for i in range(4):
            quarter_round(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter_round(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return struct.pack("<16I", *((a + b) % 2**32 for a, b in zip(x, state)))


@functools.lru_cache(maxsize=4096)
def key_stream(purpose, block):
    return chacha20_block(KEY, block % 2**32, struct.pack("<3I", block >> 32, purpose, 0))


def value(purpose, i):
    """V(purpose, i): 16 bytes of the key stream as a number."""
    return int.from_bytes(key_stream(purpose, i // 4)[16 * (i % 4):16 * (i % 4) + 16], "little")


@functools.lru_cache(maxsize=BLOCK_WORDS)
def inner(j):
    return tuple(value(0, j) >> 32 * k & 0xffffffff for k in range(4))


def coefficient(word):
    """K(w)."""
    block, j = divmod(word, BLOCK_WORDS)
    return sum(t * value(1, 4 * block + k) for k, t in enumerate(inner(j))) % P


def shape_term(dtype, shape):
    numbers = [DTYPES[dtype][0] + 256 * len(shape)]
    for size in shape:
        numbers += [size % 2**32, size >> 32]
    return sum(number * value(2, i) for i, number in enumerate(numbers)) % P


def elements_term(dtype, first_element, data):
    """The sum of the terms of consecutive elements, of which `data` are the bytes."""
    position = first_element * DTYPES[dtype][1]
    lead = position % 4
    data = bytes(lead) + data
    data += bytes(-len(data) % 4)
    words = struct.unpack(f"<{len(data) // 4}I", data)
    return sum(x * coefficient(position // 4 + n) for n, x in enumerate(words) if x) % P


def fingerprint(dtype, shape, data):
    return (shape_term(dtype, shape) + elements_term(dtype, 0, data)) % P
