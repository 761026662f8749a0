"""The part of gpu-check that captures from the GPU and restores to it: what `holdfast doctor` says of it; the tests of the
hook library's device code, on the real driver; tiny_lm with its tensors on the GPU, also killed in the middle of a
capture; arrays of PyTorch, CuPy and JAX; and the figures of bench/device_capture.py.

A rehearsal does the same on the driver without a GPU (tests/support/fake_cuda), but for what needs a GPU's frameworks.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time

TESTS = ("device_driver_test", "device_model_test", "capture_test", "device_capture_test", "device_restore_test")
# The second is PyTorch's allocator that maps virtual memory.
ARRAYS = (("torch", {}), ("torch", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}), ("cupy", {}),
          ("jax", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}))
NO_SUCH_FRAMEWORK = 77
START_SECONDS = 30
TEST_SECONDS = 90
TRAINING_SECONDS = 60
ARRAYS_SECONDS = 90  # JAX compiles
BENCH_SECONDS = 180
BENCH_BYTES = 2 << 30
REHEARSAL_BYTES = 8 << 20
# What one image of the job that is killed takes some seconds for.
SLOW_MIB_PER_SECOND = "32"


class Failed(Exception):
    """Something that was to hold does not."""


def last(text, count=600):
    return text[-count:].strip()


class Capture:
    """`report` is gpu_check.py's Report, `here` the folder of the bundle, `directory` a short path for what is made and
    removed, `files` a folder for what is kept; `without_torch()` says why there is no PyTorch."""

    def __init__(self, report, here, directory, files, rehearse, without_torch):
        self.report, self.here, self.directory, self.files = report, here, directory, files
        self.rehearse, self.without_torch = rehearse, without_torch
        self.libraries = here / "lib"
        self.runs = 0

    # ---- How programs are run

    def environment(self, *libraries, **more):
        """Nobody's settings but ours; in a rehearsal the driver is the one without a GPU."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
        path = [str(library) for library in libraries]
        if self.rehearse:
            path.append(str(self.here / "rehearsal"))
        path += filter(None, [variables.get("LD_LIBRARY_PATH")])
        return {**variables, **({"LD_LIBRARY_PATH": ":".join(path)} if path else {}), **more}

    def run_program(self, command, seconds, environment, log):
        """Its exit status and what it printed, kept in the file `log` too."""
        result = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True,
                                errors="replace", timeout=self.report.seconds(seconds))
        with open(self.files / log, "a") as file:
            file.write(result.stdout + result.stderr)
        return result

    def agent_command(self):
        """The agent that the library starts: with the bundle's libraries, which PyTorch is not to get."""
        path = self.directory / "holdfastd"
        path.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH="{self.libraries}" exec "{self.here / "bin" / "holdfastd"}" "$@"\n')
        path.chmod(0o755)
        return path

    def memory(self, size):
        """A directory for so many bytes: in memory, so that no disk is measured, if there is room."""
        for path in ("/dev/shm", self.directory):
            with contextlib.suppress(OSError):
                if shutil.disk_usage(path).free > size and os.access(path, os.W_OK):
                    return path
        raise Failed(f"neither /dev/shm nor {self.directory} has {size} bytes free")

    # ---- The checks

    def programs(self):
        """Each program of the bundle can be loaded here: what else would fail is explained by this line."""
        failed = []
        commands = [(name, "--gtest_list_tests") for name in TESTS]
        commands += [("holdfast", "--version"), ("holdfastd", "--version"), ("tiny_lm", "--help")]
        for name, argument in commands:
            result = self.run_program([self.here / "bin" / name, argument], START_SECONDS,
                                      self.environment(self.libraries), "programs.log")
            if result.returncode != 0:
                failed.append(f"{name}: {last(result.stderr or result.stdout, 200)}")
        if failed:
            raise Failed("; ".join(failed))
        return f"{len(commands)} programs start ({' '.join(platform.libc_ver())})"

    def doctor(self):
        """What a user is told about the GPU, the driver and the memory limits."""
        result = self.run_program([self.here / "bin" / "holdfast", "--json", "doctor"], START_SECONDS,
                                  self.environment(self.libraries), "doctor.log")
        checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
        said = "; ".join(f"{name} {checks[name]['health']}: {checks[name]['found']}" for name in ("cuda", "memlock"))
        if checks["cuda"]["health"] not in ("good", "limited"):
            raise Failed(said)
        return said

    def test(self, name):
        result = self.run_program([self.here / "bin" / name, "--gtest_brief=1"], TEST_SECONDS, self.environment(),
                                  f"{name}.log")
        counts = {word.lower(): int(count)
                  for word, count in re.findall(r"\[\s+(PASSED|SKIPPED|FAILED)\s+\] (\d+) tests?", result.stdout)}
        if result.returncode != 0 or counts.get("passed", 0) == 0:
            raise Failed(f"exit status {result.returncode}; {last(result.stdout)} {last(result.stderr, 200)}")
        return f"{counts['passed']} passed, {counts.get('skipped', 0)} skipped (what only a fake driver can do)"

    def training(self, steps, *flags, **more):
        """One rank of tiny_lm up to that step, begun: the process, and the file that it prints to."""
        place = self.directory / "tiny_lm"
        place.mkdir(exist_ok=True)
        self.runs += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = self.environment(
            self.libraries, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), TORCHELASTIC_RUN_ID=f"run-{self.runs}", TORCHELASTIC_RESTART_COUNT="0",
            HOLDFASTD=str(self.agent_command()), HOLDFAST_JOB="tiny_lm", HOLDFAST_ROOT=str(place / "root"),
            HOLDFAST_RUNTIME_DIR=str(place), HOLDFAST_HOST_MEMORY="512MiB", HOLDFAST_LINGER="1s", **more)
        output = self.files / f"tiny_lm-{self.runs}.log"
        with open(output, "wb") as log:
            process = subprocess.Popen(
                [self.here / "bin" / "tiny_lm", "--corpus", self.here / "device_capture.py", "--bytes", "64M", "--steps",
                 str(steps), "--save-every", "2", *flags], env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log)
        return process, output

    @staticmethod
    def events(output):
        """What it has printed so far; of a line that is not whole, nothing."""
        lines = output.read_text(errors="replace").split("\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def train(self, steps, *flags, **more):
        """A whole run: step -> loss, and its saves and restores."""
        process, output = self.training(steps, *flags, **more)
        try:
            status = process.wait(self.report.seconds(TRAINING_SECONDS))
        finally:
            process.kill()
            process.wait()
        if status != 0:
            raise Failed(f"tiny_lm: exit status {status}; {last(output.read_text(errors='replace'), 400)}")
        events = self.events(output)
        trouble = [event for event in events if event["event"] == "holdfast_error"]
        if trouble:
            raise Failed(f"tiny_lm: {trouble}")
        return ({event["step"]: event["loss"] for event in events if event["event"] == "step"},
                [event for event in events if event["event"] in ("save_ended", "restored")])

    def killed(self, steps, in_save_of):
        """A run that is killed while that step's image is captured; its losses."""
        process, output = self.training(steps, "--device", HOLDFAST_DEVICE_COPY_MIB_PER_SECOND=SLOW_MIB_PER_SECOND)
        try:
            end = time.monotonic() + self.report.seconds(TRAINING_SECONDS)
            begun = {"event": "save_begun", "step": in_save_of}
            while not any(begun.items() <= event.items() for event in self.events(output)):
                if process.poll() is not None or time.monotonic() > end:
                    raise Failed(f"tiny_lm has not come to the save of step {in_save_of}: {last(output.read_text())}")
                time.sleep(0.05)
            time.sleep(0.3)  # the image takes seconds
        finally:
            process.kill()
            process.wait()
        events = self.events(output)
        if any(event["event"] == "save_ended" and event["step"] == in_save_of for event in events):
            raise Failed(f"the save of step {in_save_of} was over before the kill: it proves nothing")
        return {event["step"]: event["loss"] for event in events if event["event"] == "step"}

    def tiny_lm(self):
        """Trained on the GPU in three runs, of which one is killed in the middle of a capture and each goes on from what
        was saved before, it has the losses of a run in host memory."""
        expected, _ = self.train(8, "--no-holdfast")
        first, saves = self.train(4, "--device")
        second = self.killed(8, in_save_of=6)
        third, ended = self.train(8, "--device")
        restored = [event["step"] for event in ended if event["event"] == "restored"]
        saves = [event for event in saves + ended if event["event"] == "save_ended"]
        found = {**first, **second, **third}
        if found != expected or restored != [4] or set(first) & set(third):
            raise Failed(f"losses or the restored step differ: {first}, {second}, {third}, restored {restored}; "
                         f"in host memory {expected}")
        if not saves or not all(event["device_bytes"] > 64 << 20 for event in saves):
            raise Failed(f"not all was captured from the device: {saves}")
        speeds = [event["device_bytes"] / event["device_ms"] / 1e6 for event in saves]
        return (f"{len(expected)} losses bit for bit, {len(saves)} saves at {min(speeds):.3g} to {max(speeds):.3g} GB/s, "
                "restored from step 4 behind a kill in the capture of step 6")

    def arrays(self, framework, more):
        """Saved and restored bit for bit."""
        place = self.directory / "arrays"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        environment = self.environment(
            PYTHONPATH=str(self.here / "python"), HOLDFAST_LIBRARY=str(self.libraries / "libholdfast.so"),
            HOLDFASTD=str(self.agent_command()), HOLDFAST_ROOT=str(place / "root"), HOLDFAST_RUNTIME_DIR=str(place / "run"),
            HOLDFAST_HOST_MEMORY="512MiB", HOLDFAST_LINGER="1s", **more)
        result = self.run_program([sys.executable, self.here / "gpu_check_arrays.py", framework], ARRAYS_SECONDS,
                                  environment, "arrays.log")
        if result.returncode == NO_SUCH_FRAMEWORK:
            return f"not checked: {last(result.stderr, 200)}"
        if result.returncode != 0:
            raise Failed(f"exit status {result.returncode}; {last(result.stderr)}")
        return last(result.stdout)

    def bench(self):
        out = self.files / "device_capture.json"
        size = REHEARSAL_BYTES if self.rehearse else BENCH_BYTES
        command = [sys.executable, self.here / "device_capture.py", "--library", self.libraries / "libholdfast.so",
                   "--daemon", self.agent_command(), "--package", self.here / "python", "--json", out, "--bytes", size,
                   "--directory", self.memory(3 * size)]
        if self.rehearse:
            command += ["--device", "cpu"]
        log = self.files / "device_capture.log"
        with open(log, "wb") as file:
            ended = "exit status {}"
            try:
                ended = ended.format(subprocess.run(
                    [str(part) for part in command], env=self.environment(), stdout=file, stderr=file,
                    timeout=self.report.seconds(BENCH_SECONDS)).returncode)
            except subprocess.TimeoutExpired:
                ended = f"not done within {BENCH_SECONDS} s"
        if not out.exists():
            raise Failed(f"no result; {ended}; {last(log.read_text(errors='replace'))}")
        result = json.loads(out.read_text())
        for row in result["rows"]:
            against = "" if row["baseline"] is None else f", against {row['baseline']:.4g}"
            goal = f" (goal {row['goal']})" if row["goal"] else ""
            self.report.say("FAILED" if row["holds"] is False else "ok", row["name"],
                            f"{row['value']:.4g} {row['unit']}{against}{goal}; {row['note']}".rstrip("; "))
        self.report.rows += result["rows"]
        if result["failures"] or not result["done"]:
            raise Failed(f"{ended}; {'; '.join(result['failures'])}")
        return f"{len(result['rows'])} figures"

    def run(self):
        self.report.step("the programs start here", self.programs)
        self.report.step("holdfast doctor", self.doctor)
        for name in TESTS:
            self.report.step(name, lambda name=name: self.test(name))
        self.report.step("tiny_lm --device", self.tiny_lm)
        if self.without_torch() is not None:
            self.report.say("skipped", "arrays, and what is measured", self.without_torch())
            return
        for framework, more in (("numpy", {}),) if self.rehearse else ARRAYS:
            what = " ".join([framework, *(f"{name}={value}" for name, value in more.items())])
            self.report.step(f"arrays of {what}", lambda f=framework, m=more: self.arrays(f, m))
        self.report.step("capture and restore, measured", self.bench)
