"""Processor time that the agent (keeper and worker) takes while nothing happens: without a job, and with one
of four ranks under `holdfast run` that make a step a second, monitor on."""

import json
import os
import pathlib
import subprocess
import time

import pairs

SECONDS = 60
GOAL_PERCENT = 0.5  # of one core
RANKS = 4


def cpu_seconds(pids):
    """On a processor, of all threads: in nanoseconds, because ticks would miss most of it."""
    return sum(int(path.read_text(encoding="utf-8").split()[0])
               for pid in pids for path in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


class Idle:
    def __init__(self, place):
        self.place = place
        self.socket = place.directory / "agent.sock"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST")}
        self.environment.update(
            HOLDFAST_SOCKET=str(self.socket), HOLDFAST_ROOT=str(place.root), HOLDFAST_MONITOR="light",
            HOLDFAST_HOST_MEMORY="256MiB", HOLDFAST_STATE_DIRECTORY=str(place.directory / "state"),
            NCCL_PROFILER_PLUGIN=str(place.build / "hook" / "profiler" / "libnccl-profiler-holdfast.so"))

    def start(self, *command, **how):
        return subprocess.Popen(list(command), env=self.environment, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL, **how)

    def ask(self, *verb):
        result = subprocess.run([self.place.build / "cli" / "holdfast", *verb, "--json"], check=False,
                                env=self.environment, capture_output=True, text=True)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def until(self, condition, what):
        end = time.monotonic() + 120
        while not (value := condition()):
            if time.monotonic() > end:
                raise RuntimeError(f"gave up waiting for {what}")
            time.sleep(0.1)
        return value

    def percent(self):
        """Of one core, over SECONDS; what is measured is left alone meanwhile."""
        agent = self.ask("status")["agent"]
        pids = [agent["keeper_pid"], agent["worker_pid"]]
        before, begun = cpu_seconds(pids), time.monotonic()
        time.sleep(SECONDS)
        return 100 * (cpu_seconds(pids) - before) / (time.monotonic() - begun)


def rows(place):
    idle = Idle(place)
    agent = idle.start(place.build / "agent" / "holdfastd")
    run = None
    try:
        idle.until(lambda: idle.ask("status"), "an agent")
        found = [pairs.measure("agent idle, no job", "% of a core", idle.percent, GOAL_PERCENT, repeats=1,
                               note=f"keeper and worker, {SECONDS} s")]
        run = idle.start(place.build / "cli" / "holdfast", "run", "--nproc-per-node", str(RANKS), "--job", "idle",
                         "--", place.build / "examples" / "tiny_lm" / "tiny_lm", "--corpus",
                         pathlib.Path(__file__).resolve().parent.parent / "docs", "--steps", "1000000",
                         "--device-ms", "1000", "--save-every", "0")
        idle.until(lambda: (idle.ask("why") or {}).get("state") == "running", "a job that runs")
        found.append(pairs.measure(f"agent idle, a job of {RANKS} ranks", "% of a core", idle.percent,
                                   GOAL_PERCENT, repeats=1, note="a step a second, monitor light"))
        return found
    finally:
        if run is not None:
            run.terminate()
            run.wait()
        agent.terminate()
        agent.wait()
