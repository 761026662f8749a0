"""A job and the agent that watches it, both inside a network of namespaces (network.py).

The agent runs in the network's host namespace, which has no address: ranks reach it through its
socket's path alone. Each rank runs in the namespace of its node and names that node
(HOLDFAST_NODE). examples/launch starts the ranks, in the namespace of node 0.

All times are of this process's monotonic clock.
"""
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import network as net

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
START_SECONDS = 180
LOOK_SECONDS = 0.25
# Puts the rank that launch starts into the namespace of its node; the process stays the same one.
# With FAULTS_FAKE_CLOCK one of them gets libfaketime for the wall clock (not the monotonic one).
ENTER_NODE = ('if [ "$RANK" = "$FAULTS_FAKE_CLOCK_RANK" ]; then '
              'export LD_PRELOAD="$FAULTS_FAKE_CLOCK_LIBRARY" FAKETIME_NO_CACHE=1 '
              'FAKETIME_DONT_FAKE_MONOTONIC=1 DONT_FAKE_MONOTONIC=1 '
              'FAKETIME_TIMESTAMP_FILE="$FAULTS_CLOCK_FILE"; fi; '
              'exec nsenter --net="$FAULTS_NAMESPACES$RANK" env HOLDFAST_NODE="node-$RANK" '
              'COLLECTIVES_BIND_ADDR="$FAULTS_SUBNET.$((RANK + 1))" "$@"')


class Failed(Exception):
    """The harness could not do what it set out to; says nothing about the monitor."""


@dataclasses.dataclass(frozen=True)
class Programs:
    """What was built. Paths."""

    build: pathlib.Path
    venv: pathlib.Path = ROOT / "build" / "venv"

    @property
    def holdfast(self):
        return self.build / "cli" / "holdfast"

    @property
    def holdfastd(self):
        return self.build / "agent" / "holdfastd"

    @property
    def tiny_lm(self):
        return self.build / "examples" / "tiny_lm" / "tiny_lm"

    @property
    def plugin(self):
        return self.build / "hook" / "profiler" / "libnccl-profiler-holdfast.so"

    @property
    def library(self):
        return next((self.build / "hook").glob("libholdfast.so*"))

    @property
    def python(self):
        return self.venv / "bin" / "python"


def wait_until(condition, what, seconds=START_SECONDS, look_seconds=0.05):
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failed(f"gave up after {seconds} s waiting for {what}")
        time.sleep(look_seconds)


def replay(programs, recording):
    """What `holdfast monitor replay` says of it."""
    result = subprocess.run([programs.holdfast, "--json", "monitor", "replay", recording],
                            capture_output=True, text=True, check=False, timeout=120,
                            env=clean_environment())
    if result.returncode != 0:
        raise Failed(f"holdfast monitor replay {recording}: status {result.returncode}: "
                     f"{result.stderr.strip()}")
    return json.loads(result.stdout)


def fake_clock_library():
    """libfaketime's for programs with threads."""
    found = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        raise Failed("libfaketimeMT.so.1 is not installed (package libfaketime)")
    return found[0]


def clean_environment(**more):
    """Nothing of the caller's own job."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("HOLDFAST", "TORCHELASTIC", "NCCL_", "COLLECTIVES_")) and
                   name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return environment | {name: str(value) for name, value in more.items()}


class Agent:
    """holdfastd in the host namespace of `network`, everything of it below `directory`."""

    def __init__(self, programs, network, directory, **configuration):
        self.programs = programs
        self.network = network
        self.directory = directory
        self.socket = directory / "agent" / "agent.sock"
        self._configuration = configuration
        self._process = None
        self._recorder = None

    def __enter__(self):
        for name in ("agent", "root", "state"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        with net.inside(self.network.host):
            self._process = subprocess.Popen(
                [self.programs.holdfastd, "--socket", self.socket, "--root", self.directory / "root",
                 "--state-directory", self.directory / "state",
                 "--log-file", self.directory / "agent.log"],
                env=clean_environment(XDG_CONFIG_HOME=self.directory / "config",
                                      **self._configuration),
                stdin=subprocess.DEVNULL, start_new_session=True)
        def answers():
            if self._process.poll() is not None:
                raise Failed(f"holdfastd has ended with {self._process.returncode}; see "
                             f"{self.directory / 'agent.log'}")
            return self._ask("status").returncode == 0

        try:
            wait_until(answers, "the agent to answer")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        self.stop_recording()
        # Keeper and worker start each other again: all that is in the namespace, until nothing is.
        deadline = time.monotonic() + 20
        while pids := self.pids():
            if time.monotonic() > deadline:
                raise Failed(f"the agent does not die: {pids}")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(0.02)
        self._process.wait()

    def pids(self):
        """Of keeper and worker (and of `record`)."""
        return net.processes_in(self.network.host)

    def _ask(self, *arguments):
        return subprocess.run([self.programs.holdfast, *arguments, "--socket", self.socket],
                              capture_output=True, text=True, check=False, timeout=60,
                              env=clean_environment())

    def findings(self):
        """What `holdfast monitor verdicts` tells now; None while the agent does not answer."""
        result = self._ask("monitor", "verdicts", "--json")
        if result.returncode != 0:
            return None
        return json.loads(result.stdout)["findings"]

    def sees(self, ranks):
        """Whether `holdfast monitor status` sees so many ranks with telemetry: of a job that nobody sees
        nothing is found, whatever happens to it."""
        result = self._ask("monitor", "status", "--json")
        return result.returncode == 0 and ranks in [
            job["sight"]["ranks_with_telemetry"] for job in json.loads(result.stdout)["jobs"]]

    def record(self, path):
        """Begins a recording; it ends with `stop_recording`. Returns when nothing is missed."""
        path.unlink(missing_ok=True)
        with net.inside(self.network.host):
            self._recorder = subprocess.Popen(
                [self.programs.holdfast, "monitor", "record", path, "--socket", self.socket],
                env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_until(path.exists, "the recording to begin")

    def stop_recording(self):
        """Returns once the recording is whole."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        recorder.send_signal(signal.SIGINT)
        try:
            _, errors = recorder.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            recorder.kill()
            raise Failed("holdfast monitor record does not end on SIGINT") from None
        if recorder.returncode != 0:
            raise Failed(f"holdfast monitor record: status {recorder.returncode}: {errors.strip()}")


