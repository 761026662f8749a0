#!/usr/bin/python3
"""Trains tiny_lm, kills every process of the system at the worst moment, and proves each time that the
job goes on from the newest committed step, bit for bit.

Where a kill must hit a place (the middle of a capture, of a flush), the agent's worker is armed to stop
or kill itself at that very instant (docs/OPERATING.md, crash drills); the counters that the agent shows
afterwards prove that the place was hit, and a kill that missed is repeated.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

from checkpoint_digest import checkpoint_digests, restored_digests

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "release"
JOB = "demo"
SAVE_EVERY = 4
WAIT_SECONDS = 180
TRIES = 4


class Failure(Exception):
    """The demo cannot go on; the sentence says why."""


class Report:
    """What was expected and what was found, for people on the way and for machines at the end."""

    def __init__(self):
        self.events = []
        self.figures = {}
        self.begun = time.monotonic()

    def check(self, scenario, what, expected, found):
        holds = expected == found
        self.events.append({"scenario": scenario, "event": what, "expected": expected, "found": found,
                            "holds": holds})
        mark = "ok " if holds else "BAD"
        shown = f"{found}" if holds else f"expected {expected}, found {found}"
        print(f"  {mark} {what}: {shown}", flush=True)
        return holds

    def heading(self, text):
        print(f"\n[{time.monotonic() - self.begun:5.1f} s] {text}", flush=True)

    @property
    def failures(self):
        return [event for event in self.events if not event["holds"]]


def wait_until(condition, what, seconds=WAIT_SECONDS):
    """Polls: processes that are killed on purpose cannot be asked to tell."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure(f"gave up after {seconds} s waiting for {what}")
        time.sleep(0.002)


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


