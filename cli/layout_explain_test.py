#!/usr/bin/python3
"""`holdfast layout explain` as a user meets it. That what it says is true of every rank is
format/layout_explain_test.cc's to prove.
Usage: layout_explain_test.py HOLDFAST GOLDEN_ROOT MAKE_CHECKPOINT"""

import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from checkpoint_files import Command

HOLDFAST, GOLDEN, MAKE_CHECKPOINT = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
run = functools.partial(Command(HOLDFAST), "layout", "explain")


def hybrid(tp=2, dp=4):
    """Columns and rows over tp, replicated over dp, moments packed over dp; a norm on all ranks."""
    pack = [{"op": "pack", "pack": "m"}]
    column = [{"op": "shard", "dim": 0, "axis": "tp", "rule": "even"}]
    row = [{"op": "shard", "dim": 1, "axis": "tp", "rule": "even"}]
    return {"holdfast_layout": 1, "mesh": [{"axis": "tp", "size": tp}, {"axis": "dp", "size": dp}],
            "packs": [{"pack": "m", "axis": "dp", "buffer": "moments"}],
            "tensors": [{"name": name, "shape": shape,
                         "states": [{"state": "param", "dtype": "float32", "place": place},
                                    {"state": "exp_avg", "dtype": "float32", "place": place + pack}]}
                        for name, shape, place in (("up", [64, 32], column), ("down", [32, 64], row),
                                                   ("norm", [32], []))]}


