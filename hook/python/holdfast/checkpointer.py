"""The comfortable layer: named arrays and a little Python state, saved every N steps and restored.

    with Checkpointer({"param": weights, "exp_avg": moments}, every=100) as checkpointer:
        resumed = checkpointer.restore()
        step = resumed.step if resumed else 0
        while step < steps:
            compute_gradients()
            checkpointer.before_update()          # the arrays may change now
            update()
            step += 1
            checkpointer.after_step(step, state={"samples": samples})

Without a layout document the arrays are data parallel and replicated: the same on every rank, of
which each stores a part; any other number of ranks can restore. With one, the arrays are this
rank's buffers.

Failures. Opening and restoring raise: nobody wants to find out a day later that nothing was saved.
From then on training goes on: a failed save is logged (logger "holdfast") and counted, as long as
`on_error` is "log"; "raise" raises.

The order of registrations is the same on every rank (the agent compares the n-th of each): first no
arrays at all, to learn whether there is a checkpoint and what it holds; then the arrays, to restore
them; then, if some lie on rank 0 alone, the arrays as they will be saved.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from typing import (Any, Callable, Collection, Deque, Dict, List, Mapping, Optional, Sequence,
                    Tuple, Union)

from . import values
from .errors import DataLoss, Error, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from .job import (ALL_GROUPS, CAPTURE_SECONDS, COMMIT_SECONDS, REGISTER_SECONDS, RESTORE_SECONDS,
                  Blob, Buffer, Faults, Job, Restored, SaveReport, SaveState, Scope)
from .layout import replicated, split_name
from .memory import DTYPES, Memory, memory_of

LOGGER = logging.getLogger("holdfast")

STATE_BLOB = "state"
RANK_STATE_BLOB = "rank_state"
ARRAYS_BLOB = "arrays"

# A save right behind a registration may wait so long for the memory that it has just been given.
NEW_MEMORY_SECONDS = 5.0

# Saves whose end has not been seen. The oldest is forgotten beyond that.
UNREPORTED_MAX = 16

# "<state>/<tensor>" to array, or state to tensor to array.
Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Resumed(Restored):
    """A restored checkpoint, and the Python values that were saved with it (None: none were).

    rank_state: this rank's; None as well if the checkpoint was made by another number of ranks:
    then `Checkpointer.rank_state_of` gives those of all old ranks.
    """

    state: Any = None
    rank_state: Any = None


def _device_part(report: SaveReport) -> str:
    """What the log says of devices; empty if no array lies on one."""
    if report.device_bytes == 0:
        return ""
    speed = report.device_bytes_per_second / 1e9
    return f"; {report.device_bytes} bytes from devices at {speed:.3g} GB/s"


class Checkpointer:
    """See the module. Threads: one at a time."""

    def __init__(self, arrays: Union[Arrays, Callable[[], Arrays]], *,
                 layout: Optional[Union[str, Mapping[str, Any]]] = None,
                 every: Optional[int] = None,
                 prepare: Optional[Callable[[Dict[str, Tuple[str, Tuple[int, ...]]]], None]] = None,
                 rank_0_states: Collection[str] = (),
                 first_states: Collection[str] = (),
                 state_bytes_max: int = 1 << 16, rank_state_bytes_max: int = 1 << 16,
                 save_wait: float = 0.0, capture_timeout: float = CAPTURE_SECONDS,
                 on_error: str = "log",
                 rank: Optional[int] = None, world_size: Optional[int] = None,
                 **open_options: Any):
        """Opens the job.

        arrays: this rank's, by name "<state>/<tensor>", or nested {state: {tensor: array}}; with a
            layout document: by buffer name. A callable is asked again before every save, for arrays
            that come later or move.
        layout: a layout document, the same on every rank. None: replicated over all ranks.
        every: save after each step that it divides. None: when the agent says so (`Job.due`).
        prepare: for arrays that do not exist yet when a job resumes (an optimizer's before its
            first step): called by `restore`, before it asks for the arrays, with {name: (dtype,
            shape)} of those in the checkpoint. Only without a layout document.
        rank_0_states: states of which rank 0's arrays are saved and all ranks' are restored. Only
            without a layout document.
        first_states: states that are captured first; `before_forward` waits for these.
        state_bytes_max, rank_state_bytes_max: capacity of the Python values as bytes.
        save_wait: seconds that a save may wait for image memory, while earlier ones are flushed.
        capture_timeout: seconds that a capture may hold up an update; past it the save is void.
        rank, world_size: default $RANK and $WORLD_SIZE, or, if neither is set, one rank alone.
        open_options: of Job: job, root, restore_from, attempt_key, socket, check_source, copies, ...
        """
        if layout is not None and (prepare is not None or rank_0_states):
            raise InvalidArgument("prepare, rank_0_states: expected only without a layout document")
        if every is not None and every < 1:
            raise InvalidArgument(f"every: expected at least 1, found {every}")
        if on_error not in ("log", "raise"):
            raise InvalidArgument(f"on_error: expected 'log' or 'raise', found {on_error!r}")
        if rank is None and world_size is None and not {"RANK", "WORLD_SIZE"} & set(os.environ):
            rank, world_size = 0, 1
        self._arrays = arrays
        self._layout = layout
        self._every = every
        self._prepare = prepare
        self._first_states = frozenset(first_states)
        self._blobs = (Blob(STATE_BLOB, Scope.GLOBAL, state_bytes_max),
                       Blob(RANK_STATE_BLOB, Scope.RANK, rank_state_bytes_max))
        self._save_wait = save_wait
        self._capture_timeout = capture_timeout
        self._raise = on_error == "raise"
        self._registered: Optional[Dict[str, Memory]] = None  # as the next save has it
        self._catalog = b""  # the registered arrays, for `prepare` of a later run
        self._capturing = False
        self._unreported: Deque[int] = collections.deque()
        self._last_saved: Optional[int] = None
        self.failure_count = 0
        self.job = Job(rank=rank, world_size=world_size, **open_options)
        self._rank = rank if rank is not None else int(os.environ.get("RANK", "0"))
        self._world_size = (world_size if world_size is not None
                            else int(os.environ.get("WORLD_SIZE", "1")))
        self._rank_0_states = frozenset(rank_0_states if self._world_size > 1 else ())

    # ---- Lifetime

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        """Waits for the commit of the last save, unless an exception is on its way, and closes."""
        try:
            if error_type is None and self._last_saved is not None:
                self.before_update()
                self._attempt("commit", self._wait_committed)
        finally:
            self.close()

    def close(self) -> None:
        """Closes the job; the agent goes on flushing what was captured."""
        self.job.close()

    # ---- Restore

    def restore(self, *, tensors: Sequence[str] = (), states: Sequence[str] = (),
                timeout: Optional[float] = RESTORE_SECONDS) -> Optional[Resumed]:
        """Fills the arrays from the newest committed checkpoint, or, in a job that has none, from
        that of `restore_from`. None: there is none, the arrays are untouched. Any other failure
        raises, and the arrays' contents are unspecified; it may be tried again. Before the first
        save, and on every rank. tensors, states: patterns of what to fill, as in `Job.restore`; what
        they leave out stays as it is. timeout: seconds."""
        if self._registered is not None:
            raise FailedPrecondition("restore comes before the first save, and once")
        # Asks first whether there is a checkpoint, and for its blobs: prepare() needs the catalog
        # before there are arrays.
        self.job.register(replicated({}, self._world_size), (), self._blobs,
                          timeout=REGISTER_SECONDS)
        try:
            self.job.restore(timeout=timeout)
        except NotFound:
            self._register_for_saving()
            return None
        if self._prepare is not None:
            self._prepare(self._restored_catalog())
        arrays = self._collect()
        self._register(arrays, on_all_ranks=True)
        try:
            restored = self.job.restore(tensors=tensors, states=states, timeout=timeout)
        except Error:
            self._registered = None
            raise
        state = self._restored_value(STATE_BLOB, None)
        rank_state = None
        if restored.world_size == self._world_size:
            rank_state = self._restored_value(RANK_STATE_BLOB, self._rank)
        if self._rank_0_states:
            self._register(arrays, on_all_ranks=False)
        return Resumed(state=state, rank_state=rank_state, **dataclasses.asdict(restored))

    def _register_for_saving(self) -> None:
        """Now, so that what is wrong with the arrays is said now."""
        arrays = self._collect()
        if self._prepare is None:  # else more of them come with the first step
            self._register(arrays, on_all_ranks=False)

    def rank_state_of(self, old_rank: int) -> Any:
        """The rank_state that a rank of the checkpoint's run saved. After `restore`. None if it
        saved none, or if there was no such rank."""
        return self._restored_value(RANK_STATE_BLOB, old_rank)

    def _restored_value(self, blob: str, rank: Optional[int]) -> Any:
        data = self._restored_blob(blob, rank)
        return values.decode(data, f"blob '{blob}'") if data is not None else None

    def _restored_blob(self, blob: str, rank: Optional[int]) -> Optional[bytes]:
        try:
            return self.job.restored_blob(blob, rank)
        except NotFound:
            return None

    def _restored_catalog(self) -> Dict[str, Tuple[str, Tuple[int, ...]]]:
        value = self._restored_value(ARRAYS_BLOB, None)
        catalog = {}
        try:
            for name, (dtype, shape) in (value or {}).items():
                if dtype not in DTYPES or any(size < 0 for size in shape):
                    raise ValueError(f"{name}: {dtype} {shape}")
                catalog[name] = (dtype, tuple(int(size) for size in shape))
        except (AttributeError, TypeError, ValueError) as error:
            raise DataLoss(f"blob '{ARRAYS_BLOB}': not a list of arrays: {error}") from error
        return catalog

    # ---- Registration

    def _collect(self) -> Dict[str, Memory]:
        found = self._arrays() if callable(self._arrays) else self._arrays
        flat: Dict[str, Any] = {}
        for name, value in found.items():
            if isinstance(value, Mapping):
                flat.update((f"{name}/{tensor}", array) for tensor, array in value.items())
            else:
                flat[name] = value
        return {name: memory_of(array, f"array '{name}'") for name, array in flat.items()}

    def _document(self, arrays: Dict[str, Memory], *, on_all_ranks: bool) -> Any:
        if self._layout is not None:
            return self._layout
        return replicated(arrays, self._world_size, () if on_all_ranks else self._rank_0_states)

    def _mine(self, arrays: Dict[str, Memory], *, on_all_ranks: bool) -> Dict[str, Memory]:
        if on_all_ranks or self._rank == 0 or not self._rank_0_states:
            return arrays
        return {name: memory for name, memory in arrays.items()
                if split_name(name)[0] not in self._rank_0_states}

    def _register(self, arrays: Dict[str, Memory], *, on_all_ranks: bool) -> None:
        """After an error nothing is registered, and the next save tries again."""
        self._registered = None
        catalog = b""
        blobs = self._blobs
        if self._prepare is not None:
            catalog = values.encode({name: [memory.dtype, list(memory.shape)]
                                     for name, memory in arrays.items()})
            blobs += (Blob(ARRAYS_BLOB, Scope.GLOBAL, len(catalog)),)
        buffers: List[Buffer] = [
            Buffer(name, memory, 0 if name.partition("/")[0] in self._first_states else 1)
            for name, memory in self._mine(arrays, on_all_ranks=on_all_ranks).items()]
        self.job.register(self._document(arrays, on_all_ranks=on_all_ranks), buffers, blobs,
                          timeout=REGISTER_SECONDS)
        self._registered = arrays
        self._catalog = catalog

    @staticmethod
    def _signature(arrays: Dict[str, Memory]) -> List[Tuple[str, str, Tuple[int, ...]]]:
        return [(name, memory.dtype, memory.shape) for name, memory in arrays.items()]

    # ---- The loop

    def before_forward(self) -> None:
        """Waits, if a save is being captured, until the arrays of `first_states` may change."""
        if self._capturing and self._first_states:
            self._wait(0)

    def before_update(self) -> None:
        """Waits, if a save is being captured, until all arrays may change. Call it before each
        update (optimizer step); what lies between it and the save runs beside the capture."""
        if self._capturing:
            self._capturing = False
            self._wait(ALL_GROUPS)

    def _wait(self, group: int) -> None:
        try:
            self.job.wait_captured(group, timeout=self._capture_timeout)
        except Unavailable:
            pass  # without an agent there is nothing to wait for; the save's report says so
        except Error as error:
            self._capturing = False
            self._failed("capture", error)

    def after_step(self, step: int, state: Any = None, rank_state: Any = None) -> bool:
        """Says that `step` (the number of finished steps) is done, and saves if one is due. True if
        it does. state, rank_state: as in `save`, or callables that give them, asked only if due."""
        self.job.heartbeat(step)
        self._look_at_reports()
        due = step % self._every == 0 if self._every is not None else self.job.due(step)
        return due and self.save(step, state() if callable(state) else state,
                                 rank_state() if callable(rank_state) else rank_state)

    def save(self, step: int, state: Any = None, rank_state: Any = None) -> bool:
        """Starts saving the arrays as they are after `step`; the copy runs behind the next step.
        True if it has begun; else it is logged, or raised (`on_error`).

        state: a Python value (see values.py) for the job; rank 0's is kept. rank_state: one per
        rank (random number generators). On every rank, for the same steps.
        """
        self.before_update()  # of an earlier save, if the caller did not
        return self._attempt(f"save of step {step}",
                             lambda: self._save(step, state, rank_state, self._save_wait))

    def commit(self, step: int, state: Any = None, rank_state: Any = None, *,
               timeout: float = COMMIT_SECONDS) -> None:
        """Saves `step` unless that was begun already, and waits until it survives a power cut.
        Raises whatever fails. timeout: seconds for the save's memory, and again for the commit."""
        self.before_update()
        if self._last_saved != step:
            self._save(step, state, rank_state, timeout)
            self.before_update()
        self._wait_committed(timeout)

    def _wait_committed(self, timeout: float = COMMIT_SECONDS) -> None:
        if self._last_saved is not None:
            self.job.wait_committed(self._last_saved, Faults.POWER, timeout=timeout)
            self._look_at_reports()

    def _save(self, step: int, state: Any, rank_state: Any, wait: float) -> None:
        blobs = {}
        if state is not None:
            blobs[STATE_BLOB] = values.encode(state, "state")
        if rank_state is not None:
            blobs[RANK_STATE_BLOB] = values.encode(rank_state, "rank_state")
        pointers = None
        if self._registered is None:
            self._register(self._collect(), on_all_ranks=False)
            wait = max(wait, NEW_MEMORY_SECONDS)
        elif callable(self._arrays):
            arrays = self._collect()
            if self._signature(arrays) != self._signature(self._registered):
                self._register(arrays, on_all_ranks=False)
                wait = max(wait, NEW_MEMORY_SECONDS)
            pointers = list(self._mine(arrays, on_all_ranks=False).values())
        if self._catalog:
            blobs[ARRAYS_BLOB] = self._catalog
        self.job.save(step, blobs, arrays=pointers, wait=wait)
        self._capturing = True
        self._last_saved = step
        self._unreported.append(step)
        if len(self._unreported) > UNREPORTED_MAX:
            self._unreported.popleft()

    # ---- Failures

    def _attempt(self, what: str, action: Callable[[], None]) -> bool:
        try:
            action()
            return True
        except Error as error:
            self._failed(what, error)
            return False

    def _failed(self, what: str, error: Error) -> None:
        self.failure_count += 1
        if self._raise:
            raise error
        LOGGER.error("%s failed, training goes on: %s", what, error)

    def _look_at_reports(self) -> None:
        """Logs the end of each save, once."""
        for step in list(self._unreported):
            try:
                report = self.job.report(step)
            except NotFound:
                self._unreported.remove(step)
                continue
            except Unavailable:
                return
            if report.state == SaveState.FAILED:
                self._unreported.remove(step)
                self._failed(f"save of step {step}",
                             report.error or Error(f"save of step {step}: no reason is known"))
            elif report.state == SaveState.COMMITTED_POWER:
                self._unreported.remove(step)
                LOGGER.info("step %d is committed: %d bytes in %.3f s, training waited %.3f ms of "
                            "the capture's %.3f%s", step, report.image_bytes, report.commit_ns / 1e9,
                            report.blocked_ns / 1e6, report.capture_ns / 1e6, _device_part(report))
