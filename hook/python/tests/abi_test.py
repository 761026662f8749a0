#!/usr/bin/python3
"""holdfast/_abi.py against hook/holdfast.h: what a C compiler makes of the header is the oracle.

Usage: abi_test.py HOLDFAST_H CC
"""
import ctypes
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

from holdfast import _abi, errors, job, monitor

HEADER, COMPILER = sys.argv[1:3]
del sys.argv[1:3]

CONSTANTS = {
    "HF_VERSION_MAJOR": _abi.VERSION_MAJOR, "HF_VERSION_MINOR": _abi.VERSION_MINOR,
    "HF_FOREVER": _abi.FOREVER, "HF_ALL_GROUPS": _abi.ALL_GROUPS, "HF_LAST_STEP": _abi.LAST_STEP,
    "HF_SURVIVE_PROCESS": job.Faults.PROCESS, "HF_SURVIVE_POWER": job.Faults.POWER,
    "HF_BLOB_GLOBAL": job.Scope.GLOBAL, "HF_BLOB_RANK": job.Scope.RANK,
    **{f"HF_RESTORE_FROM_{what.name}": what for what in job.RestoreFrom},
    **{f"HF_{code.name}": code for code in errors.Code},
    **{f"HF_COPIES_{copies.name}": copies for copies in job.Copies},
    **{f"HF_SAVE_{state.name}": state for state in job.SaveState},
    **{f"HF_{kind.name}": kind for kind in monitor.Kind if kind is not monitor.Kind.OTHER},
    "HF_OPERATION_OTHER": monitor.Kind.OTHER,
    **{f"HF_WAIT_{wait.name}": wait for wait in monitor.Wait},
}
# Of no use from Python: what an initialiser, an attribute or a source is.
NOT_MIRRORED = {"HF_API", "HF_OPEN_OPTIONS_INIT", "HF_SOURCE_NONE", "HF_SOURCE_MEMORY",
                "HF_SOURCE_STORAGE"}


def header_text():
    return re.sub(r"/\*.*?\*/", "", pathlib.Path(HEADER).read_text(encoding="utf-8"), flags=re.S)


def declared_structs():
    """struct name: names of its fields, in order."""
    structs = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", header_text(), re.S):
        structs[name] = [re.search(r"(\w+)\s*(\[\d+\])?\s*$", line).group(1)
                         for line in body.split(";") if line.strip()]
    return structs


def compiled():
    """What the compiler says of every struct, field and constant that the package knows."""
    lines = []
    for struct in _abi.STRUCTS:
        name = struct.__name__
        lines.append(f'printf("\\"{name}\\": %zu,\\n", sizeof({name}));')
        for field, _ in struct._fields_:
            lines.append(f'printf("\\"{name}.{field}\\": [%zu, %zu],\\n", '
                         f'offsetof({name}, {field}), sizeof((({name}*)0)->{field}));')
    for name in CONSTANTS:
        lines.append(f'print_constant("{name}", (long long)({name}), ({name}) > 0);')
    source = "\n".join([
        '#include <stdio.h>', f'#include "{HEADER}"',
        'static void print_constant(const char* name, long long value, int positive) {',
        '  if (positive) printf("\\"%s\\": %llu,\\n", name, (unsigned long long)value);',
        '  else printf("\\"%s\\": %lld,\\n", name, value);', '}',
        'int main(void) {', 'printf("{\\n");', *lines, 'printf("\\"end\\": 0}\\n");',
        'return 0; }'])
    with tempfile.TemporaryDirectory() as directory:
        program = pathlib.Path(directory, "dump")
        program.with_suffix(".c").write_text(source)
        subprocess.run([COMPILER, str(program.with_suffix(".c")), "-o", str(program)], check=True)
        return json.loads(subprocess.run([str(program)], check=True, capture_output=True).stdout)


class AbiTest(unittest.TestCase):
    def test_every_size_offset_and_number_is_the_compilers(self):
        found = compiled()
        for struct in _abi.STRUCTS:
            name = struct.__name__
            self.assertEqual(ctypes.sizeof(struct), found[name], name)
            for field, _ in struct._fields_:
                descriptor = getattr(struct, field)
                self.assertEqual([descriptor.offset, descriptor.size], found[f"{name}.{field}"],
                                 f"{name}.{field}")
        for name, value in CONSTANTS.items():
            self.assertEqual(value, found[name], name)

    def test_every_field_of_the_header_is_there_in_order(self):
        declared = declared_structs()
        self.assertGreaterEqual(len(declared), 9)
        self.assertEqual({struct.__name__: [field for field, _ in struct._fields_]
                          for struct in _abi.STRUCTS}, declared)

    def test_every_function_of_the_header_is_bound(self):
        declared = re.findall(r"HF_API [\w\s*]*?\b(hf_\w+)\(([^)]*)\)", header_text())
        self.assertEqual({name for name, _ in declared}, set(_abi.FUNCTIONS))
        for name, arguments in declared:
            count = 0 if arguments.strip() == "void" else arguments.count(",") + 1
            self.assertEqual(len(_abi.FUNCTIONS[name][1]), count, name)

    def test_every_constant_of_the_header_is_known(self):
        declared = set(re.findall(r"^#define (HF_\w+)", header_text(), re.M))
        declared |= set(re.findall(r"\b(HF_[A-Z_]+) = \d", header_text()))
        self.assertEqual(declared - NOT_MIRRORED, set(CONSTANTS))

    def test_every_code_has_its_exception(self):
        for code in errors.Code:
            error = errors.error_of(code, "text")
            if code != errors.Code.OK:
                self.assertIsNot(type(error), errors.Error, code)
            self.assertEqual(error.code, code)
        unknown = errors.error_of(99, "text")
        self.assertIs(type(unknown), errors.Error)
        self.assertIn("99", str(unknown))


if __name__ == "__main__":
    unittest.main()