# examples/torch_ddp.py prints for people: "step 12 loss 0x1.8p-1".
STEP = re.compile(rb"step (\d+) ")


def event_of(line):
    """What a line of a rank's output tells; None: nothing."""
    if line.startswith(b"{"):
        return json.loads(line)
    step = STEP.match(line)
    return {"event": "step", "step": int(step[1])} if step else None


class Printed:
    """What the lines of a file tell that grows; each byte is read once."""

    def __init__(self, path):
        self._path = path
        self._offset = 0
        self._lines = []

    def lines(self):
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return self._lines
        whole = data[:data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._lines += filter(None, map(event_of, whole.splitlines()))
        return self._lines


class Training:
    """The ranks of one job, each on a node of its own."""

    def __init__(self, programs, network, agent, job, directory, victim):
        self.programs = programs
        self.network = network
        self.agent = agent
        self.job = job
        self.victim = victim
        self.directory = directory
        self.faults_file = directory / "faults"
        self.clock_file = directory / "clock"  # libfaketime's: what its victim's clock is off by
        self._process = None
        self._printed = {}  # by rank: Printed

    def _command(self):
        if self.job.program == "tiny_lm":
            return [self.programs.tiny_lm, "--corpus", ROOT / "docs", *self.job.arguments]
        return [self.programs.python, ROOT / "tests" / "faults" / "torch_client.py",
                ROOT / "examples" / self.job.program, *self.job.arguments]

    def __enter__(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        self.faults_file.write_text("", encoding="utf-8")
        self.clock_file.write_text("+0\n", encoding="utf-8")
        fakes_clock = "FAULTS_FAKE_CLOCK" in self.job.environment
        variables = {
            "HOLDFAST_SOCKET": self.agent.socket, "HOLDFAST_JOB": "faults",
            "HOLDFAST_ROOT": self.agent.directory / "root",
            "NCCL_PROFILER_PLUGIN": self.programs.plugin, "HOLDFAST_LIBRARY": self.programs.library,
            "PYTHONPATH": ROOT / "hook" / "python", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1,
            "COLLECTIVES_FAULTS": self.faults_file,
            "FAULTS_NAMESPACES": net.NAMESPACES / self.network.prefix, "FAULTS_SUBNET": net.SUBNET,
            "FAULTS_FAKE_CLOCK_RANK": self.victim if fakes_clock else "",
            "FAULTS_FAKE_CLOCK_LIBRARY": fake_clock_library() if fakes_clock else "",
            "FAULTS_CLOCK_FILE": self.clock_file}
        environment = clean_environment(**(variables | self.job.environment))
        with net.inside(self.network.namespace(0)), \
                (self.directory / "launch.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, ROOT / "examples" / "launch", "--nproc", str(self.job.ranks),
                 "--master-addr", self.network.address(0), "--log-dir", self.directory,
                 "--events", self.directory / "events", "--on-failure", "wait", "--",
                 "/bin/sh", "-c", ENTER_NODE, "rank", *self._command()],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        return self

    def __exit__(self, *exception):
        self._process.kill()  # its ranks go with it
        self._process.wait()

    def lines(self, rank=0):
        """What the rank has printed by now, as events."""
        if rank not in self._printed:
            self._printed[rank] = Printed(self.directory / "restart-0" / f"rank-{rank}.out")
        return self._printed[rank].lines()

    def step(self, rank=0):
        """The last step that the rank has told of; 0 before the first."""
        return next((line["step"] for line in reversed(self.lines(rank))
                     if line["event"] == "step"), 0)

    def pid(self, rank):
        events = self.directory / "events"
        for line in events.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "start" and event["rank"] == rank:
                return event["pid"]
        raise Failed(f"rank {rank} was not started; see {events}")

    def wait_for_step(self, step):
        def reached():
            if self._process.poll() is not None:
                raise Failed(f"the job has ended with {self._process.returncode} before step {step}; "
                             f"see {self.directory}")
            return self.step() >= step
        wait_until(reached, f"step {step} of {self.directory.name}")

    def signal(self, rank, number):
        os.kill(self.pid(rank), number)
