#!/usr/bin/python3
"""Trains tiny_lm, kills every process of the system at the worst moment, and proves each time that the
job goes on from the newest committed step, bit for bit. Ends with a job under `holdfast run` that does so
by itself (demo_recovery.py).

Where a kill must hit a place (the middle of a capture, of a flush), the agent's worker is armed to stop
itself at that very instant (docs/OPERATING.md, crash drills), and is killed or let go on when what had
to be killed is dead. The worker's counters of that instant prove that the place was hit; a kill that
missed is repeated.
"""

import argparse
import json
import pathlib
import shutil
import signal
import statistics
import sys
import time
import traceback

from demo_job import (BUILD, JOB, SAVE_EVERY, Agent, Failure, Training, holdfast, kill, total,
                      wait_until)
from demo_recovery import RecoveryDemo
from demo_report import Report

REFERENCE_STEPS = 120
BLOCK_BYTES = 4 << 20
TRIES = 6


def counters_text(images):
    text = f"{total(images, 'blocks_captured')} of {total(images, 'blocks')} blocks captured"
    if all("blocks_flushed" in image for image in images):
        text += f", {total(images, 'blocks_flushed')} flushed"
    return text


def rank_that_is_there(images, place):
    """The rank of an image of which some blocks are captured, the fewest; or of one that is partly
    flushed, and captured as far as any. If there is none, one that has just begun; else rank 0."""
    there = [image for image in images if 0 < image[f"blocks_{place}"] < image["blocks"]]
    if not there:
        begun = [image for image in images if image["blocks_captured"] == 0]
        return begun[0]["rank"] if begun else 0
    choose = min if place == "captured" else max
    return choose(there, key=lambda image: image["blocks_captured"])["rank"]


