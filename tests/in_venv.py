#!/usr/bin/python3
"""Runs a test in the virtual environment that scripts/interop makes. Where that, or one of the modules that the test
needs, is missing the test is skipped, and says so in the form that scripts/test counts.

Usage: in_venv.py [--modules A,B] VENV TEST.py [ARGUMENT...]
Exit status: the test's; 77 if it was skipped.
"""
import os
import pathlib
import subprocess
import sys

SKIPPED = 77
FIND = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"


def main():
    modules = []
    if sys.argv[1] == "--modules":
        modules = sys.argv[2].split(",")
        del sys.argv[1:3]
    venv, test = sys.argv[1:3]
    python = pathlib.Path(venv, "bin", "python")
    missing = str(venv)
    if python.exists():
        missing = subprocess.run([python, "-c", FIND, *modules], capture_output=True, text=True, check=True).stdout.strip()
    if missing:
        print(f"[  SKIPPED ] {pathlib.Path(test).stem} (no {missing}: scripts/interop makes it)")
        return SKIPPED
    os.execv(python, [str(python), *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
