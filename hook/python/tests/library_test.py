#!/usr/bin/python3
"""Where the library is looked for, in which order, and what is said if it is nowhere.

Usage: library_test.py CC        ($HOLDFAST_LIBRARY: the library)
"""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

COMPILER = sys.argv.pop(1)
LIBRARY = os.environ["HOLDFAST_LIBRARY"]
PACKAGE = pathlib.Path(__file__).resolve().parent.parent
PRINT_PATH = "import holdfast; print(holdfast.library_path())"


class LibraryTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.place = pathlib.Path(directory.name).resolve()
        self.bin = self.place / "empty-bin"
        self.bin.mkdir()

    def find(self, code=PRINT_PATH, **variables):
        """Runs `code` with nothing in the environment but `variables`; an empty $PATH by
        default."""
        variables = {"PATH": str(self.bin), "PYTHONPATH": str(PACKAGE),
                     "PYTHONDONTWRITEBYTECODE": "1",
                     **{name: str(value) for name, value in variables.items()}}
        return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True,
                              text=True, timeout=60)

    def found(self, **variables):
        result = self.find(**variables)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout.strip()

    def copy(self, directory, name="libholdfast.so.0"):
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / name
        target.write_bytes(pathlib.Path(LIBRARY).read_bytes())
        return str(target)

    def script(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def compile(self, path, source):
        subprocess.run([COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)],
                       input=source, text=True, check=True)

    def test_each_place_serves_and_earlier_ones_come_first(self):
        by_name = self.copy(self.place / "named", "any-name.so")
        in_tree = self.copy(self.place / "tree" / "lib")
        from_pkg_config = self.copy(self.place / "pc", "libholdfast.so")
        from_loader = self.copy(self.place / "loader")
        self.script(self.place / "tree" / "bin" / "holdfast", "exit 1")
        self.script(self.place / "pkg" / "pkg-config", f"echo {self.place}/pc")
        pkg_config, tree = self.place / "pkg", self.place / "tree" / "bin"
        loader = os.path.dirname(from_loader)
        self.assertEqual(self.found(HOLDFAST_LIBRARY=by_name, PATH=f"{tree}:{pkg_config}",
                                    LD_LIBRARY_PATH=loader), by_name)
        self.assertEqual(self.found(PATH=f"{tree}:{pkg_config}", LD_LIBRARY_PATH=loader), in_tree)
        self.assertEqual(self.found(PATH=pkg_config, LD_LIBRARY_PATH=loader), from_pkg_config)
        self.assertEqual(self.found(LD_LIBRARY_PATH=loader), "libholdfast.so.0")

    def test_the_install_tree_is_found_through_links_and_in_debians_directory(self):
        architecture = sys.implementation._multiarch
        library = self.copy(self.place / "tree" / "lib" / architecture)
        self.script(self.place / "tree" / "bin" / "holdfast", "exit 1")
        (self.bin / "holdfast").symlink_to(self.place / "tree" / "bin" / "holdfast")
        self.assertEqual(self.found(), library)

    def test_what_does_not_serve_is_said_with_every_place(self):
        result = self.find()
        self.assertNotEqual(result.returncode, 0)
        for text in ("LibraryNotFound", "$HOLDFAST_LIBRARY", "holdfast: it is not in $PATH",
                     "pkg-config --variable=libdir holdfast", "libholdfast.so.0: "):
            self.assertIn(text, result.stderr)
        self.script(self.place / "pkg" / "pkg-config", "echo no such package >&2; exit 1")
        self.script(self.place / "tree" / "bin" / "holdfast", "exit 1")
        result = self.find(PATH=f"{self.place}/tree/bin:{self.place}/pkg")
        self.assertIn("no such package", result.stderr)
        self.assertIn(f"{self.place}/tree/lib: neither", result.stderr)

    def test_a_named_library_that_does_not_serve_is_an_error_although_others_would(self):
        self.copy(self.place / "loader")
        nothing = self.place / "nothing.so"
        nothing.write_text("no library")
        stranger = self.place / "stranger.so"
        self.compile(stranger, "int x;")
        old = self.place / "old.so"
        self.compile(old, 'const char* hf_version(void) { return "9.9.0"; }')
        partial = self.place / "partial.so"
        self.compile(partial, 'const char* hf_version(void) { return "0.1.7"; }')
        for library, expected in ((self.place / "missing.so", "missing.so"),
                                  (nothing, "nothing.so"), (stranger, "hf_version"),
                                  (old, "expected version 0.1, found 9.9.0"), (partial, "hf_open")):
            result = self.find(HOLDFAST_LIBRARY=library, LD_LIBRARY_PATH=self.place / "loader")
            self.assertNotEqual(result.returncode, 0)
            self.assertIn("LibraryNotFound", result.stderr)
            self.assertIn(expected, result.stderr)

    def test_importing_needs_no_library_and_neither_numpy_nor_torch(self):
        code = ("import sys, holdfast; "
                "assert holdfast.Checkpointer and holdfast.memory_of(bytearray(3)); "
                "assert not {'numpy', 'torch'} & set(sys.modules)")
        self.assertEqual(self.find(code).returncode, 0)

    def test_a_missing_library_is_a_holdfast_error_of_opening(self):
        code = ("import holdfast\n"
                "try: holdfast.Job('a', rank=0, world_size=1)\n"
                "except holdfast.Error as error: print(type(error).__name__, error.code)\n")
        self.assertEqual(self.find(code).stdout.strip(), "LibraryNotFound None")


if __name__ == "__main__":
    unittest.main()
