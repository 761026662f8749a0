"""The files of the repository, without what is built or installed into it."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_OURS = {"build", ".venv", ".git", "__pycache__"}


def files():
    """All paths below ROOT, sorted. Directories that are not ours are never entered: they change while
    we look."""
    found = []
    for directory, directories, names in os.walk(ROOT):
        directories[:] = [name for name in directories if name not in NOT_OURS]
        found += [pathlib.Path(directory) / name for name in names]
    return sorted(found)
