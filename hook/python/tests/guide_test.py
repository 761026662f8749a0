#!/usr/bin/python3
"""Runs the programs of docs/PYTHON.md: the Python blocks of a section, one behind the other.

Usage: guide_test.py plain|torch GUIDE HOLDFASTD        ($HOLDFAST_LIBRARY: the library)
`plain` runs the sections that do not import torch, `torch` the others.
"""
import os
import pathlib
import re
import subprocess
import sys
import unittest

from support import Place

KIND, GUIDE, DAEMON = sys.argv[1:4]
del sys.argv[1:4]


def programs():
    """title: program."""
    found = {}
    text = pathlib.Path(GUIDE).read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
        if blocks and ("torch" in "".join(blocks)) == (KIND == "torch"):
            found[section.splitlines()[0]] = "\n".join(blocks)
    return found


class GuideTest(unittest.TestCase):
    def test_every_program_of_the_guide_runs_twice(self):
        """Twice: the second run resumes."""
        found = programs()
        self.assertGreaterEqual(len(found), 1)
        for title, program in found.items():
            place = Place(self.addCleanup, DAEMON)
            for run in (1, 2):
                with self.subTest(title=title, run=run):
                    result = subprocess.run(
                        [sys.executable, "-c", program], cwd=place.path, timeout=100,
                        capture_output=True, text=True,
                        env=place.environment(PYTHONPATH=os.environ["PYTHONPATH"]))
                    self.assertEqual(result.returncode, 0, result.stderr)
                    if "print(" in program:
                        self.assertNotEqual(result.stdout, "")


if __name__ == "__main__":
    unittest.main()
