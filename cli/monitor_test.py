#!/usr/bin/python3
"""holdfast monitor as a user meets it: recordings of simulated jobs replayed, and what is refused.

    monitor_test.py HOLDFAST MAKE_RECORDING
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import checkpoint_files

MAKE_RECORDING = sys.argv[2]
run = checkpoint_files.Command(sys.argv[1])

FINDING_MEMBERS = {
    "schema_version", "id", "grade", "syndrome", "fault", "scope", "suspects", "confidence", "sentence",
    "evidence", "changes_mind", "since_seconds", "scope_in_words", "job", "attempt_key", "state", "history",
    "history_left_out"}


class Replay(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="hf-monitor-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def record(self, *arguments):
        path = self.directory / "run.hfmr"
        path.unlink(missing_ok=True)
        subprocess.run([MAKE_RECORDING, path, *map(str, arguments)], check=True, timeout=60)
        return path

    def replay(self, path, *arguments, expect=0):
        code, text, error = run("monitor", "replay", path, "--json", *arguments)
        self.assertEqual(code, expect, error)
        answer = json.loads(text)
        self.assertEqual(answer["schema_version"], 1)
        return answer

    def test_names_what_was_done_in_the_documented_form(self):
        for fault, rank, expected in (("hang", 3, "gpu-hang"), ("killed", 5, "dead"), ("stopped", 0, "stopped")):
            answer = self.replay(self.record(70, fault, rank))
            self.assertEqual(answer["recording"], {"jobs": ["simulated"], "steps": 70, "steps_lost": 0,
                                                   "ended_on_purpose": True, "damage": None})
            [finding] = answer["findings"]
            self.assertEqual(set(finding), FINDING_MEMBERS)
            self.assertEqual((finding["grade"], finding["fault"], finding["state"]), ("verdict", expected, "open"))
            self.assertEqual(finding["suspects"], [{"rank": rank}])
            self.assertEqual(finding["job"], "simulated")
            self.assertIn(f"gpu-{10 + rank}", finding["sentence"])
            self.assertEqual([event["change"] for event in finding["history"]], ["suspicion", "verdict"])
            for event in finding["history"]:
                self.assertEqual(set(event), {"change", "at_seconds", "wall_time", "text"})
                self.assertIsNone(event["wall_time"])

    def test_text_says_it_all(self):
        code, text, error = run("monitor", "replay", self.record(70, "hang", 3))
        self.assertEqual((code, error), (0, ""))
        for part in ("70 steps of 1 jobs", "rank 3 (node gpu-13)", "scope ", "its GPU, or the kernel", "confidence",
                     "evidence", "wrong if", "history", "suspicion", "verdict"):
            self.assertIn(part, text)

    def test_says_the_same_every_time_and_nothing_of_a_healthy_job(self):
        path = self.record(70, "hang", 3)
        self.assertEqual(self.replay(path), self.replay(path))
        self.assertEqual(self.replay(path, "--job", "another")["findings"], [])
        self.assertEqual(self.replay(self.record(70, "none", 0))["findings"], [])
        self.assertIn("Nothing is found", run("monitor", "replay", path, "--job", "another")[1])

    def test_a_recording_that_was_cut_or_damaged_says_so(self):
        path = self.record(70, "hang", 3)
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) * 9 // 10])
        answer = self.replay(path)
        self.assertFalse(answer["recording"]["ended_on_purpose"])
        self.assertTrue(0 < answer["recording"]["steps"] < 70)
        self.assertIn("stops without its end", run("monitor", "replay", path)[1])
        damaged = bytearray(whole)
        damaged[len(whole) * 9 // 10] ^= 0x40
        path.write_bytes(damaged)
        answer = self.replay(path, expect=4)
        self.assertIsNotNone(answer["recording"]["damage"])
        self.assertTrue(0 < answer["recording"]["steps"] < 70)

    def test_a_topology_file_names_the_nics_and_a_broken_one_is_named(self):
        path = self.record(70, "cut", 3)
        topology = self.directory / "topology.json"
        topology.write_text(json.dumps({
            "schema_version": 1,
            "nodes": {f"gpu-{10 + i}": {"gpus": [{"nic": f"mlx5_{i}", "rail": 1}], "switch": "leaf-2"}
                      for i in range(8)}}))
        [finding] = self.replay(path, "--topology", topology)["findings"]
        self.assertIn("(from NIC mlx5_3 of node gpu-13 to NIC mlx5_4 of node gpu-14)", finding["sentence"])
        self.assertIn("rail 1, switch leaf-2", finding["evidence"])
        [without] = self.replay(path)["findings"]
        self.assertNotIn("NIC", without["sentence"])
        for member in ("id", "grade", "fault", "scope", "suspects"):
            self.assertEqual(finding[member], without[member], member)
        topology.write_text('{"schema_version": 1, "nodes": {"a": {"gpus": [{"nic": 7}]}}}')
        code, _, error = run("monitor", "replay", path, "--topology", topology)
        self.assertNotEqual(code, 0)
        self.assertIn(f"{topology}: nodes.a.gpus[0].nic: expected a string, found the number 7", error)

    def test_what_is_no_recording_is_refused(self):
        path = self.directory / "other"
        path.write_bytes(b"HDF5 perhaps")
        self.assertEqual(run("monitor", "replay", path)[0], 4)
        self.assertEqual(run("monitor", "replay", self.directory / "missing")[0], 5)
        self.assertEqual(run("monitor", "replay")[0], 2)


class WithoutAnAgent(unittest.TestCase):
    def test_every_verb_says_that_nobody_listens(self):
        with tempfile.TemporaryDirectory() as directory:
            for arguments in (("status",), ("top",), ("matrix",), ("verdicts",), ("verdicts", "--follow"),
                              ("explain", "x"), ("record", f"{directory}/file")):
                code, _, error = run("monitor", *arguments, "--socket", f"{directory}/nobody.sock")
                self.assertEqual(code, 75, error)
                self.assertIn("nobody.sock", error)
            self.assertEqual(list(pathlib.Path(directory).iterdir()), [])

    def test_wrong_arguments_are_named(self):
        self.assertEqual(run("monitor")[0], 2)
        code, _, error = run("monitor", "matrix", "--communicator", "xyz")
        self.assertEqual(code, 2)
        self.assertIn("xyz", error)
        code, _, error = run("monitor", "verdicts", "--job", "j" * 200)
        self.assertEqual(code, 2)
        self.assertIn("job", error)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
