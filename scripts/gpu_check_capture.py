"""The part of gpu-check that captures from the GPU and restores to it: the tests of the hook library's device
code, on the real driver; tiny_lm with its tensors on the GPU; and the figures of bench/device_capture.py."""

import json
import os
import re
import subprocess
import sys

TESTS = ("device_driver_test", "device_capture_test", "device_restore_test")
TEST_SECONDS = 60
TRAINING_SECONDS = 60
BENCH_SECONDS = 180
REHEARSAL_BYTES = 8 << 20


class Capture:
    """`check` is gpu_check.py's Check, `here` the folder of the bundle; `failure` is what a check raises."""

    def __init__(self, check, here, failure):
        self.check, self.here, self.failure = check, here, failure

    def test(self, name):
        result = subprocess.run([self.here / "bin" / name, "--gtest_brief=1"], capture_output=True, text=True,
                                timeout=TEST_SECONDS)
        (self.check.files / f"{name}.log").write_text(result.stdout + result.stderr)
        counts = {word.lower(): int(count)
                  for word, count in re.findall(r"\[\s+(PASSED|SKIPPED|FAILED)\s+\] (\d+) tests?", result.stdout)}
        if result.returncode != 0 or counts.get("passed", 0) == 0:
            raise self.failure(f"exit status {result.returncode}; {result.stdout[-600:]}{result.stderr[-200:]}")
        return f"{counts['passed']} passed, {counts.get('skipped', 0)} skipped (what only a fake driver can do)"

    def agent_command(self):
        """The agent that the library starts: with the bundle's libraries, which PyTorch is not to get."""
        path = self.check.directory / "holdfastd"
        libraries, agent = self.here / "lib", self.here / "bin" / "holdfastd"
        path.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH="{libraries}" exec "{agent}" "$@"\n')
        path.chmod(0o755)
        return path

    def train(self, steps, *flags):
        """One rank of tiny_lm, to that step: step -> loss, and the events of its saves and its restore."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
        place = self.check.directory / "tiny_lm"
        place.mkdir(exist_ok=True)
        environment.update(
            LD_LIBRARY_PATH=f"{self.here / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            HOLDFASTD=str(self.agent_command()), HOLDFAST_JOB="tiny_lm", HOLDFAST_ROOT=str(place / "root"),
            HOLDFAST_RUNTIME_DIR=str(place), HOLDFAST_HOST_MEMORY="256MiB", HOLDFAST_LINGER="1s")
        result = subprocess.run(
            [sys.executable, self.here / "launch", "--nproc", "1", "--", self.here / "bin" / "tiny_lm", "--corpus",
             self.here / "device_capture.py", "--bytes", "64M", "--steps", str(steps), "--save-every", "2", *flags],
            env=environment, capture_output=True, text=True, timeout=TRAINING_SECONDS)
        with open(self.check.files / "tiny_lm.log", "a") as log:
            log.write(result.stdout + result.stderr)
        if result.returncode != 0:
            raise self.failure(f"tiny_lm: exit status {result.returncode}; {result.stderr[-400:]}")
        events = [json.loads(line.split(" ", 1)[1]) for line in result.stdout.splitlines()]
        losses = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
        return losses, [event for event in events if event["event"] in ("save_ended", "restored")]

    def tiny_lm(self):
        """Trained on the GPU in two runs, of which the second goes on from what the first has saved, it has
        the losses of a run in host memory."""
        expected, _ = self.train(8, "--no-holdfast")
        first, saves = self.train(4, "--device")
        second, ended = self.train(8, "--device")
        restored = [event["step"] for event in ended if event["event"] == "restored"]
        if {**first, **second} != expected or restored != [4] or set(first) & set(second):
            raise self.failure(f"losses or the restored step differ: {first}, {second}, restored {restored}; "
                               f"in host memory {expected}")
        if not all(event["device_bytes"] > 64 << 20 for event in saves):
            raise self.failure(f"not all was captured from the device: {saves}")
        return f"{len(expected)} losses bit for bit, {len(saves)} saves, restored on the device from step 4"

    def bench(self):
        out = self.check.files / "device_capture.json"
        command = [sys.executable, self.here / "device_capture.py", "--library", self.here / "lib" / "libholdfast.so",
                   "--daemon", self.agent_command(), "--package", self.here / "python", "--json", out]
        if self.check.rehearse:
            command += ["--device", "cpu", "--bytes", str(REHEARSAL_BYTES)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
        with open(self.check.files / "device_capture.log", "wb") as log:
            ended = "exit status {}"
            try:
                ended = ended.format(subprocess.run(command, env=environment, stdout=log, stderr=log,
                                                    timeout=BENCH_SECONDS).returncode)
            except subprocess.TimeoutExpired:
                ended = f"not done within {BENCH_SECONDS} s"
        if not out.exists():
            raise self.failure(f"no result; {ended}; {(self.check.files / 'device_capture.log').read_text()[-600:]}")
        result = json.loads(out.read_text())
        for row in result["rows"]:
            against = "" if row["baseline"] is None else f", against {row['baseline']:.4g}"
            goal = f" (goal {row['goal']})" if row["goal"] else ""
            self.check.say("FAILED" if row["holds"] is False else "ok", row["name"],
                           f"{row['value']:.4g} {row['unit']}{against}{goal}; {row['note']}".rstrip("; "))
        self.check.rows += result["rows"]
        if result["failures"] or not result["done"]:
            raise self.failure(f"{ended}; {'; '.join(result['failures'])}")
        return f"{len(result['rows'])} figures"

    def run(self):
        for name in TESTS:
            if self.check.rehearse:
                self.check.say("skipped", name, "there is no driver in a rehearsal")
            else:
                self.check.step(name, lambda name=name: self.test(name))
        if self.check.rehearse:
            self.check.say("skipped", "tiny_lm --device", "there is no driver in a rehearsal")
        else:
            self.check.step("tiny_lm --device", self.tiny_lm)
        self.check.step("capture and restore, measured", self.bench)
