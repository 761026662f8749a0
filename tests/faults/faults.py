"""What is done to a running job, by name: `begin(name, ...)` for every `fault` of cases.toml.

A maker returns when the fault acts, with the moment of its onset and how to end it. Each proves that
it happened (or raises): a fault that is not there would be found by nobody, rightly.
"""
import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
import typing

from job import Failed, wait_until


@dataclasses.dataclass(frozen=True)
class Begun:
    onset: float  # monotonic
    end: typing.Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a maker may touch. `victim` and `peer` are ranks; rank r runs on node r."""

    network: object
    agent: object
    training: object
    victim: int
    peer: int


def begin(name, scene, arguments):
    if name not in MAKERS:
        raise Failed(f"no fault '{name}'; there are: {', '.join(sorted(MAKERS))}")
    return MAKERS[name](scene, **arguments)


def process_state(pid):
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rsplit(")", 1)[1].split()[0]


def save(scene):
    """Nothing but that the job's own saves are committed meanwhile, by all ranks."""
    onset = time.monotonic()

    def committed():
        return [line for line in scene.training.lines(scene.victim)
                if line["event"] == "save_ended" and line["state"] == "committed_power"]
    before = len(committed())
    wait_until(lambda: len(committed()) > before, "a save to be committed", 30)

    def end():
        if len(committed()) < before + 3:
            raise Failed(f"expected 3 saves to be committed, found {len(committed()) - before}")
    return Begun(onset, end)


# ---- From outside: signals

def nothing(_scene):
    return Begun(time.monotonic())


def stop(scene):
    pid = scene.training.pid(scene.victim)
    onset = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: process_state(pid) == "T", "the victim to stop")
    return Begun(onset, lambda: os.kill(pid, signal.SIGCONT))


def kill(scene):
    pid = scene.training.pid(scene.victim)
    onset = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: process_state(pid) in (None, "Z"), "the victim to die")
    return Begun(onset)


# ---- From outside: the network. `share` is of the healthy rate.

def _rate(scene, share):
    return int(scene.network.rate_bits * share)


def slow_sender(scene, share):
    onset = time.monotonic()
    scene.network.slow_sender(scene.victim, _rate(scene, share))
    return Begun(onset, scene.network.heal)


def slow_receiver(scene, share):
    onset = time.monotonic()
    scene.network.slow_receiver(scene.victim, _rate(scene, share))
    return Begun(onset, scene.network.heal)


def slow_path(scene, share):
    onset = time.monotonic()
    scene.network.slow_path(scene.victim, scene.peer, _rate(scene, share))
    return Begun(onset, scene.network.heal)


def cut_one_way(scene):
    onset = time.monotonic()
    scene.network.cut(scene.victim, scene.peer)
    return Begun(onset, scene.network.heal)


def cut_both_ways(scene):
    onset = time.monotonic()
    scene.network.cut_both_ways(scene.victim, scene.peer)
    return Begun(onset, scene.network.heal)


# ---- From inside: the file that the ranks read and the monitor does not (examples/README.md)

def file(scene, lines):
    """Each of `lines` with VICTIM and PEER filled in. Its onset is when a rank says that it acts."""
    before = time.monotonic()
    text = "".join(line.replace("VICTIM", str(scene.victim)).replace("PEER", str(scene.peer)) + "\n"
                   for line in lines)
    # At once, or a rank might read half of it.
    partial = scene.training.faults_file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(scene.training.faults_file)

    def acts():
        moments = [line["monotonic_ns"] / 1e9 for rank in range(scene.training.job.ranks)
                   for line in scene.training.lines(rank) if line["event"] == "fault"]
        return min((moment for moment in moments if moment >= before), default=None)
    onset = wait_until(acts, f"a rank to make the fault {lines}")

    def end():
        scene.training.faults_file.write_text("", encoding="utf-8")
    return Begun(onset, end)


# ---- From outside: who watches

def starve_agent(scene, seconds, every_seconds):
    """Again and again the whole agent, keeper and worker, gets no CPU for so long."""
    over = threading.Event()
    pids = scene.agent.pids()
    times = []  # that all of them stood still for

    def starve():
        while not over.wait(every_seconds):
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                if number == signal.SIGSTOP:
                    begin = time.monotonic()
                    over.wait(seconds)
                    if all(process_state(pid) == "T" for pid in pids):
                        times.append(time.monotonic() - begin)

    thread = threading.Thread(target=starve)
    thread.start()

    def end():
        over.set()
        thread.join()
        if not any(length >= seconds for length in times):
            raise Failed(f"expected the agent to stand still for {seconds} s, found {times}")
    return Begun(time.monotonic(), end)


def set_clock_back(scene, seconds):
    """The wall clock of one rank, which was started under libfaketime."""
    onset = time.monotonic()
    scene.training.clock_file.write_text(f"-{seconds}\n", encoding="utf-8")
    # libfaketime reads the file at every call. That it is in the process at all:
    maps = pathlib.Path(f"/proc/{scene.training.pid(scene.victim)}/maps").read_text(encoding="utf-8")
    if "libfaketime" not in maps:
        raise Failed("libfaketime is not in the victim's process (package libfaketime)")
    return Begun(onset)


MAKERS = {
    "nothing": nothing,
    "save": save,
    "stop": stop,
    "kill": kill,
    "slow-sender": slow_sender,
    "slow-receiver": slow_receiver,
    "slow-path": slow_path,
    "cut-one-way": cut_one_way,
    "cut-both-ways": cut_both_ways,
    "file": file,
    "starve-agent": starve_agent,
    "set-clock-back": set_clock_back,
}
