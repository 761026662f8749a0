"""The C ABI as Python: one method per function of hook/holdfast.h, whose contracts hold.

Times are seconds (float), None means without limit; durations in results are nanoseconds, as in C.
Steps are numbers of finished training iterations. A blocking call returns when it has ended, not
when a signal arrives: Ctrl-C is seen then.

Threads: a Job is used by one thread at a time, except `heartbeat` and `section`, which any thread
may call. Calls let other Python threads run.
Forks: in a forked child (data-loader workers) every call on the job raises FailedPrecondition.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import json
import math
import operator
from typing import Any, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from . import _abi, _library
from .errors import Error, FailedPrecondition, InvalidArgument, error_of
from .memory import Memory, current_stream, memory_of

ALL_GROUPS = _abi.ALL_GROUPS

# A blocked step is worse than a lost checkpoint: past it the capture is cancelled.
CAPTURE_SECONDS = 60.0
REGISTER_SECONDS = 120.0
RESTORE_SECONDS = 3600.0
COMMIT_SECONDS = 600.0


class Faults(enum.IntFlag):
    """What a commit survives."""

    PROCESS = _abi.SURVIVE_PROCESS  # any one process dies
    POWER = _abi.SURVIVE_POWER  # the machine loses power


class Scope(enum.IntEnum):
    """Of a blob."""

    GLOBAL = _abi.BLOB_GLOBAL  # one for the job: rank 0's is kept
    RANK = _abi.BLOB_RANK  # one per rank


class CheckSource(enum.IntEnum):
    """How much of an image is compared with the tensors once more in `wait_captured`."""

    NONE = 0
    SAMPLE = 1
    ALL = 2


class Copies(enum.IntEnum):
    """How many ranks capture a tensor that several of them hold. One copy is written to storage
    whatever this says."""

    ONCE = _abi.COPIES_ONCE
    PER_NODE = _abi.COPIES_PER_NODE  # one agent is one node: as ONCE
    ALL = _abi.COPIES_ALL  # the others stay in memory, and must be equal: else the save fails


class SaveState(enum.IntEnum):
    NONE = 0
    CAPTURING = 1
    CAPTURED = 2  # in the agent's memory, this rank
    COMMITTED_PROCESS = 3  # all ranks
    COMMITTED_POWER = 4
    FAILED = 5


class RestoreFrom(enum.IntEnum):
    """What became of `restore_from`."""

    NOT_GIVEN = _abi.RESTORE_FROM_NOT_GIVEN
    USED = _abi.RESTORE_FROM_USED  # it is the restore point
    IGNORED = _abi.RESTORE_FROM_IGNORED  # the job has a restore point of its own


class Buffer(NamedTuple):
    """A piece of memory in which the layout document places segments of tensors.

    name: as in the document; "<state>/<tensor>" unless it says otherwise. array: see memory.py.
    group: 0 to 63; captured in this order, and `wait_captured` can wait for one.
    """

    name: str
    array: Any
    group: int = 0


class Blob(NamedTuple):
    """A slot for bytes that are no tensor. A save with more than capacity_bytes fails by name."""

    name: str
    scope: Scope
    capacity_bytes: int


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore` did. attempt, world_size: of the run that made the checkpoint. tensor_states:
    how many were filled, of those of which this rank holds something; the others were left out."""

    step: int
    attempt: int
    world_size: int
    bytes: int
    bytes_from_memory: int
    nanoseconds: int
    tensor_states: int
    tensor_states_left_out: int
    restore_from: RestoreFrom


@dataclasses.dataclass(frozen=True)
class Info:
    """committed_*_step: the newest of this attempt that survives that fault; None: none yet."""

    attempt: int
    fenced: bool
    connected: bool
    reconnect_count: int
    committed_process_step: Optional[int]
    committed_power_step: Optional[int]
    image_bytes: int
    block_bytes: int