class LayoutExplainTest(unittest.TestCase):
    maxDiff = None

    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.place = pathlib.Path(self.temporary.name).resolve()

    def tearDown(self):
        self.temporary.cleanup()

    def document(self, document, name="layout.json"):
        path = self.place / name
        path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
        return path

    def ok(self, *arguments):
        code, out, error = run(*arguments)
        self.assertEqual((code, error), (0, ""))
        return out

    def json(self, *arguments):
        found = json.loads(self.ok(*arguments, "--json"))
        self.assertEqual(found["schema_version"], 1)
        self.assertEqual(len(found["layouts"]), 1)
        return found["layouts"][0]

    def test_a_document_is_explained_by_groups_of_ranks(self):
        path = self.document(hybrid())
        self.assertEqual(self.ok(path), f"""{path}
  mesh     tp=2 x dp=4: 8 ranks; dp varies fastest
  tensors  32.2 KiB in all; all ranks together hold 81.2 KiB
    exp_avg          3 tensors, 16.1 KiB
    param            3 tensors, 16.1 KiB
  held together by
    8 ranks: 128 B: 0-7
    4 ranks: 16.0 KiB in 2 sets of ranks (8.0 KiB each): 0-3; ...
    2 ranks: 128 B: 3,7
    1 rank: 16.0 KiB in 8 sets of ranks (1.9 KiB to 2.0 KiB each): 0; ...
  ranks
    0-7: hold 10.2 KiB each (each something else), store 4.0 KiB each
""")
        found = self.json(path)
        self.assertEqual(found["mesh"], [{"axis": "tp", "size": 2}, {"axis": "dp", "size": 4}])
        self.assertEqual((found["world_size"], found["rank_group_count"]), (8, 8))
        self.assertEqual(found["states"]["param"], {"tensors": 3, "bytes": (64 * 32 * 2 + 32) * 4})
        self.assertEqual(sum(group["rank_count"] * group["held_bytes"] for group in found["rank_groups"]),
                         found["held_bytes"])

    def test_a_tensor_says_which_elements_lie_where_and_who_stores_them(self):
        path = self.document(hybrid())
        self.assertEqual(self.ok(path, "--tensor", "down"), f"""{path}
  mesh     tp=2 x dp=4: 8 ranks; dp varies fastest

  down param float32 [32, 64], 8.0 KiB
    [0:32, 0:32] held by 0-3: buffer "param/down" at byte 0
    [0:32, 32:64] held by 4-7: buffer "param/down" at byte 0
    [0:32, 0:32] stored by rank 3
    [0:32, 32:64] stored by rank 7

  down exp_avg float32 [32, 64], 8.0 KiB
    [0:1, 0:16] held by 1: buffer "moments" at byte 2016
    elements [16, 536) of the box [0:32, 0:32] held by 2: buffer "moments" at byte 0
    elements [536, 1024) of the box [0:32, 0:32] held by 3: buffer "moments" at byte 0
    [0:1, 32:48] held by 5: buffer "moments" at byte 2016
    elements [16, 536) of the box [0:32, 32:64] held by 6: buffer "moments" at byte 0
    elements [536, 1024) of the box [0:32, 32:64] held by 7: buffer "moments" at byte 0
    [0:1, 0:16] stored by rank 1
    elements [16, 536) of the box [0:32, 0:32] stored by rank 2
    elements [536, 1024) of the box [0:32, 0:32] stored by rank 3
    [0:1, 32:48] stored by rank 5
    elements [16, 536) of the box [0:32, 32:64] stored by rank 6
    elements [536, 1024) of the box [0:32, 32:64] stored by rank 7
""")

    def test_of_a_checkpoint_it_says_which_image_stores_each_piece(self):
        document = self.document(hybrid())
        subprocess.run([MAKE_CHECKPOINT, document, self.place / "job", "3"], check=True)
        checkpoint = next((self.place / "job").glob("s*.a*"))
        inspected = json.loads(subprocess.run([HOLDFAST, "inspect", checkpoint, "--tensors", "--json"],
                                              capture_output=True, check=True).stdout)["tensors"]
        for path in (checkpoint, checkpoint.parent):
            stored = {}  # by rank
            found = self.json(path, "--tensor", "*")
            self.assertEqual((found["tensor_count"], found["ranks_asked"]), (6, 8))
            self.assertEqual(len(found["tensors"]), len(inspected))
            of_name = {(tensor["name"], tensor["state"]): tensor for tensor in found["tensors"]}
            for tensor in inspected:
                parts = of_name[tensor["name"], tensor["state"]]["stored"]
                for part in parts:
                    self.assertEqual(part["file"], f"rank-{part['rank']:05d}.h5")
                    stored[part["rank"]] = stored.get(part["rank"], 0) + 4 * (part["end"] - part["begin"])
                self.assertEqual([{key: part[key] for key in part if key != "rank"} for part in parts],
                                 [{**{key: piece[key] for key in piece if key not in ("file", "offset")},
                                   "file": piece["file"], "offset": piece["offset"]}
                                  for piece in tensor["pieces"]])
        self.assertEqual(sum(stored.values()), found["distinct_bytes"])
        for group in found["rank_groups"]:  # here each is one rank
            self.assertEqual(group["stored_bytes_min"], stored[int(group["ranks"])])
        # What the document says beforehand is what the images have.
        planned = self.json(document, "--tensor", "*")

        def strip(tensors):
            return sorted((tensor["name"], tensor["state"], part["rank"], part["begin"], part["end"])
                          for tensor in tensors for part in tensor["stored"])
        self.assertEqual(strip(planned["tensors"]), strip(found["tensors"]))
        self.assertIn("rank-00002.h5 at byte", self.ok(checkpoint, "--tensor", "down"))

    def test_the_golden_checkpoint_is_explained(self):
        self.assertEqual(self.json(GOLDEN / "golden.job-1", "--tensor", "h.0.attn")["tensors"][0]["shape"], [6, 4])

    def test_a_thousand_ranks_are_a_page_and_every_list_has_its_limit(self):
        path = self.document(hybrid(tp=2, dp=500))
        text = self.ok(path)
        self.assertLess(len(text.splitlines()), 30)
        self.assertIn("0-999", text)
        text = self.ok(path, "--tensor", "up")
        self.assertLess(len(text.splitlines()), 120)
        tensors = self.json(path, "--tensor", "up")["tensors"]
        self.assertEqual([len(tensor["held"]) for tensor in tensors], [tensor["held_count"] for tensor in tensors])
        rest = [tensor[count] - 24 for tensor in tensors for count in ("held_count", "stored_count")
                if tensor[count] > 24]
        self.assertEqual([int(count) for count in re.findall(r"(?m)^    and (\d+) more$", text)], rest)
        self.assertGreaterEqual(len(rest), 2)
        self.assertLess(max(map(len, text.splitlines())), 200)

    def test_strides_are_said(self):
        path = self.document({"holdfast_layout": 1, "mesh": [], "tensors": [
            {"name": "t", "shape": [2, 4], "states": [{"state": "p", "dtype": "int64", "place": [
                {"op": "perm", "dims": [1, 0]}]}]}]})
        self.assertIn('[0:2, 0:4] held by 0: buffer "p/t" at byte 0, strides 8 16 bytes\n',
                      self.ok(path, "--tensor", "t"))
        held = self.json(path, "--tensor", "t")["tensors"][0]["held"][0]
        self.assertEqual(held["places"], [{"ranks": "0", "buffer": "p/t", "offset": 0, "strides": [8, 16]}])
        self.assertEqual(held["place_count"], 1)

    def test_rules_are_explained_for_the_tensors_of_a_checkpoint(self):
        rules = self.document({"holdfast_layout_rules": 1, "mesh": [{"axis": "dp", "size": 3}], "rules": [
            {"tensors": "norm"},
            {"tensors": "*", "place": [{"op": "flat", "axis": "dp", "rule": "ceil"}]}]}, "rules.json")
        code, out, error = run(rules)
        self.assertEqual((code, out), (2, ""))
        self.assertIn("--of CKPT", error)
        subprocess.run([MAKE_CHECKPOINT, self.document(hybrid()), self.place / "job", "3"], check=True)
        found = self.json(rules, "--of", self.place / "job")
        self.assertEqual((found["world_size"], [row["rank_count"] for row in found["sharing"]]), (3, [3, 1]))
        self.assertEqual(found["sharing_count"], 2)
        for wrong in (self.document(hybrid()), self.place / "job"):
            code, out, error = run(wrong, "--of", self.place / "job")
            self.assertEqual((code, out), (2, ""))
            self.assertIn("--of: expected a rules file", error)
        rules.write_text(rules.read_text().replace('"*"', '"other"'))
        code, _, error = run(rules, "--of", self.place / "job")
        self.assertEqual(code, 2)
        self.assertIn("rules.json: ", error)

    def test_a_wrong_name_of_a_tensor_gets_a_suggestion_and_nothing_else(self):
        path = self.document(hybrid())
        for flags in ((), ("--json",)):
            code, out, error = run(path, "--tensor", "norn", *flags)
            self.assertEqual((code, out), (5, ""))
            self.assertIn('did you mean "norm"?', error)
        self.assertEqual(run(path, "--tensor", "x*")[0], 5)
        self.assertEqual(run(path, "--tensor", "{")[0], 2)

    def test_a_bad_document_is_refused_with_its_place(self):
        document = hybrid()
        document["tensors"][1]["states"][0]["dtype"] = "float31"
        for text, part in ((document, 'tensors[1].states[0].dtype: unknown dtype "float31"; did you mean "float32"?'),
                           ('{"holdfast_layout": 1,\n "mesh": [}', "JSON line 2, column 11"),
                           ("", "JSON line 1, column 1")):
            code, out, error = run(self.document(text, "bad.json"))
            self.assertEqual((code, out), (2, ""))
            self.assertIn("bad.json: ", error)
            self.assertIn(part, error)

    def test_a_document_that_a_rank_could_not_register_is_refused(self):
        document = hybrid()
        self.assertEqual(self.json(self.document(document))["ranks_checked"], 8)
        for tensor, offset in zip(document["tensors"][:2], (0, 100)):
            tensor["states"][0].update(buffer="parameters", offset_bytes=offset)
        for flags in ((), ("--json",), ("--tensor", "norm")):
            code, out, error = run(self.document(document), *flags)
            self.assertEqual((code, out), (2, ""))
            self.assertIn('layout.json: rank 0: buffer "parameters": tensor "up"', error)

    def test_what_is_not_there_or_damaged_is_told_apart(self):
        self.assertEqual(run(self.place / "nothing")[0], 5)
        shutil.copytree(GOLDEN, self.place / "root")
        checkpoint = next((self.place / "root" / "golden.job-1").glob("s*.a*"))
        index = checkpoint / "INDEX"
        data = bytearray(index.read_bytes())
        data[100] ^= 1
        index.write_bytes(data)
        code, out, error = run(checkpoint)
        self.assertEqual((code, out), (4, ""))
        self.assertIn("INDEX", error)
        (checkpoint / "MANIFEST.json").unlink()
        self.assertEqual(run(checkpoint)[0], 5)
        self.assertEqual(run(checkpoint.parent)[0], 5)

    def test_names_of_strangers_do_not_control_the_terminal(self):
        document = hybrid()
        document["tensors"][2]["name"] = "n\x1b[2Jorm"
        path = self.document(document)
        text = self.ok(path, "--tensor", "n*")
        self.assertNotIn("\x1b", text)
        self.assertIn("\\x1b[2J", text)
        self.assertEqual(self.json(path, "--tensor", "n*")["tensors"][0]["name"], "n\x1b[2Jorm")

    def test_usage_errors_are_two(self):
        for arguments in (("layout",), ("layout", "explain"), ("layout", "frobnicate")):
            result = subprocess.run([HOLDFAST, *arguments], capture_output=True, check=False)
            self.assertEqual(result.returncode, 2, arguments)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
