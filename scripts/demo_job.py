"""The processes of the demo as seen from outside: a run of examples/launch with its ranks, and the
private agent that they share. Waits poll, as processes that are killed on purpose cannot be asked to
tell."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "release"
JOB = "demo"
SAVE_EVERY = 4
WAIT_SECONDS = 180


class Failure(Exception):
    """The demo cannot go on; the sentence says why."""


def wait_until(condition, what, seconds=WAIT_SECONDS, every=0.002):
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure(f"gave up after {seconds} s waiting for {what}")
        time.sleep(every)


def read_lines(path):
    """The JSON lines that are complete by now."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in data[:data.rfind(b"\n") + 1].splitlines()
            if line.startswith(b"{")]


def process_state(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def processes_of(place, program=None):
    """All processes (of that program) whose environment names `place`, but this one."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        is_meant = program is None or os.path.basename(command[0]) == program.encode()
        if is_meant and str(place).encode() in environment:
            found.append(int(entry.name))
    return found


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def holdfast(*arguments):
    """Runs a verb of the command line: its exit status, and what it printed."""
    result = subprocess.run([BUILD / "cli" / "holdfast", *arguments], capture_output=True, text=True,
                            check=False, timeout=WAIT_SECONDS)
    return result.returncode, result.stdout + result.stderr


def total(images, counter):
    return sum(image[counter] for image in images)


class Agent:
    """The private agent of the job."""

    def __init__(self, runtime):
        self.runtime = runtime

    def socket(self):
        return next(iter(self.runtime.glob("*/agent.sock")), None)

    def log(self):
        return "".join(path.read_text(encoding="utf-8", errors="replace")
                       for path in sorted(self.runtime.glob("*/agent.log*")))

    def status(self):
        """None while it does not answer."""
        path = self.socket()
        if path is None:
            return None
        try:
            result = subprocess.run([BUILD / "cli" / "holdfast", "status", "--socket", path],
                                    capture_output=True, text=True, check=False, timeout=30)
        except subprocess.TimeoutExpired:
            return None
        return json.loads(result.stdout) if result.returncode == 0 else None

    def images_of_dead(self, step, rank, attempt):
        """The images of `step` (one, or none if it had not begun) of a rank of an attempt, as the agent
        has them once it knows that the rank is dead. Of one that was being captured soon nothing is left
        but what the log says: how many of its blocks were captured."""
        died = re.compile(rf"step {step} of attempt {attempt}: rank {rank}: the training process died during "
                          r"the capture: (\d+) of (\d+) blocks were done")

        def settled():
            status = self.status()
            # After that: the line is there before the images are gone.
            if found := died.search(self.log()):
                return ([{"blocks_captured": int(found[1]), "blocks": int(found[2])}],)
            if status is None:
                return None
            sessions = [session for session in status["sessions"]
                        if (session["rank"], session["attempt"]) == (rank, attempt)]
            images = [image for session in sessions for image in session["images"]
                      if image.get("step") == step]
            is_settled = (all(session["dead"] for session in sessions) and
                          all(image["state"] != "capturing" for image in images))
            return (images,) if is_settled else None
        return wait_until(settled, f"the agent to know of rank {rank}'s death")[0]

    def pids(self):
        return processes_of(self.runtime, "holdfastd")

    def kill_for_good(self):
        """Again and again: keeper and worker start each other."""
        deadline = time.monotonic() + 10
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                kill(pid)
            time.sleep(0.01)

    def wait_gone(self):
        wait_until(lambda: not self.pids(), "the agent to end by itself (linger)")
        for path in self.runtime.glob("*/agent.log*"):
            path.unlink()

    def wait_stopped_at(self, point):
        """Waits until the worker has stopped itself at `point`, and returns its pid."""
        def stopped():
            for line in self.log().splitlines():
                if f"kill point {point} reached" in line:
                    return int(line.split("process ")[1].split()[0])
            return None
        worker = wait_until(stopped, f"kill point {point}")
        wait_until(lambda: process_state(worker) == "T", f"the worker to stop at {point}")
        return worker

    def images_at(self, point, step):
        """The counters of all images of `step` at the very instant of `point`, as the worker wrote them
        down before it stopped."""
        mark = f"at kill point {point}: "
        line = next(line for line in self.log().splitlines() if mark in line)
        return [image for image in json.loads(line.split(mark)[1]) if image["step"] == step]


class Training:
    """One run of examples/launch: starts ranks, restarts them when one dies."""

    def __init__(self, place, name, ranks, steps, ballast, drill=None, use_holdfast=True, device_ms=150,
                 layout=("--zero", "1"), root="root", restore_from=None, device=False):
        self.directory = place / name
        self.ranks = ranks
        # Nothing of the caller's own Holdfast, and nothing outside `place`.
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith("HOLDFAST")}
        environment.update({
            "HOLDFAST_JOB": JOB, "HOLDFAST_ROOT": str(place / root),
            "HOLDFAST_RUNTIME_DIR": str(place / "run"), "HOLDFAST_LINGER": "2s",
            "HOLDFAST_HOST_MEMORY": "6GiB",
            # The agent follows captures from their first block, so that a drill can stop it in the middle.
            "HOLDFAST_CAPTURE_HEAD_START_MS": "0",
            "HOLDFASTD": str(BUILD / "agent" / "holdfastd"),
            "XDG_CONFIG_HOME": str(place / "config"), "XDG_STATE_HOME": str(place / "state"),
        })
        if drill:
            environment["HOLDFAST_KILL_AT"] = drill
        if restore_from:
            environment["HOLDFAST_RESTORE_FROM"] = str(restore_from)
        command = [BUILD / "examples" / "tiny_lm" / "tiny_lm", "--corpus", ROOT / "docs",
                   "--steps", str(steps), "--save-every", str(SAVE_EVERY), *layout,
                   "--bytes", str(ballast), "--device-ms", str(device_ms), "--check-restore",
                   "--save-wait-ms", "60000"]
        if not use_holdfast:
            command.append("--no-holdfast")
        if device:
            # Paced, so that a drill finds a capture in its middle: nothing else makes copies slow there.
            environment.update(LD_LIBRARY_PATH=str(BUILD / "tests" / "support" / "fake_cuda"),
                               HOLDFAST_DEVICE_COPY_MIB_PER_SECOND="256")
            command.append("--device")
        with open(self.directory.with_suffix(".launch"), "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "examples" / "launch", "--nproc", str(ranks),
                 "--max-restarts", "3", "--log-dir", self.directory,
                 "--events", self.directory.with_suffix(".events"), "--", *command],
                env=environment, stdout=subprocess.DEVNULL, stderr=errors)

    def lines(self, restart=None, rank=None):
        pattern = f"restart-{'*' if restart is None else restart}/rank-{'*' if rank is None else rank}.out"
        return [line for path in sorted(self.directory.glob(pattern)) for line in read_lines(path)]

    def events(self, kind, restart=None, rank=None):
        return [line for line in self.lines(restart, rank) if line.get("event") == kind]

    def launch_events(self, kind):
        return [line for line in read_lines(self.directory.with_suffix(".events"))
                if line["event"] == kind]

    def rank_pid(self, rank):
        return [line["pid"] for line in self.launch_events("start") if line["rank"] == rank][-1]

    def last_step(self, restart):
        return max((line["step"] for line in self.events("step", restart)), default=0)

    def finish(self):
        try:
            status = self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.directory.name} did not end; see {self.directory}") from None
        if status != 0:
            raise Failure(f"{self.directory.name} ended with {status}; see {self.directory}")

    def kill_everything(self):
        """Launch and all ranks. The kernel kills what launch starts meanwhile (PR_SET_PDEATHSIG)."""
        if self.process.poll() is not None:
            return
        self.process.kill()
        ended = {line["pid"] for line in self.launch_events("exit")}
        for line in self.launch_events("start"):
            if line["pid"] not in ended:
                kill(line["pid"])
        self.process.wait()