@dataclasses.dataclass(frozen=True)
class SaveReport:
    """One save of this rank. error: None, or why it failed. Times: see hf_save_report; 0: not
    yet. device_bytes, unpinned_bytes, gate_ns, device_ns: of buffers on devices."""

    step: int
    state: SaveState
    image_bytes: int
    blocks: int
    blocks_captured: int
    blocks_flushed: int
    call_ns: int
    blocked_ns: int
    capture_ns: int
    flush_ns: int
    commit_ns: int
    error: Optional[Error]
    device_bytes: int = 0
    unpinned_bytes: int = 0
    gate_ns: int = 0
    device_ns: int = 0

    @property
    def device_bytes_per_second(self) -> float:
        """How fast devices were copied from: over their bus (PCIe), once the streams had come to the
        save. 0.0: nothing was."""
        return self.device_bytes / self.device_ns * 1e9 if self.device_ns > 0 else 0.0

    @property
    def hidden_ns(self) -> int:
        """How much of the capture training did not wait for; 0: it is not over."""
        return max(self.capture_ns - self.blocked_ns, 0)


def _nanoseconds(seconds: Optional[float], what: str) -> int:
    if seconds is None or seconds == math.inf:
        return _abi.FOREVER
    if not seconds >= 0:
        raise InvalidArgument(f"{what}: expected seconds, at least 0, or None, found {seconds}")
    return min(int(seconds * 1e9), _abi.FOREVER)


def _text(value: Optional[str], what: str) -> Optional[bytes]:
    if value is None:
        return None
    encoded = value.encode()
    if b"\0" in encoded:
        raise InvalidArgument(f"{what}: expected text without NUL, found {value!r}")
    return encoded


