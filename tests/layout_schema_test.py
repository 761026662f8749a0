#!/usr/bin/python3
"""docs/layout.schema.json accepts every good layout document that there is: the examples of
docs/layout-grammar.md, the seeds and the corpus of the fuzz targets, random ones of the oracle
(which layout_oracle_documents prints; its path is the argument). And it is strict: each of these with
any value replaced by null, or with one more member in any object, is refused, as are some that are
wrong in other ways."""

import copy
import json
import random
import re
import subprocess
import sys
import unittest

import jsonschema

from tree import ROOT

ORACLE_COUNT = 150
ORACLE_SPOILT_COUNT = 15


def validator():
    schema = json.loads((ROOT / "docs" / "layout.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def fenced():
    """The documents and rules of the grammar; what has an ellipsis in it is a summary."""
    text = (ROOT / "docs" / "layout-grammar.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:json)?\n(\{.*?)^```$", text, re.M | re.S)
    return [json.loads(block) for block in blocks if "..." not in block]


def of_seeds():
    text = (ROOT / "tests" / "fuzz" / "seeds.cc").read_text(encoding="utf-8")
    return [json.loads(raw) for raw in re.findall(r'R"\((\{"holdfast_.*?\})\)"', text, re.S)]


def of_corpus():
    return [json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((ROOT / "tests" / "fuzz" / "corpus" / "layout").glob("*.json"))]


def of_oracle(seed):
    output = subprocess.run([sys.argv[1], str(ORACLE_COUNT), str(seed)], check=True,
                            stdout=subprocess.PIPE).stdout
    documents = []
    while output:
        size, _, output = output.partition(b"\n")
        documents.append(json.loads(output[:int(size)]))
        output = output[int(size):]
    return documents


def paths_of(value, path=()):
    """Of all values inside of this one."""
    members = (value.items() if isinstance(value, dict) else
               enumerate(value) if isinstance(value, list) else ())
    for key, member in members:
        yield path + (key,)
        yield from paths_of(member, path + (key,))


def at(document, path):
    for key in path:
        document = document[key]
    return document


class LayoutSchemaTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.validator = validator()
        cls.seed = random.SystemRandom().getrandbits(32)
        print(f"seed {cls.seed}", flush=True)
        cls.written = fenced() + of_seeds()
        cls.oracle = of_oracle(cls.seed)

    def test_good_documents_are_accepted(self):
        corpus = of_corpus()
        self.assertGreaterEqual(len(fenced()), 8)
        self.assertGreaterEqual(len(of_seeds()), 3)
        self.assertGreaterEqual(len(corpus), 1)
        self.assertEqual(len(self.oracle), ORACLE_COUNT)
        self.assertTrue(any("holdfast_layout_rules" in each for each in self.written))
        for document in self.written + corpus + self.oracle:
            error = jsonschema.exceptions.best_match(self.validator.iter_errors(document))
            self.assertIsNone(error, f"seed {self.seed}: {json.dumps(document)[:2000]}: {error}")

    def test_null_and_unknown_members_are_refused_everywhere(self):
        spoilt_count = 0
        for document in self.written + self.oracle[:ORACLE_SPOILT_COUNT]:
            for path in [()] + list(paths_of(document)):
                spoilt = copy.deepcopy(document)
                if path:
                    at(spoilt, path[:-1])[path[-1]] = None
                    self.refuse(spoilt, path)
                    spoilt_count += 1
                spoilt = copy.deepcopy(document)
                if isinstance(at(spoilt, path), dict):
                    # No mesh, placement, stage or list of coordinates either.
                    at(spoilt, path)["no such member"] = {"nor": "this"}
                    self.refuse(spoilt, path)
                    spoilt_count += 1
        print(f"{spoilt_count} refused", flush=True)
        self.assertGreater(spoilt_count, 1000)

    def test_what_is_wrong_in_other_ways_is_refused(self):
        def with_op(op):
            return {"holdfast_layout": 1, "mesh": [{"axis": "a", "size": 2}],
                    "tensors": [{"name": "t", "shape": [4, 2], "states": [
                        {"state": "s", "dtype": "int8", "place": [op]}]}]}

        good = {"op": "shard", "dim": 0, "axis": "a", "rule": "even"}
        self.assertTrue(self.validator.is_valid(with_op(good)))
        for op in [
                {**good, "rule": "odd"}, {**good, "dim": -1}, {**good, "dim": "{layer}"},
                {**good, "axis": []}, {**good, "rule": "sizes"}, {**good, "sizes": [1, 1]},
                {**good, "grain": 0}, {**good, "blocks": []},
                {**good, "rule": "sizes", "sizes": [2, 2], "grain": 2},
                {**good, "rule": "sizes", "sizes": [2, 2], "blocks": [4]},
                {"op": "partial", "axis": "a"}, {"op": "pad", "dim": 0}, {"op": "pack"},
                {"op": "view", "shape": [-1, -1]}, {"op": "view", "shape": [-2]},
                {"op": "place", "axis": "a"}, {"op": "place", "axis": "a", "coordinates": []},
                {"op": "place", "axis": "a", "coordinates": [0], "index": 0, "count": 1,
                 "rule": "even"},
                {"op": "zero"}, {"op": "zero", "rule": "ceil", "pack": "p"}]:
            self.refuse(with_op(op), op)
        for spoil in [
                lambda d: d.update(holdfast_layout=2), lambda d: d.pop("mesh"),
                lambda d: d.update(holdfast_layout_rules=1), lambda d: d["mesh"][0].update(size=0),
                lambda d: d["tensors"][0].update(states=[]),
                lambda d: d["tensors"][0].update(shape=[-1]),
                lambda d: d["tensors"][0].update(shape=[2**62 + 1]),
                lambda d: d["tensors"][0].update(name=""),
                lambda d: d["tensors"][0].update(name="n" * 4097),
                lambda d: d["tensors"][0]["states"][0].update(dtype="float"),
                lambda d: d["tensors"][0]["states"][0].update(
                    segments=[{"ranks": [0], "lo": [0, 0], "size": [4, 2]}]),
                lambda d: d.update(zero={"stage": 4, "axis": "a"})]:
            document = with_op(good)
            spoil(document)
            self.refuse(document, document)

    def refuse(self, document, what):
        self.assertFalse(self.validator.is_valid(document),
                         f"seed {self.seed}: {what}: {json.dumps(document)[:2000]}")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
