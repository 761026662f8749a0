#!/usr/bin/python3
"""`pip install ./hook/python` without network, setuptools or wheel, and what it installs.

Usage: install_test.py PACKAGE        PACKAGE: hook/python        ($HOLDFAST_LIBRARY: the library)
"""
import email
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile

PACKAGE = pathlib.Path(sys.argv.pop(1)).resolve()

USE = """
import holdfast, pathlib, sys
assert pathlib.Path(holdfast.__file__).is_relative_to(sys.argv[1]), holdfast.__file__
print(holdfast.__version__, holdfast.library_version())
"""


def tree(directory):
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts}


class InstallTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.place = pathlib.Path(directory.name).resolve()

    def run_command(self, *command):
        environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1",
                       "HOME": str(self.place), "HOLDFAST_LIBRARY": os.environ["HOLDFAST_LIBRARY"],
                       # No index answers there: whoever asks one fails.
                       "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0",
                       "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        result = subprocess.run([str(part) for part in command], env=environment, cwd=self.place,
                                capture_output=True, text=True, timeout=100)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        return result.stdout

    def test_pip_installs_into_a_fresh_virtual_environment_and_leaves_the_source_alone(self):
        before = tree(PACKAGE)
        self.run_command("/usr/bin/python3", "-m", "venv", self.place / "venv")
        python = self.place / "venv" / "bin" / "python"
        self.run_command(python, "-m", "pip", "install", PACKAGE)
        self.assertEqual(self.run_command(python, "-c", USE, self.place / "venv").split(),
                         ["0.1.0", "0.1.0"])
        self.run_command(python, "-m", "pip", "check")
        files = self.run_command(python, "-m", "pip", "show", "--files", "holdfast")
        for path in (PACKAGE / "holdfast").glob("*.py"):
            self.assertIn(f"holdfast/{path.name}", files)
        self.assertIn("holdfast/py.typed", files)
        self.assertIn("Version: 0.1.0", files)
        self.run_command(python, "-m", "pip", "uninstall", "--yes", "holdfast")
        self.assertEqual(list((self.place / "venv").rglob("site-packages/holdfast/*.py")), [])
        # An editable one follows the source.
        self.run_command(python, "-m", "pip", "install", "--editable", PACKAGE)
        self.run_command(python, "-c", USE, PACKAGE)
        self.assertEqual(tree(PACKAGE), before)

    def test_the_same_tree_gives_the_same_wheel_and_the_archive_of_the_source_builds_it(self):
        build = ("import sys; sys.path.insert(0, sys.argv[1] + '/build_backend'); "
                 "import holdfast_build; print(getattr(holdfast_build, sys.argv[2])(sys.argv[3]))")
        wheels = []
        for name in ("one", "two"):
            (self.place / name).mkdir()
            file_name = self.run_command(sys.executable, "-c", build, PACKAGE, "build_wheel",
                                         self.place / name).strip()
            wheels.append(self.place / name / file_name)
        self.assertEqual(wheels[0].read_bytes(), wheels[1].read_bytes())
        with zipfile.ZipFile(wheels[0]) as wheel:
            self.assertIsNone(wheel.testzip())
            metadata = email.message_from_bytes(wheel.read("holdfast-0.1.0.dist-info/METADATA"))
        self.assertEqual((metadata["Name"], metadata["Version"]), ("holdfast", "0.1.0"))
        archive = self.run_command(sys.executable, "-c", build, PACKAGE, "build_sdist",
                                   self.place).strip()
        with tarfile.open(self.place / archive) as source:
            source.extractall(self.place)
        (self.place / "three").mkdir()
        self.run_command(sys.executable, "-c", build, self.place / "holdfast-0.1.0", "build_wheel",
                         self.place / "three")
        self.assertEqual((self.place / "three" / wheels[0].name).read_bytes(),
                         wheels[0].read_bytes())


if __name__ == "__main__":
    unittest.main()