def _number(value: Any, what: str, low: int, high: int) -> int:
    """ctypes would cut a number that does not fit."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise InvalidArgument(f"{what}: expected a number from {low} to {high}, found {value!r}")
    return number


def _patterns(patterns: Sequence[str], what: str) -> Tuple[Any, int]:
    if isinstance(patterns, (str, bytes)):
        raise InvalidArgument(f"{what}: expected a list of patterns, found {patterns!r}")
    texts = [_text(pattern, what) for pattern in patterns]
    return (ctypes.c_char_p * len(texts))(*texts), len(texts)


def _step(step: int) -> int:
    return _number(step, "step", 0, 2**64 - 1)


def _bytes_of(name: str, data: Any) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        return memoryview(data).cast("B").tobytes()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"blob '{name}': expected bytes, found {type(data).__name__}") from error


class Job:
    """One rank of a job: `hf_open` to `hf_close`. A context manager."""

    def __init__(self, job: Optional[str] = None, *, rank: Optional[int] = None,
                 world_size: Optional[int] = None, local_rank: Optional[int] = None,
                 attempt_key: Optional[str] = None, root: Optional[str] = None,
                 socket: Optional[str] = None, private_agent: Optional[bool] = None,
                 check_source: Optional[CheckSource] = None, copy_threads: int = 0,
                 restore_from: Optional[str] = None, copies: Optional[Copies] = None,
                 timeout: float = 30.0):
        """Joins the job's current attempt, or begins the next one, which fences the older at once.
        Starts a private agent if none listens and that is allowed.

        What is not given comes from the environment: HOLDFAST_JOB, RANK, WORLD_SIZE, LOCAL_RANK,
        HOLDFAST_ATTEMPT_KEY (else torchrun's), HOLDFAST_ROOT, HOLDFAST_SOCKET, HOLDFAST_PRIVATE,
        HOLDFAST_CHECK_SOURCE, HOLDFAST_COPY_THREADS, HOLDFAST_RESTORE_FROM, HOLDFAST_COPIES.
        restore_from: a checkpoint's directory, or ROOT/JOB for its newest, of any job: what a job
        starts from that has no checkpoint of its own; the same on every rank; "": none. timeout:
        seconds, above 0.
        """
        self._handle: Optional[ctypes.c_void_p] = None
        self._buffers: Tuple[Tuple[str, Memory], ...] = ()
        self._captured_from: Tuple[Memory, ...] = ()  # what the last save reads, if not _buffers
        self._devices: Tuple[int, ...] = ()  # of the registered buffers
        self._api = _library.library()
        options = _abi.hf_open_options(
            struct_bytes=ctypes.sizeof(_abi.hf_open_options),
            job=_text(job, "job"),
            rank=-1 if rank is None else _number(rank, "rank", 0, 2**62),
            world_size=-1 if world_size is None else _number(world_size, "world_size", 1, 2**62),
            local_rank=-1 if local_rank is None else _number(local_rank, "local_rank", 0, 2**62),
            attempt_key=_text(attempt_key, "attempt_key"), root=_text(root, "root"),
            socket=_text(socket, "socket"),
            private_agent=-1 if private_agent is None else int(bool(private_agent)),
            check_source=-1 if check_source is None else CheckSource(check_source),
            copy_threads=_number(copy_threads, "copy_threads", 0, 2**31 - 1),
            restore_from=_text(restore_from, "restore_from"),
            deadline_ns=max(1, _nanoseconds(timeout, "timeout")),
            copies=-1 if copies is None else Copies(copies))
        handle = ctypes.c_void_p()
        self._call(self._api.hf_open, ctypes.byref(options), ctypes.byref(handle))
        self._handle = handle

    @staticmethod
    def _call(function: Any, *arguments: Any) -> None:
        error = _abi.hf_error()
        code = function(*arguments, ctypes.byref(error))
        if code != 0:
            raise error_of(code, error.text.decode("utf-8", "replace"))

    @property
    def _open(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise FailedPrecondition("the job is closed")
        return self._handle

    def close(self) -> None:
        """Ends this rank's part. What was captured is still flushed and committed by the agent; a
        capture under way gets 10 s, then its image is void. Again: does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._api.hf_close(handle)
        self._buffers = ()
        self._captured_from = ()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def register(self, layout: Union[str, bytes, Mapping[str, Any]],
                 buffers: Sequence[Union[Buffer, Tuple[Any, ...]]],
                 blobs: Sequence[Union[Blob, Tuple[Any, ...]]] = (), *,
                 timeout: Optional[float] = REGISTER_SECONDS) -> None:
        """Registers what will be captured. layout: the job's layout document, the same on every
        rank (docs/layout-grammar.md), as JSON or as what json.dumps turns into it. buffers: exactly
        those in which it places something on this rank. A second call replaces the registration;
        after an error nothing is registered. The arrays are kept alive until then, or until
        `close`.
        """
        document = layout if isinstance(layout, (str, bytes)) else json.dumps(layout)
        if isinstance(document, str):
            document = document.encode()
        if b"\0" in document:
            raise InvalidArgument("layout: expected JSON, found a NUL in it")
        memories: List[Tuple[str, Memory]] = []
        c_buffers = (_abi.hf_buffer * len(buffers))()
        for index, item in enumerate(buffers):
            buffer = Buffer(*item)
            memory = memory_of(buffer.array, f"buffer '{buffer.name}'")
            c_buffers[index] = _abi.hf_buffer(
                _text(buffer.name, "buffer name"), memory.address, memory.bytes,
                _number(buffer.group, f"buffer '{buffer.name}': group", 0, 2**32 - 1))
            memories.append((buffer.name, memory))
        slots = [Blob(*item) for item in blobs]
        c_blobs = (_abi.hf_blob_slot * len(slots))(*[
            _abi.hf_blob_slot(_text(slot.name, "blob name"), Scope(slot.scope),
                              _number(slot.capacity_bytes, f"blob '{slot.name}': capacity_bytes", 0,
                                      2**64 - 1))
            for slot in slots])
        deadline = _nanoseconds(timeout, "timeout")
        # A capture of the old registration may read the old arrays until the call has returned.
        before = (self._buffers, self._captured_from)
        self._call(self._api.hf_register, self._open, document, c_buffers, len(buffers), c_blobs,
                   len(slots), deadline)
        self._buffers, self._captured_from = tuple(memories), ()
        self._devices = tuple(sorted({memory.device for _, memory in memories
                                      if memory.device is not None and memory.bytes > 0}))
        del before

    def _streams(self, given: Optional[Sequence[int]]) -> Tuple[Any, int]:
        handles = [current_stream(device) for device in self._devices] if given is None else [
            _number(handle, "streams", 0, 2**64 - 1) for handle in given]
        return (ctypes.c_void_p * len(handles))(*handles), len(handles)

    def due(self, step: int) -> bool:
        """True if a save is due after this step. All ranks get one answer. False without an
        agent."""
        return self._api.hf_due(self._open, _step(step)) != 0

    def save(self, step: int, blobs: Optional[Mapping[str, Any]] = None, *,
             arrays: Optional[Sequence[Any]] = None, wait: float = 0.0,
             streams: Optional[Sequence[int]] = None) -> None:
        """Starts capturing the state after `step`; the copy runs behind the next step. The tensors
        must not change before `wait_captured` has returned.

        blobs: name to bytes, of those registered that exist at this step; copied in the call.
        arrays: None: those registered. Else one per buffer, in the order of `register`: for arrays
        that moved; each must have the registered dtype and shape.
        wait: seconds for free image memory; 0: fail at once with ResourceExhausted.
        streams: for arrays on CUDA devices: handles of the streams behind whose work they are
        captured, at most one per device (a device without one: its default stream). None: torch's
        current streams.
        """
        handle = self._open
        memories = None if arrays is None else self._checked(arrays)
        options = _abi.hf_save_options(struct_bytes=ctypes.sizeof(_abi.hf_save_options),
                                       wait_ns=_nanoseconds(wait, "wait"))
        options.streams, options.stream_count = self._streams(streams)
        if memories is not None:
            options.pointers = (ctypes.c_void_p * len(memories))(*[m.address for m in memories])
        if blobs:
            contents = [(_text(name, "blob name"), _bytes_of(name, data))
                        for name, data in blobs.items()]
            options.blobs = (_abi.hf_blob * len(contents))(*[
                _abi.hf_blob(name, ctypes.cast(data, ctypes.c_void_p), len(data))
                for name, data in contents])
            options.blob_count = len(contents)
        self._call(self._api.hf_save, handle, _step(step), ctypes.byref(options))
        self._captured_from = memories or ()

    def _checked(self, arrays: Sequence[Any]) -> Tuple[Memory, ...]:
        if len(arrays) != len(self._buffers):
            raise InvalidArgument(f"arrays: expected {len(self._buffers)}, one per registered "
                                  f"buffer, found {len(arrays)}")
        memories = []
        for (name, registered), array in zip(self._buffers, arrays):
            memory = memory_of(array, f"buffer '{name}'")
            if (memory.dtype, memory.shape) != (registered.dtype, registered.shape):
                raise InvalidArgument(
                    f"buffer '{name}': expected {registered.dtype} {registered.shape} as "
                    f"registered, found {memory.dtype} {memory.shape}")
            memories.append(memory)
        return tuple(memories)

    def wait_captured(self, group: int = ALL_GROUPS, *,
                      timeout: Optional[float] = CAPTURE_SECONDS) -> None:
        """Waits until the last save's tensors (of one group, or all) may change. Returns at once if
        nothing is being captured. DeadlineExceeded: the capture was cancelled, the image is void,
        the tensors may change all the same. Aborted: a tensor changed under capture (named)."""
        self._call(self._api.hf_wait_captured, self._open,
                   _number(group, "group", -2**31, 2**31 - 1), _nanoseconds(timeout, "timeout"))

    def wait_committed(self, step: int, faults: Faults = Faults.POWER, *,
                       timeout: Optional[float] = COMMIT_SECONDS) -> None:
        """Waits until the checkpoint of `step` of this attempt survives at least `faults`. Raises
        the failure of that save (full disk, a rank that did not save); Unimplemented for a fault
        that is not offered."""
        self._call(self._api.hf_wait_committed, self._open, _step(step),
                   _number(faults, "faults", 0, 2**32 - 1), _nanoseconds(timeout, "timeout"))

    def restore(self, *, tensors: Sequence[str] = (), states: Sequence[str] = (),
                timeout: Optional[float] = RESTORE_SECONDS,
                streams: Optional[Sequence[int]] = None) -> Restored:
        """Fills the registered buffers from the attempt's restore point: the newest committed
        checkpoint, in whatever layout it was saved. Raises NotFound if there is none (buffers
        untouched), but never if `restore_from` was given; after any other error the buffers'
        contents are unspecified.

        tensors, states: patterns of names (`*`: any characters, `{NAME}`: a whole number); only
        what fits one of each is filled, everything else stays as it is and need not be in the
        checkpoint; none: everything. InvalidArgument: a pattern that fits nothing in the layout.
        streams: as in `save`: arrays on devices are filled behind their work.
        """
        options = _abi.hf_restore_options(struct_bytes=ctypes.sizeof(_abi.hf_restore_options))
        options.tensors, options.tensor_count = _patterns(tensors, "tensors")
        options.states, options.state_count = _patterns(states, "states")
        options.streams, options.stream_count = self._streams(streams)
        result = _abi.hf_restore_result(struct_bytes=ctypes.sizeof(_abi.hf_restore_result))
        self._call(self._api.hf_restore_partial, self._open, ctypes.byref(options),
                   ctypes.byref(result), _nanoseconds(timeout, "timeout"))
        return Restored(result.step, result.attempt, result.world_size, result.bytes,
                        result.bytes_from_memory, result.nanoseconds, result.tensor_states,
                        result.tensor_states_left_out, RestoreFrom(result.restore_from))

    def restored_blob(self, name: str, rank: Optional[int] = None) -> bytes:
        """A blob of the checkpoint that `restore` read; a copy. rank: of the old run, for rank
        blobs; None: global, or "mine", which is InvalidArgument or FailedPrecondition on another
        world size (ask for all old ranks then). Raises NotFound if there is none."""
        data = ctypes.c_void_p()
        size = ctypes.c_uint64()
        self._call(self._api.hf_restored_blob, self._open, _text(name, "blob name"),
                   -1 if rank is None else _number(rank, "rank", 0, 2**62), ctypes.byref(data),
                   ctypes.byref(size))
        return ctypes.string_at(data.value, size.value) if size.value else b""

    def info(self) -> Info:
        """The job now; no system call beyond a look into shared memory."""
        info = _abi.hf_info(struct_bytes=ctypes.sizeof(_abi.hf_info))
        code = self._api.hf_get_info(self._open, ctypes.byref(info))
        if code != 0:
            raise error_of(code, "hf_get_info: not in this process")
        return Info(info.attempt, info.fenced != 0, info.connected != 0, info.reconnect_count,
                    _step_or_none(info.committed_process_step),
                    _step_or_none(info.committed_power_step), info.image_bytes, info.block_bytes)

    def report(self, step: Optional[int] = None) -> SaveReport:
        """Of the save of `step`; None: the last one. Raises NotFound if it is too old or there is
        none."""
        report = _abi.hf_save_report(struct_bytes=ctypes.sizeof(_abi.hf_save_report))
        wanted = _abi.LAST_STEP if step is None else _step(step)
        code = self._api.hf_report(self._open, wanted, ctypes.byref(report))
        if code != 0:
            raise error_of(code, "no report of " + ("any save" if step is None else f"step {step}"))
        error = None
        if report.error.code != 0:
            error = error_of(report.error.code, report.error.text.decode("utf-8", "replace"))
        numbers = {field.name: getattr(report, field.name)
                   for field in dataclasses.fields(SaveReport)
                   if field.name not in ("state", "error")}
        return SaveReport(state=SaveState(report.state), error=error, **numbers)

    def heartbeat(self, step: int) -> None:
        """Says that the loop is alive and at `step`. Any thread; one store to shared memory."""
        self._api.hf_heartbeat(self._open, _step(step))

    def section_begin(self, name: str) -> None:
        """What the loop does now ("forward"). Any thread; nests up to 8 deep; cut at 31 bytes."""
        self._api.hf_section_begin(self._open, _text(name, "section"))

    def section_end(self) -> None:
        """Ends the innermost section."""
        self._api.hf_section_end(self._open)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """`section_begin` and `section_end` around a block."""
        self.section_begin(name)
        try:
            yield
        finally:
            self.section_end()


def _step_or_none(step: int) -> Optional[int]:
    return None if step == _abi.NO_STEP else step
