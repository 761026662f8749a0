"""The build backend (PEP 517, PEP 660): a wheel is a ZIP of the package and three small text files.

Own, because there is nothing to build, and because the usual ones must be downloaded: this works on
machines without network, with whatever pip is there. It writes nothing into the source tree.
Formats: https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

import base64
import hashlib
import io
import pathlib
import re
import tarfile
import zipfile

HERE = pathlib.Path(__file__).resolve().parent.parent
TAG = "py3-none-any"
# A ZIP cannot say less; the same tree gives the same bytes.
TIME = (1980, 1, 1, 0, 0, 0)


def _field(name):
    """A string of pyproject.toml's [project] table (tomllib came with Python 3.11)."""
    text = (HERE / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(rf'^{re.escape(name)} = "([^"\\]*)"$', text, re.M).group(1)


def _metadata():
    return (f"Metadata-Version: 2.1\nName: {_field('name')}\nVersion: {_field('version')}\n"
            f"Summary: {_field('description')}\nRequires-Python: {_field('requires-python')}\n")


def _stem():
    return f"{_field('name')}-{_field('version')}"


def _package_files():
    return sorted(path for path in (HERE / "holdfast").rglob("*")
                  if path.suffix == ".py" or path.name == "py.typed")


def _write_wheel(directory, contents):
    """contents: name in the wheel to bytes. Returns the file's name."""
    info = f"{_stem()}.dist-info"
    contents = dict(contents)
    contents[f"{info}/METADATA"] = _metadata().encode()
    contents[f"{info}/WHEEL"] = (f"Wheel-Version: 1.0\nGenerator: holdfast_build\n"
                                 f"Root-Is-Purelib: true\nTag: {TAG}\n").encode()
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in contents.items()]
    record.append(f"{info}/RECORD,,")
    contents[f"{info}/RECORD"] = ("\n".join(record) + "\n").encode()
    file_name = f"{_stem()}-{TAG}.whl"
    with zipfile.ZipFile(pathlib.Path(directory) / file_name, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, TIME)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, data)
    return file_name


def _digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _write_wheel(wheel_directory, {path.relative_to(HERE).as_posix(): path.read_bytes()
                                          for path in _package_files()})


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _write_wheel(wheel_directory, {"holdfast.pth": f"{HERE}\n".encode()})


def build_sdist(sdist_directory, config_settings=None):
    file_name = f"{_stem()}.tar.gz"
    with tarfile.open(pathlib.Path(sdist_directory) / file_name, "w:gz") as archive:
        for path in [HERE / "pyproject.toml", pathlib.Path(__file__).resolve(), *_package_files()]:
            archive.add(path, f"{_stem()}/{path.relative_to(HERE).as_posix()}")
        info = tarfile.TarInfo(f"{_stem()}/PKG-INFO")
        metadata = _metadata().encode()
        info.size = len(metadata)
        archive.addfile(info, io.BytesIO(metadata))
    return file_name
