"""What only this process can tell of itself, for the node's agent when it suspects something:
PyTorch's Flight Recorder, and where its Python threads stand.

    holdfast.witness.start()          # once; holdfast.torch's Checkpointer and watch do it

A thread of its own waits at the agent's socket until it is asked, dumps into memory of its own, and
hands that over. It never imports torch, stops nothing, takes no lock of the program's, and needs
nothing but Python's standard library. While the interpreter is held (a call into C that does not let
other Python threads run) it cannot answer; the agent then says so, and looks from outside.

Without an agent the thread tries again every few seconds. With HOLDFAST_MONITOR=off there is none.
Forked children have none, and let go of the parent's connection.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import threading
from typing import Any, List, NamedTuple, Optional

_MAGIC = 0x31464C48
_VERSION = 3
_WAIT = 18
_REPLY = 19
_HEADER = struct.Struct("<IHHII")
_BODY = struct.Struct("<136s256sIIQII2Q512s")
_ASK = struct.Struct("<i1020sQII")
_PEER = struct.Struct("iII")  # ucred
FLIGHT_RECORD = 1
PYTHON_STACKS = 2

_RETRY_SECONDS = 5.0
# As the agent reads them (monitor/witness/): more is of no use.
_FLIGHT_BYTES_MAX = 16 << 20
_STACK_BYTES_MAX = 1 << 20
_F_ADD_SEALS = 1033
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # SEAL, SHRINK, GROW, WRITE

_lock = threading.Lock()
_started = False  # in this process
_connection: Optional[socket.socket] = None  # of the thread


def start(*, job: Optional[str] = None, attempt_key: Optional[str] = None,
          rank: Optional[int] = None, world_size: Optional[int] = None,
          socket_path: Optional[str] = None) -> bool:
    """Starts the thread, unless it is there. What is not given comes from the environment
    (HOLDFAST_JOB, HOLDFAST_ATTEMPT_KEY or torchrun's, RANK, WORLD_SIZE, HOLDFAST_SOCKET). False:
    level off, no rank, or neither a socket nor a job is named."""
    global _started
    if os.environ.get("HOLDFAST_MONITOR") == "off":
        return False
    job = job if job is not None else os.environ.get("HOLDFAST_JOB", "")
    path = socket_path or _socket_path(job)
    rank = rank if rank is not None else _number("RANK")
    if world_size is None:
        world_size = _number("WORLD_SIZE") or 0
    if not path or rank is None or not (0 <= rank < 1 << 32 and 0 <= world_size < 1 << 32):
        return False
    if attempt_key is None:
        attempt_key = _attempt_key()
    identity = _Identity(_bytes(job, 135), _bytes(attempt_key, 255), rank, world_size)
    with _lock:
        if not _started:
            _started = True
            threading.Thread(target=_run, args=(path, identity), name="holdfast-witness",
                             daemon=True).start()
    return True


class _Identity(NamedTuple):
    job: bytes
    attempt_key: bytes
    rank: int
    world_size: int


def _after_fork() -> None:
    """In a child: the thread is the parent's. Its connection would look as if the parent lived."""
    global _lock, _started, _connection
    _lock = threading.Lock()
    _started = False
    if _connection is not None:
        _connection.close()
        _connection = None


os.register_at_fork(after_in_child=_after_fork)


def _bytes(text: str, bytes_max: int) -> bytes:
    return text.encode("utf-8", "surrogateescape")[:bytes_max]


def _number(variable: str) -> Optional[int]:
    try:
        number = int(os.environ[variable])
    except (KeyError, ValueError):
        return None
    return number if 0 <= number < 1 << 32 else None


def _attempt_key() -> str:
    """As hook/settings.h has it."""
    key = os.environ.get("HOLDFAST_ATTEMPT_KEY", "")
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if key or not run_id:
        return key
    return f"{run_id}:{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"


def _socket_path(job: str) -> str:
    """As hook/monitor_offer.h finds it."""
    path = os.environ.get("HOLDFAST_SOCKET", "")
    if path or not job:
        return path
    directory = os.environ.get("HOLDFAST_RUNTIME_DIR", "")
    if not directory:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        directory = f"{runtime}/holdfast" if runtime else f"/tmp/holdfast-{os.getuid()}"
    name = 0xCBF29CE484222325  # FNV-1a
    for byte in job.encode("utf-8", "surrogateescape"):
        name = ((name ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{directory}/{name:016x}/agent.sock"


def _run(path: str, identity: _Identity) -> None:
    global _connection
    pause = threading.Event()
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                _connection = connection
                _connect(connection, path)
                _serve(connection, identity)
        except OSError:
            pass  # no agent, or it has gone: a new one may come
        _connection = None
        pause.wait(_RETRY_SECONDS)


def _connect(connection: socket.socket, path: str) -> None:
    # Through a descriptor: an address holds 107 bytes, and a path may be longer.
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    # In /tmp anybody could have made the directory before us. An agent serves its own user only.
    _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user != os.geteuid():
        raise PermissionError(f"agent at {path}: expected user {os.geteuid()}'s, found user {user}'s")


def _serve(connection: socket.socket, identity: _Identity) -> None:
    """Until the agent ends the conversation."""
    answer = _Answer(0)
    while True:
        with answer:
            body = _BODY.pack(identity.job, identity.attempt_key, identity.rank,
                              identity.world_size, answer.number, answer.parts, 0,
                              *answer.bytes, answer.trouble)
            packet = _HEADER.pack(_MAGIC, _VERSION, _WAIT, 1, len(body)) + body
            if answer.descriptors:
                socket.send_fds(connection, [packet], answer.descriptors)
            else:
                connection.send(packet)
        reply = connection.recv(4096)
        if len(reply) != _HEADER.size + _ASK.size:
            return
        if _HEADER.unpack_from(reply)[2] != _REPLY:
            return
        code, _, number, parts, _ = _ASK.unpack_from(reply, _HEADER.size)
        if code != 0:
            return
        answer = _Answer(number)
        answer.fill(parts)


class _Answer:
    """The parts of one answer, in sealed memory; closes it at the end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parts = 0
        self.bytes = [0, 0]
        self.descriptors: List[int] = []
        self.trouble = b""

    def __enter__(self) -> "_Answer":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def fill(self, parts: int) -> None:
        troubles = []
        for index, (part, name, dump) in enumerate(
                ((FLIGHT_RECORD, "Flight Recorder", _dump_flight_record),
                 (PYTHON_STACKS, "Python stacks", _dump_stacks))):
            if not parts & part:
                continue
            descriptor = None
            try:
                descriptor = os.memfd_create(f"holdfast {name}",
                                             os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                dump(descriptor)
                size = os.fstat(descriptor).st_size
                fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
            except Exception as error:  # whatever torch raises must not end the thread
                troubles.append(f"{name}: {error}")
                if descriptor is not None:
                    os.close(descriptor)
                continue
            self.descriptors.append(descriptor)
            self.parts |= part
            self.bytes[index] = size
        self.trouble = "; ".join(troubles).encode("utf-8", "replace")[:511]


def _dump_flight_record(descriptor: int) -> None:
    data = _flight_record()
    if len(data) > _FLIGHT_BYTES_MAX:
        raise ValueError(f"{len(data)} bytes, at most {_FLIGHT_BYTES_MAX} are taken")
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


def _flight_record() -> bytes:
    """Of NCCL's process groups where there are any, else of all others (gloo)."""
    # Never imported from here: who does not use it has nothing to dump.
    module: Any = sys.modules.get("torch._C._distributed_c10d")
    if module is None:
        raise LookupError("torch.distributed is not in use")
    failures = []
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        dump = getattr(module, name, None)
        if dump is None:
            continue
        try:
            data = dump(True, False, False)  # collectives, no stack traces, also what has ended
        except Exception as error:
            failures.append(f"{name}: {error}")
            continue
        if _has_entries(data):
            return data
        failures.append(f"{name}: nothing is recorded")
    raise LookupError("; ".join(failures) or "this torch has none (2.5 and newer do)")


def _has_entries(data: bytes) -> bool:
    """Without reading the pickle: an empty record has no such key."""
    return b"entries" in data


def _dump_stacks(descriptor: int) -> None:
    import faulthandler
    main = threading.main_thread().ident or 0
    os.write(descriptor, b"holdfast main thread 0x%016x\n" % main)
    faulthandler.dump_traceback(file=descriptor, all_threads=True)
    if os.fstat(descriptor).st_size > _STACK_BYTES_MAX:
        os.ftruncate(descriptor, _STACK_BYTES_MAX)