class Demo:
    def __init__(self, place, ballast, report):
        self.place = place
        self.ballast = ballast
        self.report = report
        self.agent = Agent(place / "run")
        self.trainings = []
        self.reference = {}
        self.losses = {}
        self.lost = []
        self.saves = []
        self.resume_seconds = []

    def train(self, name, ranks, steps, **options):
        options.setdefault("ballast", self.ballast)
        self.trainings.append(Training(self.place, name, ranks, steps, **options))
        return self.trainings[-1]

    def kill_everything(self):
        for training in self.trainings:
            training.kill_everything()
        self.agent.kill_for_good()

    # ---- What is on storage

    def committed_steps(self, root="root"):
        return sorted({int(path.parent.name[1:].split(".")[0])
                       for path in (self.place / root / JOB).glob("s*.a*/MANIFEST.json")})

    def checkpoint(self, step, root="root"):
        """The directory of the greatest attempt that committed `step`."""
        return sorted((self.place / root / JOB).glob(f"s{step:012d}.a*/MANIFEST.json"))[-1].parent

    def block_count(self):
        """Blocks of all images of the newest checkpoint together."""
        newest = self.checkpoint(self.committed_steps()[-1])
        manifest = json.loads((newest / "MANIFEST.json").read_text(encoding="utf-8"))
        return sum(image["bytes"] for image in manifest["images"]) // BLOCK_BYTES

    # ---- Proofs

    def check_restored(self, scenario, training, restart, expected_step):
        """All ranks restored `expected_step`; every tensor, state and blob equals the checkpoint."""
        # Here, so that --help needs no h5py.
        from checkpoint_digest import checkpoint_blobs, checkpoint_digests, restored_digests
        restored = wait_until(lambda: len(found := training.events("restore_digest", restart)) ==
                              training.ranks and found, "all ranks to restore")
        steps = sorted({line["step"] for line in restored})
        self.report.check(scenario, "restored step, all ranks", [expected_step], steps)
        sources = training.events("restored", restart)
        copied = sum(line["bytes"] for line in sources)
        memory = sum(line["bytes_from_memory"] for line in sources)
        self.report.note(f"{copied / 2**20:.0f} MiB, of them {memory / 2**20:.0f} from the agent's "
                         f"memory, {max(line['ms'] for line in sources):.0f} ms")
        # What was restored from memory is on storage soon; a reader sees it when its manifest is.
        wait_until(lambda: expected_step in self.committed_steps(), f"step {expected_step} on storage")
        checkpoint = self.checkpoint(expected_step)
        expected = checkpoint_digests(checkpoint)
        found = restored_digests(restored)
        differing = sorted(str(key) for key in expected.keys() | found.keys()
                           if expected.get(key) != found.get(key))
        self.report.check(scenario, "tensors and states unequal to the checkpoint (h5py), of "
                          f"{len(expected)}", [], differing)
        blobs, rank_blobs = checkpoint_blobs(checkpoint)
        names = ("samples_consumed", "shuffle", "cursor")
        expected = [{name: blobs[name] for name in names}] * training.ranks
        found = [{name: number(line[name]) for name in names} for line in restored]
        if sources[0]["world_size"] == training.ranks:
            # In another world a rank's generator is made from an old one's, not equal to it.
            names += ("jitter",)
            expected = [dict(values, jitter=rank_blobs["jitter"][line["rank"]])
                        for values, line in zip(expected, restored)]
            found = [dict(values, jitter=number(line["jitter"]))
                     for values, line in zip(found, restored)]
        self.report.check(scenario, f"ranks with a blob unequal to the checkpoint ({', '.join(names)})",
                          [], [line["rank"] for line, a, b in zip(restored, expected, found) if a != b])
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
        self.saves += training.events("save_ended")
        errors = [line["text"] for line in training.events("holdfast_error")]
        if errors:
            self.report.note(f"training went on over {len(errors)} errors, the first: {errors[0]}")

    def time_to_resume(self, training, killed_at, restart):
        """Waits for the first new step, and returns the seconds from the kill until then."""
        wait_until(lambda: training.events("step", restart), "the first new step")
        return time.time() - killed_at

    def note_resume(self, seconds, lost_from, restored):
        self.resume_seconds.append(seconds)
        self.lost.append(max(0, lost_from - restored))
        self.report.note(f"{seconds:.2f} s from the kill to the first new step, "
                         f"{max(0, lost_from - restored)} steps done again")

    # ---- Scenarios

    def undisturbed(self):
        self.report.heading("Undisturbed run: 1 rank, no checkpoints")
        training = self.train("reference", 1, REFERENCE_STEPS, ballast=0, use_holdfast=False,
                              device_ms=0)
        training.finish()
        self.reference = {line["step"]: line["loss"] for line in training.events("step")}
        self.report.check("undisturbed", "steps", REFERENCE_STEPS, len(self.reference))

    def start(self, steps):
        self.report.heading(f"4 ranks, ZeRO-1, to step {steps}, a save every {SAVE_EVERY}")
        training = self.train("start", 4, steps)
        training.finish()
        self.report.check("start", "committed steps", list(range(SAVE_EVERY, steps + 1, SAVE_EVERY)),
                          self.committed_steps())
        self.collect("start", training)

    def until_hit(self, name, heading, once):
        """Runs `once(run, base, step)` until it says that its kill has hit: `base` is the newest
        committed step, `step` the one in whose save the kill happens."""
        for attempt in range(1, TRIES + 1):
            base = self.committed_steps()[-1]
            self.report.heading(f"{heading} (step {base + SAVE_EVERY}" +
                                (f", try {attempt})" if attempt > 1 else ")"))
            self.agent.wait_gone()
            if once(f"{name}-{attempt}", base, base + SAVE_EVERY):
                return
        raise Failure(f"{name}: {TRIES} kills missed")

    def armed(self, run, steps, point, fraction, **options):
        """A run of 4 ranks whose first worker stops at `point`, after `fraction` of all blocks. Returns
        it and the worker, which has stopped."""
        count = max(1, int(self.block_count() * fraction))
        training = self.train(run, 4, steps, drill=f"{point}:{count}:stop", **options)
        return training, self.agent.wait_stopped_at(point)

    def kill_rank(self, name, heading, point, fraction, place, **options):
        """Kills a rank that is there while the worker stands still at `point`. `place`: "captured" or
        "flushed"."""
        def once(run, base, step):
            training, worker = self.armed(run, step + SAVE_EVERY, point, fraction, **options)
            # Nothing slow until the kill: only the worker stands still, captures go on.
            images = self.agent.images_at(point, step)
            attempt = max(image["attempt"] for image in images)
            images = [image for image in images if image["attempt"] == attempt]
            victim = rank_that_is_there(images, place)
            killed_at = time.time()
            kill(training.rank_pid(victim))
            kill(worker, signal.SIGCONT)
            stopped = [image for image in images if image["rank"] == victim]
            lost_from = training.last_step(0)
            wait_until(lambda: training.launch_events("exit"), "the rank's death")
            # A dead rank captures no more; the flush, which is the worker's, stood still at the kill.
            settled = self.agent.images_of_dead(step, victim, attempt)
            image = settled if place == "captured" else stopped
            found, blocks = total(image, f"blocks_{place}"), total(image, "blocks")
            is_hit = 0 < found < blocks and (place == "captured" or is_captured(settled))
            seconds = self.time_to_resume(training, killed_at, 1)
            if not is_hit:
                self.report.miss(name, counters_text(image))
            else:
                self.report.note(f"rank {victim}'s image of step {step} at its death: "
                                 f"{counters_text(image)}")
                self.report.check_between(name, f"blocks {place}, of {blocks}", 1, found, blocks - 1)
                expected = base if place == "captured" else step
                self.check_restored(name, training, 1, expected)
                self.note_resume(seconds, lost_from, expected)
            training.finish()
            self.collect(name, training)
            return is_hit
        self.until_hit(name, heading, once)

    def kill_worker(self, name, heading, point, fraction, place):
        """Kills the worker where it stands; nobody restarts the ranks. `place`: "captured", "flushed",
        or "manifest": named, and nobody told."""
        def once(run, base, step):
            training, worker = self.armed(run, step + SAVE_EVERY, point, fraction)
            if place == "manifest":
                told = [line for line in training.events("save_ended") if line["step"] == step]
                is_hit = step in self.committed_steps() and not told
                text = (f"MANIFEST.json {'is' if step in self.committed_steps() else 'is not'} there, "
                        f"{len(told)} ranks know of it")
            else:
                images = self.agent.images_at(point, step)
                found, blocks = total(images, f"blocks_{place}"), total(images, "blocks")
                is_hit = 0 < found < blocks
                text = counters_text(images)
            killed_at = time.time()
            kill(worker)
            status = wait_until(self.other_worker(worker), "the next worker")
            answered_ms = (time.time() - killed_at) * 1000
            if not is_hit:
                self.report.miss(name, text)
            else:
                self.report.note(f"step {step} at its death, all ranks: {text}; the next worker "
                                 f"answered after {answered_ms:.0f} ms")
                if place == "manifest":
                    self.report.check(name, "manifest there, and ranks told of it", [True, 0],
                                      [True, len(told)])
                else:
                    self.report.check_between(name, f"blocks {place}, of {blocks}", 1, found,
                                              blocks - 1)
            training.finish()
            if is_hit:
                self.report.check(name, "times the keeper has started another worker", 1,
                                  status["agent"]["worker_restarts"])
                self.report.check(name, "ranks that died", 0, sum(
                    1 for line in training.launch_events("exit") if line["status"] != 0))
                self.report.check(name, f"step {step}, in whose save the worker died, is committed",
                                  True, step in self.committed_steps())
                self.lost.append(0)
            self.collect(name, training)
            return is_hit
        self.until_hit(name, heading, once)

    def other_worker(self, dead):
        def answered():
            status = self.agent.status()
            return status if status and status["agent"]["worker_pid"] != dead else None
        return answered

    def kill_all(self, name, heading, point, fraction):
        def once(run, base, step):
            training, _ = self.armed(run, step + SAVE_EVERY, point, fraction)
            images = self.agent.images_at(point, step)
            found, blocks = total(images, "blocks_flushed"), total(images, "blocks")
            lost_from = training.last_step(0)
            committed = step in self.committed_steps()
            killed_at = time.time()
            pids = self.agent.pids()
            for pid in pids:
                kill(pid)
            training.kill_everything()
            wait_until(lambda: not self.agent.pids(), "the agent's death")
            self.collect(name, training)
            is_hit = 0 < found < blocks and not committed
            if not is_hit:
                self.report.miss(name, counters_text(images))
                self.train(f"{run}-again", 4, step).finish()
                return False
            self.report.note(f"step {step} at the kill, all ranks: {counters_text(images)}")
            self.report.check_between(name, f"blocks flushed, of {blocks}", 1, found, blocks - 1)
            self.report.check(name, "processes of the agent killed (keeper and worker)", 2, len(pids))
            again = self.train(f"{run}-again", 4, step)
            seconds = self.time_to_resume(again, killed_at, 0)
            self.check_restored(name, again, 0, base)
            self.note_resume(seconds, lost_from, base)
            again.finish()
            self.collect(name, again)
            return True
        self.until_hit(name, heading, once)

    def go_on(self, name, ranks, what, **options):
        """The job goes on on `ranks` ranks, in another layout if `options` say so."""
        newest = self.committed_steps()[-1]
        steps = newest + SAVE_EVERY
        self.report.heading(f"The job goes on {what}, from step {newest} to {steps}")
        training = self.train(name, ranks, steps, **options)
        self.check_restored(name, training, 0, newest)
        training.finish()
        self.collect(name, training)
        self.report.check(name, f"step {steps} committed", True, steps in self.committed_steps())

    # ---- Offline, without an agent

    def verb(self, name, what, expected, *arguments):
        """Runs a verb; its exit status must be `expected`. Returns what it printed."""
        status, text = holdfast(*arguments)
        if not self.report.check(name, what, expected, status):
            self.report.note(text.strip())
        return text

    def offline(self, name="offline"):
        """The newest checkpoint in another layout, compared, looked at with h5py, and trained on."""
        from checkpoint_digest import checkpoint_digests, view_digests
        step = self.committed_steps()[-1]
        source, older = self.checkpoint(step), self.checkpoint(self.committed_steps()[-2])
        self.report.heading(f"Step {step} is resharded offline, from ZeRO-1 on 4 ranks to tp=2 dp=2")
        self.verb(name, "reshard, exit status", 0, "reshard", source, self.place / "resharded", "--to",
                  "tp=2,dp=2,zero=1")
        resharded = self.checkpoint(step, "resharded")
        self.verb(name, "verify of the result, exit status", 0, "verify", resharded)
        self.verb(name, "diff with the source by fingerprints, exit status", 0, "diff", source, resharded)
        self.verb(name, "diff with the source by bytes, exit status", 0, "diff", "--bytes", source,
                  resharded)
        self.verb(name, "diff with an older step, exit status", 1, "diff", older, resharded)
        view = self.place / "view.h5"
        self.verb(name, "view, exit status", 0, "view", resharded, view)
        expected, found = checkpoint_digests(source), view_digests(view)
        self.report.check(name, f"tensors and states that h5py reads otherwise through the view, of "
                          f"{len(expected)}", [],
                          sorted(str(key) for key in expected.keys() | found.keys()
                                 if expected.get(key) != found.get(key)))
        self.report.heading("Another job goes on from there (HOLDFAST_RESTORE_FROM), as tp=2 dp=2")
        steps = step + SAVE_EVERY
        training = self.train("from-resharded", 4, steps, layout=("--tp", "2", "--zero", "1"),
                              root="other", restore_from=resharded)
        training.finish()
        self.report.check(name, "restored step, all ranks", [step],
                          sorted({line["step"] for line in training.events("restored")}))
        self.collect(name, training)
        self.report.check(name, f"step {steps} committed", True, steps in self.committed_steps("other"))

    # ---- All of it

    def run(self):
        self.undisturbed()
        self.start(2 * SAVE_EVERY)
        self.kill_rank("rank-capture", "A rank is killed in the middle of a capture",
                       "capture.begun", 0, "captured")
        self.kill_rank("device-capture", "A rank is killed in the middle of a capture from device memory, "
                       "by a driver without a GPU", "capture.block_checksummed", 0, "captured", device=True)
        self.kill_rank("rank-flush", "A rank is killed in the middle of a flush",
                       "flush.block_written", 0.6, "flushed")
        self.kill_worker("worker-capture", "The agent's worker is killed in a capture",
                         "capture.block_checksummed", 0, "captured")
        self.kill_worker("worker-flush", "The agent's worker is killed in a flush",
                         "flush.block_written", 0.5, "flushed")
        self.kill_worker("worker-manifest", "The agent's worker is killed right after the manifest",
                         "commit.manifest_linked", 0, "manifest")
        self.kill_all("all", "Agent and trainers are killed together, in the middle of a flush",
                      "flush.block_written", 0.5)
        self.agent.wait_gone()
        self.go_on("2-ranks", 2, "with 2 ranks")
        self.go_on("3-ranks", 3, "with 3 ranks")
        self.go_on("4-ranks", 4, "with 4 ranks")
        self.go_on("tp", 2, "tensor-parallel, tp=2 dp=1", layout=("--tp", "2", "--zero", "0"))
        self.go_on("pp", 3, "as a pipeline, pp=3", layout=("--pp", "3", "--zero", "0"))
        self.go_on("zero-3", 3, "with ZeRO-3 on 3 ranks", layout=("--zero", "3"))
        self.go_on("back", 4, "as it was, ZeRO-1 on 4 ranks")
        self.agent.wait_gone()
        self.offline()
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
        figures["kills_that_missed"] = len(self.report.missed)
        print(f"  {figures['saves']} saves of ranks, up to "
              f"{figures['image_bytes_per_rank'] / 2**20:.0f} MiB each")
        print(f"  stall per save: median {figures['stall_ms_per_save_median']:.2f} ms, greatest "
              f"{figures['stall_ms_per_save_max']:.2f} ms (hf_save and hf_wait_captured)")
        print(f"  flush: {figures['flush_mb_per_second_and_rank_median']:.0f} MB/s per rank, median, "
              "checksums and fsync included")
        print(f"  on storage: {figures['bytes_on_storage'] / 2**20:.0f} MiB")
        print(f"  seconds from kill to first new step: {figures['resume_seconds']}")
        print(f"  steps lost, per kill: {figures['steps_lost']}")
        if self.report.missed:
            print(f"  kills that missed their place and were repeated: {len(self.report.missed)}")


def number(value):
    """As tiny_lm prints it: decimal, or hexadecimal in a string."""
    return int(value, 16) if isinstance(value, str) else value


def is_captured(images):
    return total(images, "blocks_captured") == total(images, "blocks")


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
    for name in ("root", "other", "run"):
        (place / name).mkdir(parents=True, mode=0o700)
    report = Report()
    demo = Demo(place, arguments.bytes, report)
    recovery = RecoveryDemo(BUILD, place / "recovery", report)
    stopped_by = None
    try:
        demo.run()
        recovery.run()
    except Failure as failure:
        stopped_by = str(failure)
    except Exception as error:  # a defect of the demo: the report says so, and ends as usual
        stopped_by = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        demo.kill_everything()
        recovery.kill_everything()
    ok = report.finish(stopped_by, arguments.json)
    if ok and not arguments.keep:
        shutil.rmtree(place, ignore_errors=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
