#!/usr/bin/python3
"""Recordings of real jobs with real faults (recordings/, made by scripts/faults --directory), replayed:
the analysis of today says of each what cases.toml expects.

Usage: replay_test.py HOLDFAST
"""
import json
import pathlib
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import cases
import score

HOLDFAST = sys.argv.pop(1)
RECORDINGS = pathlib.Path(__file__).resolve().parent / "recordings"
BYTES_MAX = 230 << 10
BYTES_MAX_OF_ALL = 1400 << 10


def replay(path):
    result = subprocess.run([HOLDFAST, "--json", "monitor", "replay", path], capture_output=True,
                            text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


class ReplayTest(unittest.TestCase):
    def test_every_recording_is_judged_as_the_table_expects(self):
        table = cases.read()
        kept = sorted(RECORDINGS.glob("*.json"))
        self.assertGreater(len(kept), 9)
        for about in kept:
            run = json.loads(about.read_text(encoding="utf-8"))
            with self.subTest(run["case"]):
                case = table.case(run["case"])
                expected = case.expected and case.expected.filled_in(run["victim"], run["peer"])
                seen = score.seen_in_replay(replay(about.with_suffix(".hfmr")), run["onset"])
                judged = score.judge(expected, seen, case.kind.verdict_seconds,
                                     case.kind.verdict_not_before_seconds)
                self.assertTrue(judged.right, judged.reason)
                # Not vacuous: were it another rank, it would be wrong.
                if expected is not None:
                    other = case.expected.filled_in((run["victim"] + 3) % 8, (run["peer"] + 3) % 8)
                    self.assertFalse(score.judge(other, seen).right)

    def test_recordings_are_small_and_described(self):
        recordings = sorted(RECORDINGS.glob("*.hfmr"))
        self.assertEqual([path.stem for path in recordings],
                         [path.stem for path in sorted(RECORDINGS.glob("*.json"))])
        sizes = [path.stat().st_size for path in recordings]
        self.assertLess(max(sizes), BYTES_MAX)
        self.assertLess(sum(sizes), BYTES_MAX_OF_ALL)


if __name__ == "__main__":
    unittest.main()
