"""Finds and loads libholdfast.so, once per process and only when it is needed: `import holdfast`
works without it.

The places, in this order; the first that serves is taken:
  1. $HOLDFAST_LIBRARY, a file. If it is set, nothing else is tried: who names a library wants
     that one.
  2. The install tree of the `holdfast` command in $PATH: ../lib, ../lib64, ../lib/<architecture>.
  3. The library directory that `pkg-config holdfast` gives.
  4. The loader's own path (LD_LIBRARY_PATH, ld.so.cache).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from typing import List, Optional, Tuple

from . import _abi
from .errors import LibraryNotFound

FILE_NAMES = ("libholdfast.so.0", "libholdfast.so")
PKG_CONFIG_SECONDS_MAX = 10


class _Search:
    """What was tried, with the reason why it did not serve."""

    def __init__(self) -> None:
        self.tried: List[str] = []

    def load(self, path: str) -> Optional[ctypes.CDLL]:
        try:
            library = ctypes.CDLL(path)
            version = _version(library)
        except (OSError, AttributeError) as error:
            self.tried.append(f"{path}: {error}")
            return None
        if version.split(".")[:2] != [str(_abi.VERSION_MAJOR), str(_abi.VERSION_MINOR)]:
            expected = f"{_abi.VERSION_MAJOR}.{_abi.VERSION_MINOR}"
            self.tried.append(f"{path}: expected version {expected}, found {version}")
            return None
        try:
            return _abi.bind(library)
        except AttributeError as error:
            self.tried.append(f"{path}: {error}")
            return None

    def load_from(self, directory: str) -> Optional[Tuple[ctypes.CDLL, str]]:
        for name in FILE_NAMES:
            path = os.path.join(directory, name)
            if os.path.exists(path):
                library = self.load(path)
                return (library, path) if library is not None else None
        self.tried.append(f"{directory}: neither {' nor '.join(FILE_NAMES)} is there")
        return None


def _version(library: ctypes.CDLL) -> str:
    library.hf_version.restype = ctypes.c_char_p
    library.hf_version.argtypes = ()
    return library.hf_version().decode("ascii", "replace")


def _install_tree_directories(search: _Search) -> List[str]:
    command = shutil.which("holdfast")
    if command is None:
        search.tried.append("../lib of the command holdfast: it is not in $PATH")
        return []
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(command)))
    architecture = getattr(sys.implementation, "_multiarch", None)
    names = ["lib", "lib64"] + ([f"lib/{architecture}"] if architecture else [])
    return [os.path.join(prefix, name) for name in names]


def _pkg_config_directories(search: _Search) -> List[str]:
    command = ["pkg-config", "--variable=libdir", "holdfast"]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                timeout=PKG_CONFIG_SECONDS_MAX)
    except (OSError, subprocess.TimeoutExpired) as error:
        search.tried.append(f"{' '.join(command)}: {error}")
        return []
    directory = result.stdout.strip()
    if result.returncode != 0 or not directory:
        lines = result.stderr.strip().splitlines()
        search.tried.append(f"{' '.join(command)}: {lines[0] if lines else 'says nothing'}")
        return []
    return [directory]


def find() -> Tuple[ctypes.CDLL, str]:
    """The library, bound, and the name that it was loaded by. Raises LibraryNotFound."""
    search = _Search()
    named = os.environ.get("HOLDFAST_LIBRARY")
    if named:
        library = search.load(named)
        if library is not None:
            return library, named
        raise LibraryNotFound("$HOLDFAST_LIBRARY does not serve, and is the only place that is "
                              f"tried while it is set:\n  {search.tried[0]}")
    for directories in (_install_tree_directories, _pkg_config_directories):
        for directory in directories(search):
            found = search.load_from(directory)
            if found is not None:
                return found
    for name in FILE_NAMES:
        library = search.load(name)
        if library is not None:
            return library, name
    raise LibraryNotFound("libholdfast.so was not found; install Holdfast, or set "
                          "$HOLDFAST_LIBRARY to the file. Tried:\n  " + "\n  ".join(search.tried))


_lock = threading.Lock()
_loaded: Optional[Tuple[ctypes.CDLL, str]] = None


def _load() -> Tuple[ctypes.CDLL, str]:
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = find()
        return _loaded


def library() -> ctypes.CDLL:
    """The process's library. Raises LibraryNotFound; a later call looks again."""
    return _load()[0]


def library_path() -> str:
    """The path, or name for the loader, of the library in use. Loads it. Raises LibraryNotFound."""
    return _load()[1]


def library_version() -> str:
    """`hf_version`, for example "0.1.0". Loads the library. Raises LibraryNotFound."""
    return library().hf_version().decode("ascii")
