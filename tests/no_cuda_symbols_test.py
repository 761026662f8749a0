#!/usr/bin/python3
"""Nothing of ours needs CUDA, NCCL or NVML to be loaded: no library and no program has an undefined symbol of
theirs or needs their files, and every library loads at once and whole (RTLD_NOW) on a machine without them. And
what is loaded into training processes needs no newer C library than the images have that people train in.

Usage: no_cuda_symbols_test.py BUILD FILE...      (BUILD: its libraries are looked for; FILE: what must be there)
"""
import ctypes
import os
import pathlib
import re
import subprocess
import sys
import unittest

BUILD, *FILES = map(pathlib.Path, sys.argv[1:])
del sys.argv[1:]
THEIRS = re.compile(r"^_?(cu|cuda|nccl|nvml|cupti|nvtx)[A-Z]")
THEIR_FILES = re.compile(r"^lib(cuda|cudart|nccl|nvidia-ml|cupti|nvrtc)\b")
# Of Ubuntu 22.04, which NVIDIA's and PyTorch's older images stand on.
GLIBC_MAX = (2, 35)
LOADED_BY_TRAINERS = ("libholdfast.so", "libnccl-profiler-holdfast.so")
# Stand-ins for these libraries, and what other tests make and remove meanwhile.
LEFT_OUT = {"fake_cuda", "null_cuda", "old_cuda", "CMakeFiles", "Testing", "install_consumer", "configure"}


def libraries():
    """Every shared library of the build, each once."""
    found = {}
    for directory, directories, names in os.walk(BUILD):
        directories[:] = [name for name in directories if name not in LEFT_OUT]
        for name in names:
            path = pathlib.Path(directory) / name
            if re.search(r"\.so(\.\d+)*$", name) and path.is_file() and not name.startswith("libnvidia-ml"):
                found[path.resolve()] = path
    return sorted(found)


def readelf(*arguments):
    return subprocess.run(["readelf", "--wide", *arguments], capture_output=True, text=True, check=True).stdout


def needs(path):
    """(undefined symbols, needed libraries) of an ELF file, theirs only."""
    symbols = [line.split()[7].split("@")[0] for line in readelf("--dyn-syms", str(path)).splitlines()
               if " UND " in line and len(line.split()) > 7]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", str(path)))
    return ([name for name in symbols if THEIRS.match(name)],
            [name for name in needed if THEIR_FILES.match(name)])


def glibc_of(path):
    """The newest version of the C library that an ELF file asks for."""
    versions = re.findall(r"\bGLIBC_(\d+)\.(\d+)", readelf("--version-info", str(path)))
    return max((int(major), int(minor)) for major, minor in versions)


class NoCudaSymbolsTest(unittest.TestCase):
    def test_what_must_be_there_is_looked_at(self):
        resolved = libraries()
        for path in FILES:
            self.assertTrue(path.is_file(), path)
            if ".so" in path.name:
                self.assertIn(path.resolve(), resolved)

    def test_no_library_and_no_program_needs_them(self):
        for path in {*libraries(), *(path.resolve() for path in FILES)}:
            with self.subTest(path=path.name):
                self.assertEqual(needs(path), ([], []))

    def test_what_needs_them_is_found(self):
        """The check can fail."""
        fake = sorted(BUILD.glob("tests/support/fake_cuda/libcuda.so.1.*"))
        self.assertTrue(fake)
        source = "int cuInit(unsigned); int main(void) { return cuInit(0); }"
        program = BUILD / "tests" / "needs_cuda"
        subprocess.run(["cc", "-x", "c", "-", "-x", "none", str(fake[0]), "-o", str(program)], input=source, text=True,
                       check=True)
        try:
            self.assertEqual(needs(program), (["cuInit"], ["libcuda.so.1"]))
        finally:
            program.unlink()

    def test_what_trainers_load_runs_on_older_systems(self):
        found = [path for path in FILES if path.name.startswith(LOADED_BY_TRAINERS)]
        self.assertEqual(len(found), len(LOADED_BY_TRAINERS))
        for path in found:
            with self.subTest(path=path.name):
                self.assertLessEqual(glibc_of(path), GLIBC_MAX)

    def test_every_library_loads_whole(self):
        for path in libraries():
            with self.subTest(path=path.name):
                ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)


if __name__ == "__main__":
    unittest.main()
