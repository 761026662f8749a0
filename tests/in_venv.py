#!/usr/bin/python3
"""Runs a test in the virtual environment that scripts/interop makes. Where that is missing the test
is skipped, and says so in the form that scripts/test counts.

Usage: in_venv.py VENV TEST.py [ARGUMENT...]
Exit status: the test's; 77 if it was skipped.
"""
import os
import pathlib
import sys

SKIPPED = 77


def main():
    venv, test = sys.argv[1:3]
    python = pathlib.Path(venv, "bin", "python")
    if not python.exists():
        print(f"[  SKIPPED ] {pathlib.Path(test).stem} (no {venv}: scripts/interop makes it)")
        return SKIPPED
    os.execv(python, [str(python), *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
