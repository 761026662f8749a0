"""Events for the monitor, for communication libraries other than NCCL (which has a plugin).

    communicator = monitor.Communicator(id=7, ranks=8, rank=2, name="data parallel")
    with communicator.operation(monitor.Kind.ALL_REDUCE, nbytes) as operation:
        ...

What is told here is on this process's monitor board, readable in the middle of a hang
(docs/MONITOR.md). It needs no job and no agent, and never fails: what cannot be watched is not. Any
thread may call; the events of one transfer come from one thread at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
from typing import Iterator, Optional

from . import _abi, _library


class Kind(enum.IntEnum):
    """Of an operation."""

    OTHER = 0
    ALL_REDUCE = 1
    BROADCAST = 2
    REDUCE = 3
    ALL_GATHER = 4
    REDUCE_SCATTER = 5
    ALL_TO_ALL = 6
    GATHER = 7
    SCATTER = 8
    SEND = 9
    RECEIVE = 10
    BARRIER = 11


class Wait(enum.IntEnum):
    """What a step of a transfer waits for."""

    SEND_LOCAL = 3  # the local device has not produced the data
    SEND_PEER = 4  # the receiver has given no credit
    SEND_WIRE = 5  # sent, not completed
    RECEIVE_PEER = 6  # ready to receive, no data
    RECEIVE_FLUSH = 7  # data on their way into the device's memory
    RECEIVE_LOCAL = 8  # the local device has not consumed the data


class Operation:
    """From its enqueueing, which is its making, to `end`."""

    def __init__(self, communicator: "Communicator", kind: Kind, nbytes: int,
                 root_or_peer: int = 0) -> None:
        self._api = communicator._api
        self.id = self._api.hf_operation_begin(communicator.id, int(kind), nbytes, root_or_peer)

    def start(self) -> None:
        """It runs now."""
        self._api.hf_operation_start(self.id)

    def end(self) -> None:
        """It is done, as far as its transfers are."""
        self._api.hf_operation_end(self.id)


class Transfer:
    """A part of an operation over one connection: (channel, peer, direction)."""

    def __init__(self, communicator: "Communicator", operation: Optional[Operation], *,
                 channel: int, peer: int, send: bool, steps: int) -> None:
        self._api = communicator._api
        self.id = self._api.hf_transfer_begin(
            communicator.id, operation.id if operation is not None else 0, channel, peer,
            int(send), steps)

    def begin_step(self, step: int) -> int:
        """Step `step` (from 0) is open; at most 8 are at once. Returns its id."""
        return self._api.hf_step_begin(self.id, step)

    def wait(self, step_id: int, state: Wait, nbytes: int = 0) -> None:
        """What the step waits for now."""
        self._api.hf_step_wait(step_id, int(state), nbytes)

    def end_step(self, step_id: int) -> None:
        self._api.hf_step_end(step_id)

    def end(self) -> None:
        self._api.hf_transfer_end(self.id)


class Communicator:
    """A communicator of this process, until `close`. `id` is the same on all its ranks and no
    other's in the job. Raises LibraryNotFound."""

    def __init__(self, *, id: int, ranks: int, rank: int, nodes: int = 0, name: str = "") -> None:
        self._api = _library.library()
        options = _abi.hf_communicator_options(
            struct_bytes=ctypes.sizeof(_abi.hf_communicator_options), id=id,
            name=name.encode("utf-8", "replace"), ranks=ranks, rank=rank, nodes=nodes)
        self.id = self._api.hf_monitor_communicator(ctypes.byref(options))

    def close(self) -> None:
        self._api.hf_monitor_close(self.id)

    def moved_by_this_thread(self) -> None:
        """The calling thread moves the transfers: the agent watches whether it gets a CPU."""
        self._api.hf_monitor_thread(self.id)

    def __enter__(self) -> "Communicator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def operation(self, kind: Kind, nbytes: int, root_or_peer: int = 0) -> Iterator[Operation]:
        """An operation that runs during the block."""
        operation = Operation(self, kind, nbytes, root_or_peer)
        operation.start()
        try:
            yield operation
        finally:
            operation.end()


def step_done(step: int) -> None:
    """Training iteration `step` is done; shown on the board. (`Job.heartbeat` does it, too.)"""
    _library.library().hf_heartbeat(None, step)


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """What the loop does now, on the board, without a job. Nests up to 8 deep; cut at 31 bytes."""
    api = _library.library()
    api.hf_section_begin(None, name.encode("utf-8", "replace"))
    try:
        yield
    finally:
        api.hf_section_end(None)
