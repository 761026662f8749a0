"""DeepSpeed's ZeRO checkpoints made universal, against DeepSpeed's own converter (ds_to_universal, as it comes) and
against what reading and writing the bytes takes at least: 254 million parameters trained for a step by DeepSpeed on 4
ranks. Neither side syncs its files (ours runs under eatmydata); what it takes with them durable is printed beside.

Needs build/venv, which scripts/interop makes.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time

import bare_copy
import pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHON = ROOT / "build" / "venv" / "bin" / "python"
MEMORY_BYTES = 256 << 20


def make_checkpoint(place, stage):
    folder = place.directory / f"zero{stage}"
    subprocess.run([PYTHON, ROOT / "bench" / "deepspeed_checkpoint.py", folder, str(stage)], check=True,
                   capture_output=True)
    return next(path for path in folder.iterdir() if path.is_dir())


def children_of(pid):
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, pathlib.Path(f"/proc/{parent}/task/{task}/children").read_text().split())
        except OSError:
            pass  # it has ended
    return found


def memory_of(pids):
    """Of each process, the most resident memory that it has had so far (a shared page counts in each of them)."""
    found = []
    for pid in pids:
        try:
            lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
            found += [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
        except OSError:
            pass  # it has ended
    return found


@dataclasses.dataclass
class Run:
    seconds: float
    together_bytes: int  # the peaks of all processes that were there at a time: at least what they had together
    largest_bytes: int   # of one process
    read_bytes: int      # by read(2) and its kin, of the process and those that it waited for
    written_bytes: int


def run(command, environment=None):
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=errors,
                                   env={**os.environ, **(environment or {})})
        peaks, ended = [0, 0], threading.Event()

        def watch():
            while not ended.wait(0.01):
                found = memory_of(children_of(process.pid))
                if found:
                    peaks[0], peaks[1] = max(peaks[0], sum(found)), max(peaks[1], max(found))

        watcher = threading.Thread(target=watch)
        watcher.start()
        # It has ended, and is still there to be asked.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - begun
        ended.set()
        watcher.join()
        counted = dict(line.split(": ") for line in pathlib.Path(f"/proc/{process.pid}/io").read_text().splitlines())
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError(f"{command[0]}: exit {process.returncode}: "
                               f"{errors.read().decode(errors='replace')[-2000:]}")
    return Run(seconds, *peaks, int(counted["rchar"]), int(counted["wchar"]))


def of_stage(place, stage):
    source = make_checkpoint(place, stage)
    size = sum(path.stat().st_size for path in source.rglob("*.pt"))
    out, copied = place.directory / "universal", place.directory / "copy"
    command = [place.build / "cli" / "holdfast", "convert", source, out, "--format", "ucp", "--memory", MEMORY_BYTES]
    runs = {"ours": [], "theirs": []}

    def cleared(who, run_it):
        shutil.rmtree(out, ignore_errors=True)
        runs[who].append(run_it())
        return runs[who][-1].seconds

    def ours():
        return cleared("ours", lambda: run(["eatmydata", *command]))

    def theirs():
        return cleared("theirs", lambda: run(
            [PYTHON, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--input_folder", source,
             "--output_folder", out],
            {"DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}))

    name = f"ZeRO-{stage} to universal"
    durable = cleared("ours", lambda: run(command))
    files = sorted(path for path in out.rglob("*.pt"))
    written = sum(path.stat().st_size for path in files)
    note = f"{len(files)} files, {written / 1e9:.2f} GB from {size / 1e9:.2f} GB; durable {durable:.2f} s"
    kept = place.directory / "kept"
    out.rename(kept)
    files = sorted(path for path in kept.rglob("*.pt"))

    def copy(direct):
        return bare_copy.seconds(files, copied, direct, durable=False)

    direct = bare_copy.fastest_is_direct(copy)
    bare = pairs.compare(f"{name}, against the bare copy", "s", ours, lambda: copy(direct), round(1 / 1.3, 3), pairs=5,
                         rate=False, note=f"{'O_DIRECT' if direct else 'buffered'}; {note}")
    bare.goal = "<= 1.3 times as long"
    shutil.rmtree(kept)
    framework = pairs.compare(f"{name}, against ds_to_universal", "s", ours, theirs, 10, pairs=3, rate=False)
    framework.note += f"; its largest process {max(each.largest_bytes for each in runs['theirs']) / 2**20:.0f} MiB"
    most = max(each.together_bytes for each in runs["ours"]) / (1 << 20)
    memory = pairs.Row(f"{name}, memory", most, "MiB", goal="<= 256 MiB", holds=most <= MEMORY_BYTES >> 20,
                       note="peaks of all processes together, watched every 10 ms")
    shutil.rmtree(out)
    shutil.rmtree(source.parent)
    return [framework, bare, memory,
            traffic(f"{name}, bytes read", max(each.read_bytes for each in runs["ours"]), size, "the source has"),
            traffic(f"{name}, bytes written", max(each.written_bytes for each in runs["ours"]), written, "the output has")]


def traffic(name, counted, least, words):
    """What passed through system calls, against what must."""
    if counted < 0.9 * least:
        raise RuntimeError(f"{name}: the kernel counted {counted} bytes of at least {least}: it does not see all of them")
    return pairs.Row(name, counted / 1e9, "GB", least / 1e9, least / counted, goal="<= 1.05 of the minimum",
                     holds=counted <= 1.05 * least, note=f"{words} {least / 1e9:.3f} GB")


def rows(place):
    if not PYTHON.exists():
        raise RuntimeError("build/venv is not there: scripts/interop makes it")
    if shutil.which("eatmydata") is None:
        raise RuntimeError("eatmydata is not installed")
    return [row for stage in (2, 3) for row in of_stage(place, stage)]
