#!/usr/bin/python3
"""One job under `holdfast run` that goes on by itself: a rank is killed, one stands still, one loops for ever,
the agent's worker dies three times in one recovery, a GPU is reported broken and its rank ends, so that the job
goes on with fewer ranks in another layout, and grows back. Nobody restarts anything.

Before each fault it says whom recovery will suspect, what it will do, and in which layout the job goes on,
and compares afterwards. At the end the losses are compared with an undisturbed run, bit by bit, and the
samples of the committed history are counted: each global index exactly once.

Nothing here is a matter of time: a fault is made once the job trains in health, and what comes of it is
waited for. Where the worker dies it is armed to (docs/OPERATING.md, crash drills).

The last part of scripts/demo; alone, with --short, a test.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from demo_job import (BUILD, ROOT, Failure, kill, processes_of, read_lines, wait_until)
from demo_report import Report

JOB = "recovery"
RANKS = 4
BATCH = 24  # tiny_lm's default
SAVE_EVERY = 4
# What the monitor must have seen of each communicator before it judges what stands
# (docs/MONITOR_ANALYSIS.md), and some more.
OPERATIONS = 30
# A last resort: everything waits for its condition, on a busy machine for a long time.
WAIT_SECONDS = 3600
SMALLER = "tp=1,pp=3,zero=0"  # for RANKS - 1
# The goals of the project, for a process of this size on an idle machine.
RESUME_GOAL_SECONDS = 3
DETECT_GOAL_SECONDS = 10
PHASES = ("detect", "diagnose", "wait", "stop", "start", "load", "step")

CONFIG = f"""
every = {SAVE_EVERY}
host_memory = "256MiB"
ras_address = "off"
kernel_log = "{{kernel_log}}"

[recovery]
# Many faults in a row are what is shown.
max_restarts = 20
restarts_in_window = 64
pause_first = "10ms"
pause_max = "10ms"

