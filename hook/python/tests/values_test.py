#!/usr/bin/python3
"""holdfast/values.py: what comes back is what was given, and bytes that it does not make are
refused."""
import collections
import json
import math
import os
import random
import struct
import unittest

from holdfast import DataLoss, InvalidArgument, values

EXAMPLES = [
    None, True, False, 0, -1, 2**200, 0.0, -0.0, 0.1, 1e308, 5e-324, math.inf, -math.inf, "", "a",
    "ü\0\n", b"", b"\x00\xff", [], [[]], (), ((),), [()], {}, {"a": 1}, {"!": 1},
    {"!": "tuple", "items": []},
    {1: 2, "1": 3, 1.5: None, (1, "x"): [b"y"]}, {True: 1}, {"betas": (0.9, 0.999), "lr": 1e-3},
]


def identical(a, b):
    """Equal in value, type and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (a != a and b != b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(identical(x, y) and identical(a[x], b[y])
                                        for x, y in zip(a, b))
    return a == b


class Unpicklable:
    def __reduce__(self):
        raise AssertionError("pickled")


def random_value(rng, depth):
    kind = rng.randrange(10 if depth > 0 else 7)
    if kind < 2:
        return rng.choice([None, True, False])
    if kind == 2:
        return rng.randrange(-2**70, 2**70)
    if kind == 3:
        return struct.unpack("d", rng.randbytes(8))[0]
    if kind < 6:
        return "".join(map(chr, (rng.randrange(0xD800) for _ in range(rng.randrange(4)))))
    if kind == 6:
        return rng.randbytes(rng.randrange(4))
    items = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return items
    if kind == 8:
        return tuple(items)
    keys = ["!", "a", 1, 2.5, b"k", (1, None), None, "b"]
    return dict(zip(rng.sample(keys, len(items)), items))


class ValuesTest(unittest.TestCase):
    def round_trip(self, value):
        data = values.encode(value)
        json.loads(data, parse_constant=self.fail)  # strict JSON
        back = values.decode(data)
        self.assertTrue(identical(value, back), f"{value!r} came back as {back!r}")

    def test_what_comes_back_is_what_was_given(self):
        for value in EXAMPLES:
            with self.subTest(value=value):
                self.round_trip(value)
        self.assertTrue(math.isnan(values.decode(values.encode(math.nan))))

    def test_random_values_come_back(self):
        seed = int(os.environ.get("SEED", random.randrange(2**32)))
        print(f"seed {seed}")
        rng = random.Random(seed)
        for _ in range(3000):
            self.round_trip(random_value(rng, 3))

    def test_subclasses_come_back_as_their_base(self):
        counter = collections.Counter({30: 1})
        self.assertTrue(identical(values.decode(values.encode(counter)), {30: 1}))

    def test_anything_else_is_refused_with_its_path(self):
        loop = []
        loop.append(loop)
        for value, expected in (({"a": [1, {"b": Unpicklable()}]}, "state.a[1].b"),
                                ({1: {2: object()}}, "state[1][2]"), ({frozenset(): 1}, "key"),
                                (loop, "deeper"), (10**5000, "state"), (1j, "complex")):
            with self.subTest(expected=expected), self.assertRaises(InvalidArgument) as caught:
                values.encode(value, "state")
            self.assertIn(expected, str(caught.exception))

    def test_other_bytes_are_refused(self):
        deep = b"[" * 100_000 + b"]" * 100_000
        for data in (b"", b"{", b"\xff", b"NaN", b"[Infinity]", b'{"!":"code"}', b'{"!":"tuple"}',
                     b'{"!":"tuple","items":3}', b'{"!":"bytes","base64":"*"}', deep,
                     b'{"!":"dict","items":[[[],1]]}', b'{"!":"dict","items":[1]}', b'{"!":[]}',
                     b'{"!":"float","text":"__import__"}', b"[" * 70 + b"]" * 70):
            with self.subTest(data=data[:40]), self.assertRaises(DataLoss) as caught:
                values.decode(data, "blob 'state'")
            self.assertIn("blob 'state'", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
