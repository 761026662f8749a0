#!/usr/bin/python3
"""What our programs declare of CUDA's driver, and what our fake driver defines, takes the arguments that NVIDIA's cuda.h
says, where that is installed. (The hook library's own declarations: hook/device_driver_test.cc.)

Usage: cuda_declarations_test.py CXX [CUDA_INCLUDE]
"""
import pathlib
import re
import subprocess
import sys
import unittest

from tree import ROOT

CXX = sys.argv[1]
CUDA_INCLUDE = sys.argv[2] if len(sys.argv) > 2 and pathlib.Path(sys.argv[2], "cuda.h").exists() else None
del sys.argv[1:]

TABLES = ("agent/witness/cuda.cc", "examples/cuda/device_buffers.cc")
FAKE = "tests/support/fake_cuda/driver.cc"
# X(Member, "symbol", (parameters))
ENTRY = re.compile(r'X\(\s*\w+,\s*"(cu\w+)",[\s\\]*\(((?:[^()]|\n)*)\)\)')
# The fake's: CuResult cuName(parameters) {
DEFINITION = re.compile(r"^CuResult (cu\w+)\(((?:[^()]|\n)*)\) \{", re.MULTILINE)

PRELUDE = r"""
#include <cuda.h>
#include <cstddef>
#include <type_traits>
// Passed alike: both pointers, or numbers of one size. (Opaque handles are pointers in both.)
template <typename Ours, typename Theirs>
constexpr bool kAlikeOne =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;
template <typename Ours, typename Theirs>
struct Alike { static constexpr bool value = false; };
template <typename... Ours, typename... Theirs>
  requires(sizeof...(Ours) == sizeof...(Theirs))
struct Alike<int(Ours...), CUresult(Theirs...)> {
  static constexpr bool value = (kAlikeOne<Ours, Theirs> && ...);
};
static_assert(sizeof(int) == sizeof(CUresult));
#define TEXT_OF_TOKENS(x) #x
#define TEXT_OF(x) TEXT_OF_TOKENS(x)
constexpr bool Same(const char* a, const char* b) { return *a == *b && (*a == 0 || Same(a + 1, b + 1)); }
using Result = int;
using Context = void*;
using Pointer = unsigned long long;
// Of the fake: hook/device_driver.h's names.
using CuResult = int;
using CuDevice = int;
using CuDevicePointer = unsigned long long;
using CuContext = void*;
using CuStream = void*;
using CuEvent = void*;
using CuMemcpy2D = int;
enum class CuPointerAttribute : int {};
enum class CuCaptureMode : int {};
enum class CuCaptureStatus : int {};
"""


def parameters_of(text):
    """Without names: a type that is followed by a name is its type."""
    found = []
    for parameter in filter(None, (" ".join(part.split()) for part in text.replace("\\", " ").split(","))):
        parameter = re.sub(r"(?<=[\w*&]) (?!long\b|int\b)[a-z]\w*$", "", re.sub(r"\*(?=\w)", "* ", parameter))
        found.append(parameter)
    return ", ".join(found)


def entries():
    """(file, symbol, parameters) of all declarations."""
    found = []
    for name in TABLES:
        found += [(name, symbol, parameters_of(types)) for symbol, types in ENTRY.findall((ROOT / name).read_text())]
    found += [(FAKE, symbol, parameters_of(types))
              for symbol, types in DEFINITION.findall((ROOT / FAKE).read_text())]
    return found


def check_of(symbol, types):
    """The name without its version is a macro for the newest one, which need not be the one that we look up: then
    nothing declares that one any more, and nothing is checked."""
    plain = re.sub(r"_v\d+$", "", symbol)
    return (f'#if defined({plain})\nstatic_assert(!Same("{symbol}", TEXT_OF({plain})) || '
            f'Alike<int({types}), decltype(::{plain})>::value, "{symbol}");\n'
            f'#else\nstatic_assert(Alike<int({types}), decltype(::{plain})>::value, "{symbol}");\n#endif\n')


def complaints(declarations):
    """The symbols that the compiler refuses."""
    source = PRELUDE + "".join(check_of(symbol, types) for symbol, types in declarations)
    result = subprocess.run([CXX, "-std=c++20", "-fsyntax-only", "-isystem", CUDA_INCLUDE, "-x", "c++", "-"],
                            input=source, capture_output=True, text=True)
    refused = re.findall(r"(?:static assertion failed|static_assert failed).*\b(cu[A-Z]\w+)", result.stderr)
    if result.returncode != 0 and not refused:
        raise AssertionError(result.stderr)
    return refused


@unittest.skipIf(CUDA_INCLUDE is None, "cuda.h is not installed: 1 skipped")
class CudaDeclarationsTest(unittest.TestCase):
    def test_everything_is_declared_as_in_cuda_h(self):
        found = entries()
        for name, count in ((TABLES[0], 12), (TABLES[1], 17), (FAKE, 40)):
            self.assertGreaterEqual(sum(entry[0] == name for entry in found), count, name)
        self.assertEqual(complaints([entry[1:] for entry in found]), [])

    def test_what_differs_is_found(self):
        """The check can fail: one parameter too many, for each, and some of another size or kind."""
        wrong = [(symbol, f"{types}, int") for _, symbol, types in entries() if symbol != "cuCtxCreate_v2"]
        wrong += [("cuMemHostRegister_v2", "void*, size_t, size_t"), ("cuInit", "void*")]
        self.assertEqual(complaints(wrong), [symbol for symbol, _ in wrong])


if __name__ == "__main__":
    unittest.main()
