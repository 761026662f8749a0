"""Python values as bytes and back, for blobs: None, bool, int, float, str, bytes, list, tuple and
dict, nested, and nothing else.

Not pickle: reading a checkpoint must not be able to run code. What comes back equals what was
given, bit for bit and type for type (subclasses come back as their base: a Counter as a dict). The
bytes are strict JSON, so that other tools can read them; what JSON lacks is an object with the
member "!":

  {"!": "tuple", "items": [...]}         {"!": "dict", "items": [[key, value], ...]}
  {"!": "bytes", "base64": "..."}        {"!": "float", "text": "nan" | "inf" | "-inf"}

A dict whose keys are all text, and none of them "!", is a plain object.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

from .errors import DataLoss, InvalidArgument

DEPTH_MAX = 64


def encode(value: Any, what: str = "value") -> bytes:
    """Raises InvalidArgument, naming the path in `what`, for anything that is not listed above."""
    try:
        return json.dumps(_to_json(value, what, 0), allow_nan=False, ensure_ascii=True,
                          separators=(",", ":")).encode("ascii")
    except InvalidArgument:
        raise
    except ValueError as error:  # an int of more digits than Python turns into text
        raise InvalidArgument(f"{what}: {error}") from error


def decode(data: bytes, what: str = "value") -> Any:
    """The value of `encode`. Raises DataLoss for bytes that it does not make."""
    try:
        return _from_json(json.loads(data.decode("ascii"), parse_constant=_no_constant), 0)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataLoss(
            f"{what}: not a value that holdfast.values.encode writes: {error}") from error


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _to_json(value: Any, path: str, depth: int) -> Any:
    if depth > DEPTH_MAX:
        raise InvalidArgument(f"{path}: nested deeper than {DEPTH_MAX}, or within itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else {"!": "float", "text": str(value)}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return {"!": "bytes", "base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        items = [_to_json(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"!": "tuple", "items": items}
    if isinstance(value, dict):
        if all(isinstance(key, str) and key != "!" for key in value):
            return {str(key): _to_json(item, f"{path}.{key}", depth + 1)
                    for key, item in value.items()}
        return {"!": "dict", "items": [
            [_to_json(key, f"key {key!r} of {path}", depth + 1),
             _to_json(item, f"{path}[{key!r}]", depth + 1)] for key, item in value.items()]}
    raise InvalidArgument(
        f"{path}: expected None, bool, int, float, str, bytes, list, tuple or dict, found "
        f"{type(value).__module__}.{type(value).__qualname__} (arrays belong to the tensors; "
        ".item() makes a number of a scalar)")


def _from_json(value: Any, depth: int) -> Any:
    if depth > DEPTH_MAX:
        raise ValueError(f"nested deeper than {DEPTH_MAX}")
    if isinstance(value, list):
        return [_from_json(item, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if "!" not in value:
        return {key: _from_json(item, depth + 1) for key, item in value.items()}
    kind = value["!"]
    if kind == "tuple":
        return tuple(_from_json(item, depth + 1) for item in value["items"])
    if kind == "dict":
        return {_from_json(key, depth + 1): _from_json(item, depth + 1)
                for key, item in value["items"]}
    if kind == "bytes":
        try:
            return base64.b64decode(value["base64"], validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from error
    if kind == "float" and value["text"] in ("nan", "inf", "-inf"):
        return float(value["text"])
    raise ValueError(f"unknown kind {kind!r}")
