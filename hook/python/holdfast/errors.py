"""What the package raises.

Every failure of the library is an `Error` of the class of its code, with the library's own text
(what failed, the thing's name, expected and found). `except holdfast.Error` catches whatever
Holdfast can do wrong, so that training can go on without it.
"""

from __future__ import annotations

import enum
from typing import Optional


class Code(enum.IntEnum):
    """`hf_code`: the numbers are those of absl::StatusCode and gRPC."""

    OK = 0
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15


class Error(Exception):
    """Base of everything that the package raises.

    code: a `Code`; None if the library was not asked (LibraryNotFound, numbers of a newer library).
    text: what failed, and which.
    """

    code: Optional[Code] = None

    def __init__(self, text: str, code: Optional[Code] = None):
        super().__init__(text)
        self.text = text
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return self.text if self.code is None else f"{self.text} ({self.code.name})"

    def __reduce__(self):
        return type(self), (self.text, self.code)


class InvalidArgument(Error, ValueError):
    """A value of the caller's is wrong: fix the program."""

    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(Error, TimeoutError):
    """The call's timeout passed. After `wait_captured` the image is void and tensors may change."""

    code = Code.DEADLINE_EXCEEDED


class NotFound(Error, LookupError):
    """`restore`: there is no checkpoint; start from the beginning."""

    code = Code.NOT_FOUND


class AlreadyExists(Error):
    """That step of this attempt is there already."""

    code = Code.ALREADY_EXISTS


class PermissionDenied(Error):
    """Another user's directory, socket or job."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(Error):
    """No free image memory (earlier saves are still flushing), no disk space, budget too small."""

    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(Error):
    """Order of calls; a forked child; fenced by a newer attempt; a closed job."""

    code = Code.FAILED_PRECONDITION


class Aborted(Error):
    """The image was voided: a tensor changed under capture (named), or the capture was
    cancelled."""

    code = Code.ABORTED


class Unimplemented(Error):
    """Asked for a fault that is not offered."""

    code = Code.UNIMPLEMENTED


class Internal(Error):
    """A bug of Holdfast's."""

    code = Code.INTERNAL


class Unavailable(Error):
    """No agent now; a retry may help. Training goes on, nothing is checkpointed."""

    code = Code.UNAVAILABLE


class DataLoss(Error):
    """Stored bytes are wrong; the text names file, tensor and offset."""

    code = Code.DATA_LOSS


class LibraryNotFound(Error, ImportError):
    """libholdfast.so was not found, or is not of this package's version. The text lists every place
    that was tried, and why it did not serve."""


_BY_CODE = {cls.code: cls for cls in Error.__subclasses__() if cls.code is not None}


def error_of(code: int, text: str) -> Error:
    """The exception for a code that the library returned."""
    try:
        known = Code(code)
    except ValueError:
        return Error(f"{text} (code {code})")
    return _BY_CODE.get(known, Error)(text, known)