[elastic]
layouts = {{{{ {RANKS - 1} = "{SMALLER}" }}}}
"""


@dataclasses.dataclass
class Expected:
    """Of one incident."""
    name: str
    suspects: list
    action: str
    ranks: int = RANKS
    layout: str = ""  # of [elastic]; empty: the job's own

    def text(self):
        who = f"suspect rank {self.suspects[0]}" if self.suspects else "no suspect"
        return f"{who}; {self.action}; then {self.ranks} ranks, layout {self.layout or 'of the job'}"


class RecoveryDemo:
    def __init__(self, build, place, report, is_short=False):
        self.build = pathlib.Path(build)
        self.place = place
        self.report = report
        self.is_short = is_short
        self.kernel_log = place / "kern.log"
        self.faults = place / "faults"
        self.logs = place / "logs"
        self.process = None
        self.incidents = 0
        self.struck_at = 0.0  # when the last fault was made
        self.resume_seconds = {}

    # ---- The job

    def environment(self):
        variables = {key: value for key, value in os.environ.items()
                     if not key.startswith(("HOLDFAST", "PET_", "NCCL", "COLLECTIVES", "TORCHELASTIC"))}
        variables.update(
            HOLDFAST_JOB=JOB, HOLDFAST_ROOT=str(self.place / "root"),
            HOLDFAST_RUNTIME_DIR=str(self.place / "run"), HOLDFASTD=str(self.build / "agent/holdfastd"),
            XDG_STATE_HOME=str(self.place / "state"), XDG_CONFIG_HOME=str(self.place / "config"),
            NCCL_PROFILER_PLUGIN=str(self.build / "hook/profiler/libnccl-profiler-holdfast.so"),
            COLLECTIVES_LOST_PEER="hang",  # as NCCL: nobody ends because another has
            COLLECTIVES_FAULTS=str(self.faults))
        return variables

    def trainer(self, *flags):
        return [self.build / "examples/tiny_lm/tiny_lm", "--corpus", self.place / "corpus", *flags]

    def start(self, drill):
        for name in ("root", "run", "config"):
            (self.place / name).mkdir(parents=True, mode=0o700)
        # Somebody may edit the documents meanwhile; the trainer refuses to go on with another corpus.
        shutil.copytree(ROOT / "docs", self.place / "corpus")
        config = self.place / "holdfast.toml"
        self.kernel_log.write_text("")
        config.write_text(CONFIG.format(kernel_log=self.kernel_log))
        with open(self.place / "run.err", "wb") as errors:
            self.process = subprocess.Popen(
                [self.build / "cli/holdfast", "run", "--nproc-per-node", str(RANKS), "--config", config,
                 "--log-dir", self.logs, "--",
                 *self.trainer("--steps", "1000000", "--tp", "2", "--zero", "1", "--save-wait-ms", "60000",
                               "--device-ms", "60" if self.is_short else "100")],
                env=dict(self.environment(), HOLDFAST_KILL_AT=drill), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=errors)

    def kill_everything(self):
        """Again and again: keeper and worker start each other."""
        deadline = time.monotonic() + 30
        while (left := processes_of(self.place)) and time.monotonic() < deadline:
            for pid in left:
                kill(pid)
            time.sleep(0.01)
        if self.process is not None:
            self.process.wait()

    def wait(self, condition, what, every=0.05):
        def checked():
            value = condition()
            if not value and self.process.poll() is not None:
                raise Failure(f"holdfast run has ended with {self.process.returncode} while waiting for "
                              f"{what}; see {self.place / 'run.err'}")
            return value
        return wait_until(checked, what, WAIT_SECONDS, every)

    def holdfast(self, *arguments):
        """What a verb prints; None if it fails."""
        socket = next(iter((self.place / "run").glob("*/agent.sock")), None)
        if socket is None:
            return None
        result = subprocess.run([self.build / "cli/holdfast", *arguments, "--socket", socket],
                                capture_output=True, text=True, check=False, timeout=WAIT_SECONDS,
                                env=self.environment())
        return result.stdout if result.returncode == 0 else None

    def ask(self, *arguments):
        text = self.holdfast(*arguments, "--json")
        return None if text is None else json.loads(text)

    def state(self):
        return self.ask("why")

    def board_of(self, rank):
        """Of the living process of a rank."""
        status = self.ask("status")
        if status is None:
            return None
        return next((board for board in status["monitor"]
                     if board["rank"] == rank and board["job"] == JOB and board["alive"]), None)

    def pid_of(self, rank):
        return self.wait(lambda: self.board_of(rank), f"the process of rank {rank}")["process_id"]

    def committed(self, attempt):
        return list((self.place / "root" / JOB).glob(f"s*.a{attempt:04d}/MANIFEST.json"))

    def is_watched(self, state):
        """The monitor sees all ranks of this launch, has learned what is normal, and has found nothing."""
        answer = self.ask("monitor", "status")
        for job in answer["jobs"] if answer else []:
            if job["job"] != JOB or job["attempt_key"] != f"{state['run_id']}:{state['launch']}":
                continue
            seen = [one["finished"] for one in job["communicators"]]
            return (job["sight"]["whole"] and not job["findings"] and seen and min(seen) >= OPERATIONS)
        return False

    def healthy(self):
        """The state of a job that trains, has committed a step in this attempt, and has told of every
        incident; else None."""
        state = self.state()
        if state is None or state["state"] != "running" or not self.committed(state["attempt"]):
            return None
        return state

    # ---- What ranks printed

    def restarts(self):
        return sorted(int(path.name.removeprefix("attempt_")) for path in self.logs.glob("*/attempt_*"))

    def lines(self, event, restart="*", rank="*"):
        return [line for path in sorted(self.logs.glob(f"*/attempt_{restart}/{rank}/stdout.log"))
                for line in read_lines(path) if line["event"] == event]

    def wait_fault(self, kind, rank):
        """Until the rank says that the fault of the file acts; then the next attempt must not find it."""
        restart = self.restarts()[-1]
        self.wait(lambda: any(line["kind"] == kind for line in self.lines("fault", restart, rank)),
                  f"{kind} of rank {rank}")
        self.faults.unlink()

    def make_fault(self, line):
        new = self.place / "faults.new"
        new.write_text(line + "\n")
        self.struck_at = time.monotonic()
        new.rename(self.faults)

    def strike(self, rank, number=signal.SIGKILL):
        pid = self.pid_of(rank)
        self.struck_at = time.monotonic()
        kill(pid, number)

    # ---- One fault

    def fault(self, heading, expected, make, is_judged=False):
        """Makes a fault in a job in health and compares what comes of it. `is_judged`: it is the monitor that
        must find it."""
        self.report.heading(heading)
        self.report.note(f"expected: {expected.text()}")
        before = self.wait(self.healthy, "a job in health")
        if is_judged:
            self.wait(lambda: (state := self.healthy()) and self.is_watched(state),
                      "a monitor that knows what is normal")
        restart = before["restart_count"]
        make()
        ranks = range(expected.ranks)
        self.wait(lambda: len({line["rank"] for line in self.lines("step", restart + 1)} & set(ranks)) ==
                  expected.ranks, "the first new step", every=0.01)
        seconds = time.monotonic() - self.struck_at
        self.incidents += 1
        number = self.incidents

        def resumed():
            state = self.state()
            if state is None:
                return None
            found = [one for one in state["incidents"] if one["number"] == number]
            return (state, found[0]) if found and found[0]["outcome"] == "resumed" else None
        state, incident = self.wait(resumed, f"the end of incident {number}")
        check = self.report.check
        check(expected.name, "suspects", expected.suspects, [one["rank"] for one in incident["suspects"]])
        check(expected.name, "action", expected.action, incident["action"])
        check(expected.name, "ranks and layout afterwards", [expected.ranks, expected.layout],
              [state["ranks"], state["layout"]])
        check(expected.name, "restarts", restart + 1, state["restart_count"])
        phases = {name: incident["seconds"][name] for name in PHASES}
        self.report.note(f"{incident['cause']}: {incident['sentence']}")
        self.report.note(f"{seconds:.2f} s from the fault to the end of the first new step: " + ", ".join(
            f"{name} {value:.2f}" for name, value in phases.items() if value is not None))
        self.resume_seconds[expected.name] = {"seconds": seconds, **phases}

    # ---- The faults

    def kill_rank(self):
        self.fault("A rank is killed", Expected("killed", [2], "restart in place"),
                   lambda: self.strike(2))

    def stop_rank(self):
        self.fault("A rank stands still (SIGSTOP); the others hang with it, as with NCCL",
                   Expected("stopped", [1], "restart in place"),
                   lambda: self.strike(1, signal.SIGSTOP), is_judged=True)

    def loop_rank(self):
        def make():
            self.make_fault("endless-loop rank=3")
            self.wait_fault("endless-loop", 3)
        self.fault("A rank loops for ever: it is busy, so nothing is done before the time-out that was "
                   "learned, a minute at least", Expected("looping", [3], "restart in place"), make,
                   is_judged=True)

    def kill_worker(self):
        points = ("run.ranks_stopping", "run.launch_starting", "run.rank_started")
        self.fault("A rank is killed, and the agent's worker dies three times in its recovery: while ranks "
                   "are stopped, before the next are started, and when two of them are",
                   Expected("worker", [0], "restart in place"), lambda: self.strike(0))
        log = "".join(path.read_text(errors="replace") for path in (self.place / "run").glob("*/agent.log*"))
        self.report.check("worker", "where it died", list(points),
                          [point for point in points if f"kill point {point} reached" in log])
        self.report.check("worker", "workers that were started again", len(points),
                          self.ask("status")["agent"]["worker_restarts"])

    def break_gpu(self):
        last = RANKS - 1
        def make():
            pid = self.pid_of(last)
            self.struck_at = time.monotonic()
            with self.kernel_log.open("a") as log:
                log.write(f"NVRM: Xid (PCI:0000:3b:00): 79, pid={pid}, name=tiny_lm, GPU has fallen off the bus.\n")
            # Whoever recovery has stopped meanwhile meets it no more, and there is no such rank then.
            self.make_fault(f"exit rank={last} status=1")
        self.fault(f"The kernel reports Xid 79 of GPU {last}, and its rank ends with an error",
                   Expected("gpu", [last], f"restart without GPU {last}", RANKS - 1, SMALLER), make)
        self.faults.unlink()
        self.report.check("gpu", "GPUs in use", [f"GPU {gpu}" for gpu in range(RANKS - 1)], self.state()["gpus"])

    def readmit(self):
        def make():
            self.struck_at = time.monotonic()
            self.wait(lambda: self.holdfast("readmit", str(RANKS - 1)) is not None, "an agent that hears it")
        self.fault(f"A person readmits GPU {RANKS - 1}", Expected(
            "grown", [], f"go on with {RANKS} ranks instead of {RANKS - 1} at the next checkpoint"), make)
        self.report.check("grown", "GPUs in use", [f"GPU {gpu}" for gpu in range(RANKS)], self.state()["gpus"])

    # ---- All of it

    def run(self):
        faults = [self.kill_rank, self.stop_rank, *([] if self.is_short else [self.loop_rank])]
        self.report.heading(f"holdfast run: {RANKS} ranks, tp=2 dp=2, a save every {SAVE_EVERY} steps")
        # The stop of that recovery is the worker's own so manieth.
        self.start(f"run.ranks_stopping:{len(faults) + 1},run.launch_starting:1,run.rank_started:2")
        for fault in (*faults, self.kill_worker, self.break_gpu, self.readmit):
            fault()
        self.wait(self.healthy, "a job in health")
        self.report.heading("Where the time went (holdfast why)")
        table = self.state()["downtime"]
        self.report.check("why", "rows of the table: one an incident, a heading and the sum",
                          self.incidents + 2, len(table))
        for line in table:
            self.report.note(line)
        self.stop()
        self.check_history()
        self.tell_figures()

    def stop(self):
        self.report.heading("The job is told to end (TERM)")
        self.process.send_signal(signal.SIGTERM)
        self.report.check("end", "exit code", 75, self.process.wait(WAIT_SECONDS))
        self.report.check("end", "processes that are left", [], wait_until(
            lambda: [found] if not (found := processes_of(self.place)) else None,
            "the end of the agent", WAIT_SECONDS)[0])

    def check_history(self):
        """`history`: the steps that are left when every restore has taken back what came after it."""
        history = 0
        wrong, taken_back = [], 0
        losses, unprinted = {}, set()
        for restart in self.restarts():
            steps = {}
            for line in self.lines("step", restart):
                losses.setdefault(line["step"], set()).add(line["loss"])
                steps.setdefault(line["step"], set()).add(tuple(line["samples"]))
            begun = {line["step"] for line in self.lines("restored", restart)}
            begun |= {0 for _ in self.lines("no_checkpoint", restart)}
            if not begun and not steps:
                continue  # stopped before it had begun
            begin = min(begun, default=-1)
            # What a rank saves it prints next: the last step alone may be committed, and printed by none.
            if begin == history + 1:
                unprinted.add(begin)
            elif len(begun) != 1 or begin > history:
                wrong.append(f"attempt {restart} begins at {sorted(begun)}, behind step {history}")
            if sorted(steps) != list(range(begin + 1, begin + 1 + len(steps))):
                wrong.append(f"attempt {restart} left steps out")
            wrong += [f"attempt {restart}: step {step} took samples {sorted(samples)}"
                      for step, samples in steps.items()
                      if samples != {(BATCH * (step - 1), BATCH * step)}]
            taken_back += max(0, history - begin)
            history = begin + len(steps)
        self.report.heading(f"{history} steps in {len(self.restarts())} attempts; {taken_back} were taken back")
        self.report.check("history", f"samples 0 to {BATCH * history} that were not consumed exactly once", [],
                          wrong)
        reference = self.undisturbed(history)
        self.report.check("history", "steps whose loss differs from the undisturbed run", [],
                          sorted(step for step, found in losses.items() if found != {reference[step]}))
        self.report.check("history", "steps of which no loss was seen", [],
                          sorted(set(reference) - set(losses) - unprinted))

    def undisturbed(self, steps):
        """The losses of one rank without checkpoints, layouts and faults."""
        directory = self.place / "reference"
        subprocess.run([sys.executable, ROOT / "examples/launch", "--nproc", "1", "--log-dir", directory, "--",
                        *self.trainer("--steps", str(steps), "--no-holdfast")], check=True,
                       env={**self.environment(), "COLLECTIVES_FAULTS": ""}, timeout=WAIT_SECONDS)
        return {line["step"]: line["loss"] for line in read_lines(directory / "restart-0/rank-0.out")
                if line["event"] == "step"}

    def tell_figures(self):
        self.report.figures["recovery_seconds"] = self.resume_seconds
        killed, stopped = self.resume_seconds["killed"], self.resume_seconds["stopped"]
        print(f"  a death: {killed['seconds']:.2f} s to the end of the first new step (goal: "
              f"{RESUME_GOAL_SECONDS} s)\n  a SIGSTOP: found after {stopped['detect']:.1f} s (goal: "
              f"{DETECT_GOAL_SECONDS} s)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="without the rank that loops for ever")
    parser.add_argument("--build", default=BUILD, metavar="DIRECTORY", help="where the programs are")
    parser.add_argument("--json", metavar="FILE", help="write events and figures here")
    arguments = parser.parse_args()
    place = pathlib.Path(tempfile.mkdtemp(prefix="hf-recovery-"))
    report = Report()
    demo = RecoveryDemo(arguments.build, place, report, arguments.short)
    stopped_by = None
    try:
        demo.run()
    except Failure as failure:
        stopped_by = str(failure)
    except Exception as error:  # a defect of the demo: the report says so, and ends as usual
        stopped_by = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        demo.kill_everything()
    ok = report.finish(stopped_by, arguments.json)
    if not ok:
        for path in (place / "run.err", *(place / "run").glob("*/agent.log*")):
            print(f"---- {path.name}\n{path.read_text(errors='replace')[-20000:]}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
