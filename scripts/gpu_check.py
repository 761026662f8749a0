"""Checks on a real GPU, in less than ten minutes, what cannot be checked without one: capture from and restore to
device memory with the real driver, and the NCCL profiler plugin with real NCCL and the real agent.

Runs in the folder that `scripts/gpu-check --bundle DIR` makes, which needs nothing on the machine but an
NVIDIA driver and a python3; what needs PyTorch is skipped without it. Checks do not depend on each other: what
fails is said, and the next one runs. The report is on disk behind every line, and when the time is up, or TERM or
an interrupt comes, it ends as it is. What is checked, and what each line means: docs/gpu-results.md.

Exit status: 0 if all that is possible here holds, 1 if something does not, 77 if there is no GPU here: nothing was
checked.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]  # of the bundle, or of the repository
import gpu_check_capture  # noqa: E402  (the path comes first)
from gpu_check_monitor import Failure, Monitor  # noqa: E402

NO_GPU = 77
LATE_SECONDS = 15     # behind --seconds everything is ended, whatever it does
IMPORT_SECONDS = 120  # of PyTorch, on a machine that has never done it
KEPT_BYTES_MAX = 4 << 20  # of one file


class OutOfTime(BaseException):
    """Everything ends now, and what was found is kept."""


class Report:
    """What was found. It is written to `out`/report.json behind every line."""

    def __init__(self, out, seconds):
        self.out = out
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        self.about, self.lines, self.rows = {}, [], []
        self.out.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self):
        partial = self.out / "report.json.partial"
        partial.write_text(json.dumps(
            {"schema_version": 1, "about": self.about, "seconds": time.monotonic() - self.begin,
             "checks": self.lines, "figures": self.rows}, indent=1))
        partial.replace(self.out / "report.json")

    def say(self, outcome, name, detail):
        self.lines.append({"outcome": outcome, "name": name, "detail": detail})
        print(f"{outcome:8s} {name}: {detail}", flush=True)
        self.save()

    def seconds(self, most):
        """For something that may take so long at most. Failure: there is none."""
        left = self.end - time.monotonic()
        if left < 1:
            raise Failure("no time left (--seconds)")
        return min(most, left)

    def step(self, name, body):
        """Runs one check. True: it holds. Whatever it raises is said, and the next ones run."""
        if time.monotonic() > self.end:
            self.say("skipped", name, "no time left (--seconds)")
            return False
        begin = time.monotonic()
        try:
            detail = body()
        except Exception as failure:  # of whatever kind: the others have something to say all the same
            self.say("FAILED", name, f"{type(failure).__name__}: {failure}")
            return False
        self.say("ok", name, f"{detail} [{time.monotonic() - begin:.1f} s]")
        return True

    def failed(self):
        return [line["name"] for line in self.lines if line["outcome"] == "FAILED"]


def gpu_missing():
    """Why nothing can be checked here; None if it can."""
    if shutil.which("nvidia-smi") is None and not pathlib.Path("/dev/nvidiactl").exists():
        return "no NVIDIA GPU here (neither nvidia-smi nor /dev/nvidiactl)"
    return None


@functools.cache
def torch_missing():
    """Why nothing that needs PyTorch can be checked here; None if it can."""
    try:
        found = subprocess.run(
            [sys.executable, "-c", "import torch, torch.distributed as d\n"
             "print('gpu' if torch.cuda.is_available() else 'no CUDA device', d.is_nccl_available())"],
            capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"importing PyTorch takes more than {IMPORT_SECONDS} s"
    if found.returncode != 0:
        return f"{sys.executable} has no PyTorch: {found.stderr.strip().splitlines()[-1:]}"
    if found.stdout.split() != ["gpu", "True"]:
        return f"PyTorch says: {found.stdout.strip()}"
    return None


def machine():
    """What may explain what is found."""
    about = {"system": platform.platform(), "libc": " ".join(platform.libc_ver()),
             "python": platform.python_version(), "processors": os.cpu_count(),
             "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        about["driver"] = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current",
             "--format=csv,noheader"], capture_output=True, text=True, timeout=30).stdout.strip()
    return about


def pack(files, to):
    """Files that are too large to be kept are left out, and named."""
    left_out = []
    with tarfile.open(to, "w:gz") as archive:
        for path in sorted(files.rglob("*")):
            if path.is_file() and path.stat().st_size > KEPT_BYTES_MAX:
                left_out.append(path.name)
            else:
                archive.add(path, arcname=str("gpu-check" / path.relative_to(files)), recursive=False)
    return left_out


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", default="gpu-check-results",
                        help="report.json and recordings.tar.gz go there (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=540,
                        help="no check begins after so long, and none goes on for long (default: %(default)s)")
    parser.add_argument("--only", choices=("monitor", "capture"), help="one part: the plugin, or capture and restore")
    parser.add_argument("--mps", action="store_true",
                        help="measure the cost with NVIDIA's Multi-Process Service, so that the ranks' kernels run "
                             "side by side (default: time slices); it is started for this and ended")
    parser.add_argument("--rehearse", action="store_true",
                        help="on the CPU, with gloo and the hook API in place of NCCL and the plugin, and a driver "
                             "without a GPU: shows that this program works, and nothing else")
    return parser.parse_args(arguments)


def check_all(report, directory, arguments):
    files = directory / "files"  # what is kept
    files.mkdir()
    without_torch = (lambda: None) if arguments.rehearse else torch_missing
    try:
        if arguments.only != "monitor":
            gpu_check_capture.Capture(report, HERE, directory, files, arguments.rehearse, without_torch).run()
        if arguments.only != "capture":
            if without_torch() is None:
                monitor_part(report, directory, files, arguments)
            else:
                report.say("skipped", "NCCL with the plugin", without_torch())
    finally:
        for log in directory.glob("*.log"):
            shutil.copyfile(log, files / log.name)
        if left_out := pack(files, report.out / "recordings.tar.gz"):
            report.say("note", "not kept", f"larger than {KEPT_BYTES_MAX} bytes: {', '.join(left_out)}")


def monitor_part(report, directory, files, arguments):
    monitors = []

    def start():
        monitors.append(Monitor(report, directory, files, arguments))
        return "it answers"
    if not report.step("the agent", start):
        return
    try:
        # Its checks are steps of their own; this one is what lies between them.
        report.step("the plugin, all of it", lambda: monitors[0].run() or "ran to its end")
    finally:
        monitors[0].agent.close()


def stop_in_time(seconds):
    def stop(signal_number, _):
        raise OutOfTime(signal.Signals(signal_number).name)
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.alarm(int(seconds + LATE_SECONDS))


def main():
    arguments = parse(None)
    missing = None if arguments.rehearse else gpu_missing()
    if missing is not None:
        print(f"gpu-check: {missing}: nothing was checked", file=sys.stderr)
        return NO_GPU
    report = Report(pathlib.Path(arguments.out), arguments.seconds)
    report.about.update(machine())
    stop_in_time(arguments.seconds)
    # Short: the path of a socket has 107 bytes.
    directory = pathlib.Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        check_all(report, directory, arguments)
    except OutOfTime as stopped:
        report.say("FAILED", "in time", f"ended by {stopped} after {time.monotonic() - report.begin:.0f} s")
    finally:
        signal.alarm(0)
        shutil.rmtree(directory, ignore_errors=True)
        report.save()
    failed = report.failed()
    count = {outcome: sum(line["outcome"] == outcome for line in report.lines) for outcome in ("ok", "skipped")}
    verdict = f"failed: {', '.join(failed)}" if failed else "what was checked holds" if count["ok"] else "nothing was checked"
    print(f"{time.monotonic() - report.begin:.0f} s; {count['ok']} ok; {verdict}; skipped: {count['skipped']}")
    return 1 if failed or not count["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