def is_alive(pid):
    return process_state(pid) not in (None, "Z", "X")


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class Agent:
    """The private agent of the job, as seen from outside."""

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
        result = subprocess.run([BUILD / "cli" / "holdfast", "status", "--socket", path],
                                capture_output=True, text=True, check=False, timeout=30)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def pids(self):
        """All processes whose command line names our runtime directory."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if command[0].endswith(b"holdfastd") and str(self.runtime).encode() in environment:
                found.append(int(entry.name))
        return found

    def wait_gone(self):
        wait_until(lambda: not self.pids(), "the agent to end by itself (linger)")
        for path in self.runtime.glob("*/agent.log*"):
            path.unlink()

    def drilled_pid(self, point):
        """The process that reached its kill point, from the line that it left in the log."""
        for line in self.log().splitlines():
            if f"kill point {point} reached" in line:
                return int(line.split("process ")[1].split()[0])
        return None


class Training:
    """One run of examples/launch: starts ranks, restarts them when one dies."""

    def __init__(self, place, name, ranks, steps, ballast, drill=None, use_holdfast=True,
                 max_restarts=3, device_ms=150):
        self.directory = place / name
        self.ranks = ranks
        environment = dict(os.environ)
        environment.update({
            "HOLDFAST_JOB": JOB, "HOLDFAST_ROOT": str(place / "root"),
            "HOLDFAST_RUNTIME_DIR": str(place / "run"), "HOLDFAST_LINGER": "2s",
            "HOLDFAST_HOST_MEMORY": "6GiB", "HOLDFASTD": str(BUILD / "agent" / "holdfastd"),
        })
        environment.pop("HOLDFAST_KILL_AT", None)
        if drill:
            environment["HOLDFAST_KILL_AT"] = drill
        command = [BUILD / "examples" / "tiny_lm" / "tiny_lm", "--corpus", ROOT / "docs",
                   "--steps", str(steps), "--save-every", str(SAVE_EVERY), "--zero", "1",
                   "--bytes", str(ballast), "--device-ms", str(device_ms), "--check-restore",
                   "--save-wait-ms", "60000"]
        if not use_holdfast:
            command.append("--no-holdfast")
        self.begun = time.time()
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "examples" / "launch", "--nproc", str(ranks), "--max-restarts",
             str(max_restarts), "--log-dir", self.directory, "--events", self.directory.with_suffix(".events"),
             "--", *command], env=environment, stdout=subprocess.DEVNULL,
            stderr=open(self.directory.with_suffix(".launch"), "wb"))

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

    def finish(self):
        try:
            status = self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.directory.name} did not end; see {self.directory}") from None
        if status != 0:
            raise Failure(f"{self.directory.name} ended with {status}; see {self.directory}")

    def kill_everything(self):
        pids = [line["pid"] for line in self.launch_events("start")]
        self.process.kill()
        for pid in pids:
            kill(pid)
        self.process.wait()


class Demo:
    def __init__(self, place, ballast, report):
        self.place = place
        self.ballast = ballast
        self.report = report
        self.agent = Agent(place / "run")
        self.reference = {}
        self.losses = {}
        self.lost = []
        self.saves = []
        self.resume_seconds = []

    # ---- What is on storage

    def committed_steps(self):
        return sorted({int(path.parent.name[1:].split(".")[0])
                       for path in (self.place / "root" / JOB).glob("s*.a*/MANIFEST.json")})

    def checkpoint(self, step):
        """The directory of the greatest attempt that committed `step`."""
        return sorted((self.place / "root" / JOB).glob(f"s{step:012d}.a*/MANIFEST.json"))[-1].parent

    # ---- Proofs

    def check_restored(self, scenario, training, restart, expected_step):
        """All ranks restored `expected_step`, and every tensor and state equals the checkpoint."""
        restored = wait_until(lambda: len(found := training.events("restore_digest", restart)) ==
                              training.ranks and found, "all ranks to restore")
        steps = sorted({line["step"] for line in restored})
        self.report.check(scenario, "restored step, all ranks", [expected_step], steps)
        sources = training.events("restored", restart)
        copied = sum(line["bytes"] for line in sources)
        memory = sum(line["bytes_from_memory"] for line in sources)
        print(f"      {copied / 2**20:.0f} MiB, of them {memory / 2**20:.0f} from the agent's memory, "
              f"{max(line['ms'] for line in sources):.0f} ms")
        # What was restored from memory is on storage soon; a reader sees it when its manifest is.
        wait_until(lambda: expected_step in self.committed_steps(), f"step {expected_step} on storage")
        expected = checkpoint_digests(self.checkpoint(expected_step))
        found = restored_digests(restored)
        differing = sorted(str(key) for key in expected.keys() | found.keys()
                           if expected.get(key) != found.get(key))
        self.report.check(scenario, "tensors and states unequal to the checkpoint (h5py), of "
                          f"{len(expected)}", [], differing)
        verified = training.events("ballast_verified", restart)
        self.report.check(scenario, "ranks whose ballast stamps all verify", training.ranks,
                          len(verified))

    def collect(self, scenario, training):
        """After a run: its losses against the undisturbed run's, and its figures."""
        wrong = []
        for line in training.events("step"):
            self.losses[line["step"]] = line["loss"]
            if self.reference.get(line["step"]) != line["loss"]:
                wrong.append(line["step"])
        self.report.check(scenario, "steps whose loss differs from the undisturbed run", [],
                          sorted(set(wrong)))
        self.saves += [line for line in training.events("save_ended")]
        errors = [line["text"] for line in training.events("holdfast_error")]
        if errors:
            print(f"      training went on over {len(errors)} errors, the first: {errors[0]}")

    def time_to_resume(self, training, killed_at, restart):
        """Waits for the first new step, and returns the seconds from the kill until then."""
        wait_until(lambda: training.events("step", restart), "the first new step")
        return time.time() - killed_at

    def note_resume(self, seconds, lost_from, restored):
        self.resume_seconds.append(seconds)
        self.lost.append(max(0, lost_from - restored))
        print(f"      {seconds:.2f} s from the kill to the first new step, "
              f"{max(0, lost_from - restored)} steps done again")

    def last_step(self, training, restart):
        steps = [line["step"] for line in training.events("step", restart)]
        return max(steps, default=0)

    def images(self, step):
        """The agent's counters of all images of `step`, of all ranks and attempts."""
        status = wait_until(self.agent.status, "the agent's status")
        return [image for image in all_images(status) if image["step"] == step]

    # ---- Scenarios

    def undisturbed(self, steps):
        self.report.heading("Undisturbed run: 1 rank, no checkpoints")
        training = Training(self.place, "reference", 1, steps, 0, use_holdfast=False, device_ms=0)
        training.finish()
        self.reference = {line["step"]: line["loss"] for line in training.events("step")}
        self.report.check("undisturbed", "steps", steps, len(self.reference))

    def start(self, steps):
        self.report.heading(f"4 ranks, ZeRO-1, to step {steps}, a save every {SAVE_EVERY}")
        training = Training(self.place, "start", 4, steps, self.ballast)
        training.finish()
        self.report.check("start", "committed steps", list(range(SAVE_EVERY, steps + 1, SAVE_EVERY)),
                          self.committed_steps())
        self.collect("start", training)

    def kill_rank(self, name, heading, steps, point, fraction, victim, is_hit, restored_if_hit):
        """Stops the worker at the instant, kills a rank there, lets the worker go on."""
        for attempt in range(1, TRIES + 1):
            begun_at = self.committed_steps()[-1]
            step = begun_at + SAVE_EVERY
            self.report.heading(f"{heading} (step {step}, try {attempt})")
            self.agent.wait_gone()
            count = max(1, int(self.block_count() * fraction))
            training = Training(self.place, f"{name}-{attempt}", 4, steps, self.ballast,
                                drill=f"{point}:{count}:stop")
            worker = wait_until(lambda: self.agent.drilled_pid(point), f"kill point {point}")
            wait_until(lambda: process_state(worker) == "T", "the worker to stop")
            lost_from = self.last_step(training, 0)
            killed_at = time.time()
            kill(training.rank_pid(victim))
            kill(worker, signal.SIGCONT)
            wait_until(lambda: training.launch_events("exit"), "the rank's death")
            image = self.victim_image(step, victim)
            hit = is_hit(image)
            seconds = self.time_to_resume(training, killed_at, 1)
            print(f"      rank {victim}'s image of step {step}: {image['blocks_captured']} of "
                  f"{image['blocks']} blocks captured, {image['blocks_flushed']} flushed, "
                  f"{image['state']}")
            expected = restored_if_hit(begun_at, step) if hit else None
            if hit:
                self.report.check(name, "the kill hit the place", True, True)
                self.check_restored(name, training, 1, expected)
                self.note_resume(seconds, lost_from, expected)
            training.finish()
            self.collect(name, training)
            if hit:
                return
            print("      the kill missed; once more")
            steps += 2 * SAVE_EVERY
        raise Failure(f"{name}: {TRIES} kills missed")

    def victim_image(self, step, rank):
        """The dead rank's image as the agent has it once it knows of the death."""
        def settled():
            found = [image for image in self.images(step) if image["rank"] == rank]
            found = [image for image in found if image["state"] != "capturing"]
            return found[0] if found else None
        return wait_until(settled, f"the agent's account of rank {rank}'s image of step {step}")

    def block_count(self):
        """Blocks of all images of the newest checkpoint together."""
        newest = self.checkpoint(self.committed_steps()[-1])
        manifest = json.loads((newest / "MANIFEST.json").read_text(encoding="utf-8"))
        return sum(image["bytes"] for image in manifest["images"]) // (4 << 20)

    def kill_worker(self, name, heading, steps, point, fraction):
        """The worker kills itself at the instant; nobody restarts the ranks."""
        step = self.committed_steps()[-1] + SAVE_EVERY
        self.report.heading(f"{heading} (step {step})")
        self.agent.wait_gone()
        count = max(1, int(self.block_count() * fraction)) if fraction else 1
        training = Training(self.place, name, 4, steps, self.ballast, drill=f"{point}:{count}")
        worker = wait_until(lambda: self.agent.drilled_pid(point), f"kill point {point}")
        killed_at = time.time()
        status = wait_until(self.agent.status, "the next worker")
        print(f"      worker {worker} died at {point}, {count}th time; the next one answered after "
              f"{(time.time() - killed_at) * 1000:.0f} ms")
        self.report.check(name, "another worker serves", True, worker_pid(status) != worker)
        training.finish()
        self.report.check(name, "ranks that died", 0, sum(
            1 for line in training.launch_events("exit") if line["status"] != 0))
        self.report.check(name, f"step {step}, in whose save the worker died, is committed", True,
                          step in self.committed_steps())
        self.report.check(name, "steps lost", 0, 0 if not training.events("restored", 1) else 1)
        self.lost.append(0)
        self.collect(name, training)

    def kill_all(self, steps):
        begun_at = self.committed_steps()[-1]
        step = begun_at + SAVE_EVERY
        self.report.heading(f"Agent and trainers killed together, in the middle of a flush (step {step})")
        self.agent.wait_gone()
        point = "flush.block_written"
        training = Training(self.place, "all", 4, steps, self.ballast,
                            drill=f"{point}:{max(1, self.block_count() // 2)}:stop")
        worker = wait_until(lambda: self.agent.drilled_pid(point), f"kill point {point}")
        wait_until(lambda: process_state(worker) == "T", "the worker to stop")
        lost_from = self.last_step(training, 0)
        self.report.check("all", f"step {step} committed at the kill", False,
                          step in self.committed_steps())
        pids = self.agent.pids()
        killed_at = time.time()
        for pid in pids:
            kill(pid)
        training.kill_everything()
        wait_until(lambda: not self.agent.pids(), "the agent's death")
        self.report.check("all", "processes of the agent killed (keeper and worker)", 2, len(pids))
        self.collect("all", training)
        again = Training(self.place, "all-again", 4, begun_at + SAVE_EVERY, self.ballast)
        seconds = self.time_to_resume(again, killed_at, 0)
        self.check_restored("all", again, 0, begun_at)
        self.note_resume(seconds, lost_from, begun_at)
        again.finish()
        self.collect("all", again)

    def other_world(self, ranks, steps):
        name = f"{ranks}-ranks"
        newest = self.committed_steps()[-1]
        self.report.heading(f"The job goes on with {ranks} ranks, from step {newest} to {steps}")
        training = Training(self.place, name, ranks, steps, self.ballast)
        self.check_restored(name, training, 0, newest)
        training.finish()
        self.collect(name, training)
        self.report.check(name, f"step {steps} committed", True, steps in self.committed_steps())

    # ---- All of it

    def run(self):
        self.undisturbed(120)
        self.start(8)
        self.kill_rank("rank-capture", "A rank is killed in the middle of a capture", 16,
                       "capture.block_checksummed", 0.1, 2,
                       lambda image: 0 < image["blocks_captured"] < image["blocks"],
                       lambda before, _: before)
        self.kill_rank("rank-flush", "A rank is killed in the middle of a flush",
                       self.committed_steps()[-1] + 8, "flush.block_written", 0.6, 1,
                       lambda image: image["blocks_captured"] == image["blocks"] and
                       image["state"] in ("sealed", "durable"),
                       lambda _, step: step)
        for name, heading, point, fraction in (
                ("worker-capture", "The agent's worker is killed in a capture",
                 "capture.block_checksummed", 0.4),
                ("worker-flush", "The agent's worker is killed in a flush", "flush.block_written", 0.5),
                ("worker-manifest", "The agent's worker is killed right after the manifest",
                 "commit.manifest_linked", 0)):
            self.kill_worker(name, heading, self.committed_steps()[-1] + 8, point, fraction)
        self.kill_all(self.committed_steps()[-1] + 8)
        self.agent.wait_gone()
        self.other_world(2, self.committed_steps()[-1] + 8)
        self.other_world(3, self.committed_steps()[-1] + 8)
        self.summary()

    def summary(self):
        last = max(self.losses)
        self.report.heading("In all")
        self.report.check("all runs", "steps that no run trained, up to the last", [],
                          sorted(set(range(1, last + 1)) - set(self.losses)))
        figures = self.report.figures
        ended = [line for line in self.saves if line.get("state") == "committed_power"]
        stalls = sorted(line["call_us"] / 1e3 + line["blocked_ms"] for line in ended)
        flushes = [line["image_bytes"] / line["flush_ms"] / 1e3 for line in ended if line["flush_ms"] > 0]
        figures["saves"] = len(ended)
        figures["stall_ms_per_save_median"] = statistics.median(stalls)
        figures["stall_ms_per_save_max"] = stalls[-1]
        figures["flush_mb_per_second_and_rank_median"] = statistics.median(flushes)
        figures["image_bytes_per_rank"] = max(line["image_bytes"] for line in ended)
        figures["bytes_on_storage"] = sum(path.stat().st_size for path in
                                          (self.place / "root").rglob("*") if path.is_file())
        figures["resume_seconds"] = [round(seconds, 2) for seconds in self.resume_seconds]
        figures["steps_lost"] = self.lost
        print(f"  {figures['saves']} saves of ranks, {figures['image_bytes_per_rank'] / 2**20:.0f} MiB each")
        print(f"  stall per save: median {figures['stall_ms_per_save_median']:.2f} ms, greatest "
              f"{figures['stall_ms_per_save_max']:.2f} ms (hf_save and hf_wait_captured)")
        print(f"  flush: {figures['flush_mb_per_second_and_rank_median']:.0f} MB/s per rank, median, "
              "checksums and fsync included")
        print(f"  on storage: {figures['bytes_on_storage'] / 2**20:.0f} MiB")
        print(f"  seconds from kill to first new step: {figures['resume_seconds']}")
        print(f"  steps lost, per kill: {figures['steps_lost']}")


