"""Holdfast for Python: checkpoints that outlive the training process.

`Checkpointer` is the comfortable layer (and `holdfast.torch.Checkpointer` for PyTorch); `Job` is
the C ABI, one method per function. Pure Python over libholdfast.so (ctypes), with no dependency;
numpy and torch are used only if their arrays are given. docs/PYTHON.md is the guide.
"""

from . import memory, monitor, values, witness
from ._library import library_path, library_version
from .checkpointer import Checkpointer, Resumed
from .errors import (Aborted, AlreadyExists, Code, DataLoss, DeadlineExceeded, Error,
                     FailedPrecondition, Internal, InvalidArgument, LibraryNotFound, NotFound,
                     PermissionDenied, ResourceExhausted, Unavailable, Unimplemented)
from .job import (ALL_GROUPS, Blob, Buffer, CheckSource, Copies, Faults, Info, Job, Restored,
                  RestoreFrom, SaveReport, SaveState, Scope)
from .layout import replicated
from .memory import Memory, memory_of

__version__ = "0.1.0"

__all__ = [
    "ALL_GROUPS", "Aborted", "AlreadyExists", "Blob", "Buffer", "CheckSource", "Checkpointer",
    "Code", "Copies", "DataLoss", "DeadlineExceeded", "Error", "FailedPrecondition", "Faults",
    "Info", "Internal", "InvalidArgument", "Job", "LibraryNotFound", "Memory", "NotFound",
    "PermissionDenied", "ResourceExhausted", "Restored", "RestoreFrom", "Resumed", "SaveReport",
    "SaveState", "Scope", "Unavailable", "Unimplemented", "library_path", "library_version",
    "memory", "memory_of", "monitor", "replicated", "values", "witness"]
