"""What the tests of the package share: a place of their own with a root and a private agent, and this
process's monitor board, read by hook/abi/monitor.h's offsets."""

import mmap
import os
import pathlib
import signal
import struct
import tempfile
import time

DEADLINE_SECONDS = 60
COMMUNICATOR_BYTES = 1536


class Place:
    """A directory with a root and a runtime directory; its agent ends with the test."""

    def __init__(self, add_cleanup, daemon):
        self._directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.path = pathlib.Path(self._directory.name)
        self.root = self.path / "root"
        self.runtime = self.path / "run"
        self.root.mkdir()
        self.daemon = daemon
        add_cleanup(self._directory.cleanup)
        add_cleanup(self.kill_agent)

    def environment(self, **more):
        variables = {name: value for name, value in os.environ.items()
                     if not name.startswith(("HOLDFAST", "TORCHELASTIC")) and
                     name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        variables.update(
            HOLDFAST_LIBRARY=os.environ["HOLDFAST_LIBRARY"], HOLDFASTD=self.daemon,
            HOLDFAST_RUNTIME_DIR=str(self.runtime), HOLDFAST_ROOT=str(self.root),
            HOLDFAST_HOST_MEMORY="256MiB", HOLDFAST_LINGER="60s", **more)
        return variables

    def use(self):
        """Makes it this process's place."""
        variables = self.environment()
        os.environ.clear()
        os.environ.update(variables)

    def agent_pids(self):
        """Keepers and workers of this place alone: a worker's command line does not say whose it
        is, but the environment does."""
        place = f"HOLDFAST_RUNTIME_DIR={self.runtime}".encode()
        pids = []
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if (entry.name.isdigit() and b"holdfastd" in (entry / "cmdline").read_bytes() and
                        place in (entry / "environ").read_bytes().split(b"\0")):
                    pids.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is another user's
        return pids

    def kill_agent(self):
        """All of it, for good: nothing stays in memory. Each restarts the other, so until none is
        left."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            pids = self.agent_pids()
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if time.monotonic() > deadline:
                raise RuntimeError(f"the agent does not die: {pids}")

    def manifests(self, job):
        return sorted((self.root / job).glob("s*.a*/MANIFEST.json"))


def board():
    """The bytes of this process's board."""
    for entry in pathlib.Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("/memfd:holdfast-monitor"):
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory:
                    return bytes(memory)
            finally:
                os.close(descriptor)
    raise AssertionError("no board")


def communicator(data, hash_):
    """enqueued, started, finished of the communicator with this hash."""
    offset, count = struct.unpack_from("<II", data, 16)
    for index in range(count):
        at = offset + index * COMMUNICATOR_BYTES
        state, = struct.unpack_from("<I", data, at)
        if state in (2, 3) and struct.unpack_from("<Q", data, at + 16)[0] == hash_:
            return index, struct.unpack_from("<QQQ", data, at + 128)
    raise AssertionError(f"no communicator {hash_}")


def operations(data, index, kind):
    """How many operations of a kind (holdfast.monitor.Kind) the communicator at this index has enqueued."""
    offset, = struct.unpack_from("<I", data, 16)
    return struct.unpack_from("<Q", data, offset + index * COMMUNICATOR_BYTES + 256 + 8 * kind)[0]