def all_images(status):
    """The images of saves in the agent's status, each with its rank."""
    return [dict(image, rank=session["rank"]) for session in status["sessions"]
            for image in session["images"] if "step" in image]


def worker_pid(status):
    return status["agent"]["worker_pid"]


def parse_size(text):
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write events and figures here")
    parser.add_argument("--bytes", type=parse_size, default=parse_size("512M"), metavar="SIZE",
                        help="ballast of the whole job (default 512M: 128M per rank)")
    parser.add_argument("--keep", action="store_true", help="leave build/demo for a look")
    arguments = parser.parse_args()
    place = BUILD.parent / "demo"
    shutil.rmtree(place, ignore_errors=True)
    for name in ("root", "run"):
        (place / name).mkdir(parents=True, mode=0o700)
    report = Report()
    demo = Demo(place, arguments.bytes, report)
    stopped_by = None
    try:
        demo.run()
    except Failure as failure:
        stopped_by = str(failure)
        print(f"\nThe demo stopped: {stopped_by}", flush=True)
    finally:
        for pid in demo.agent.pids():
            kill(pid)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(
            {"schema_version": 1, "events": report.events, "figures": report.figures,
             "stopped_by": stopped_by}, indent=1) + "\n", encoding="utf-8")
    failures = report.failures
    print(f"\n{len(report.events) - len(failures)} of {len(report.events)} expectations hold")
    ok = not failures and stopped_by is None
    if ok and not arguments.keep:
        shutil.rmtree(place, ignore_errors=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
