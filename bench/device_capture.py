#!/usr/bin/python3
"""Capture from a GPU and restore to it, through PyTorch and a real agent: bytes per second against the
best plain pinned copy, what a training loop loses meanwhile, and whether what comes back is what was
saved. One command, a few minutes; needs torch and, for what it says about GPUs, one.

Usage: device_capture.py --library libholdfast.so --daemon holdfastd [--package DIR] [--device cuda|cpu]
                         [--bytes N] [--directory DIR] [--json FILE]
On the CPU it shows only that every step runs; nothing of it is a figure about a GPU.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time

import pairs

SAVE_SECONDS = 120.0
MIB = 1 << 20
REPEATS = 5
PAIRS = 12


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--package", default=str(
        pathlib.Path(__file__).resolve().parent.parent / "hook" / "python"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bytes", type=int, default=2 << 30, help="of a large image")
    parser.add_argument("--directory", default="/dev/shm",
                        help="for checkpoints and the agent: memory, so that no disk is measured")
    parser.add_argument("--json", default=None)
    return parser.parse_args()


OPTIONS = parse()
sys.path.insert(0, OPTIONS.package)
os.environ["HOLDFAST_LIBRARY"] = os.path.abspath(OPTIONS.library)
os.environ["HOLDFASTD"] = os.path.abspath(OPTIONS.daemon)

import torch  # noqa: E402  (the paths come first)

import holdfast  # noqa: E402
import holdfast.torch  # noqa: E402

CUDA = OPTIONS.device == "cuda"


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


class Place:
    """A root and a private agent of its own."""

    def __init__(self, directory):
        self.path = pathlib.Path(directory)
        (self.path / "root").mkdir()
        os.environ.update(HOLDFAST_RUNTIME_DIR=str(self.path / "run"), HOLDFAST_LINGER="1s",
                          HOLDFAST_HOST_MEMORY=str(int(2.5 * OPTIONS.bytes) + (4 << 30)))
        os.environ.pop("HOLDFAST_DEVICE_COPY_MIB_PER_SECOND", None)

    def clear(self):
        """Checkpoints are not kept: memory is not for that."""
        for job in (self.path / "root").iterdir():
            shutil.rmtree(job, ignore_errors=True)

    def show_logs(self):
        for log in sorted((self.path / "run").glob("*/agent.log")):
            for line in log.read_text(errors="replace").splitlines()[-15:]:
                pairs.progress(f"{log.parent.name}: {line}")

    def job(self, name, tensors, *, mib_per_second=0, check=holdfast.CheckSource.NONE):
        os.environ["HOLDFAST_DEVICE_COPY_MIB_PER_SECOND"] = str(mib_per_second)
        job = holdfast.Job(name, rank=0, world_size=1, root=str(self.path / "root"),
                           check_source=check)
        arrays = {f"param/{key}": holdfast.memory_of(value, key) for key, value in tensors.items()}
        job.register(holdfast.replicated(arrays, 1),
                     [(key, memory) for key, memory in arrays.items()])
        return job


def save(job, step):
    """One whole save; its report. The image is flushed before it returns, so that saves are alike."""
    job.save(step, wait=SAVE_SECONDS)
    job.wait_captured()
    job.wait_committed(step, timeout=SAVE_SECONDS)
    return job.report(step)


def best_copy(target, source, pieces=1):
    """Bytes per second of the plain copy that the hardware likes best: pinned, asynchronous."""
    count = source.numel() // pieces
    synchronize()
    begun = time.perf_counter()
    for piece in range(pieces):
        part = slice(piece * count, (piece + 1) * count)
        target[part].copy_(source[part], non_blocking=True)
    synchronize()
    return source.numel() / (time.perf_counter() - begun)


def throughput(place):
    """Whole images of a few large tensors, captured and restored, against plain pinned copies."""
    count = 8
    size = OPTIONS.bytes // count
    tensors = {f"large{i}": torch.randint(0, 255, (size,), dtype=torch.uint8, device=OPTIONS.device)
               for i in range(count)}
    scratch = torch.empty(size, dtype=torch.uint8, device=OPTIONS.device)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=CUDA)
    rows = []
    with place.job("large", tensors) as job:
        steps = iter(range(1, 1000))
        first = save(job, next(steps))
        rows.append(pairs.Row("first save", rate_of(first) / 1e9, "GB/s",
                              note=f"unpinned {first.unpinned_bytes} bytes"))
        best_copy(pinned, scratch)
        rows.append(pairs.compare(
            "capture, large tensors", "GB/s", lambda: rate_of(save(job, next(steps))) / 1e9,
            lambda: best_copy(pinned, scratch) / 1e9, 0.95 if CUDA else None, pairs=REPEATS,
            note="device_bytes / device_ns, against one pinned copy"))
        last = job.report()
        rows.append(pairs.Row("hf_save itself", last.call_ns / 1e3, "us"))
        rows.append(pairs.Row("from hf_save to the first copy", last.gate_ns / 1e3, "us"))
        kept = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    with place.job("large", tensors) as job:
        rates = []
        for _ in range(3):
            restored = job.restore()
            rates.append(restored.bytes / restored.nanoseconds)
    best_copy(scratch, pinned)
    plain = statistics.median(best_copy(scratch, pinned) / 1e9 for _ in range(REPEATS))
    rows.append(pairs.Row("restore", statistics.median(rates), "GB/s", plain,
                          statistics.median(rates) / plain,
                          note=f"{restored.bytes_from_memory} of {restored.bytes} bytes from "
                          "memory; verified on the way; against one pinned copy"))
    equal = all(torch.equal(tensor.cpu(), kept[name]) for name, tensor in tensors.items())
    rows.append(pairs.Row("what was restored is what was saved", float(equal), "", holds=equal,
                          goal="bit for bit"))
    return rows


def rate_of(report):
    """Bytes per second over the bus; on the CPU, of the whole capture."""
    if CUDA:
        return report.device_bytes / report.device_ns * 1e9
    return report.image_bytes / report.capture_ns * 1e9


def small_tensors(place):
    """10,000 tensors: many asynchronous copies, against packing them on the device first."""
    count, size = 10_000, (64 << 10 if CUDA else 1 << 10)
    tensors = {f"small{i}": torch.ones(size, dtype=torch.uint8, device=OPTIONS.device)
               for i in range(count)}
    parts = list(tensors.values())
    pinned = torch.empty(count * size, dtype=torch.uint8, pin_memory=CUDA)
    packed = torch.empty(count * size, dtype=torch.uint8, device=OPTIONS.device)

    def pack():
        synchronize()
        begun = time.perf_counter()
        torch.cat(parts, out=packed)
        pinned.copy_(packed, non_blocking=True)
        synchronize()
        return count * size / (time.perf_counter() - begun)

    with place.job("small", tensors) as job:
        steps = iter(range(1, 1000))
        save(job, next(steps))
        pack()
        row = pairs.compare("capture, 10,000 tensors of 64 KiB", "GB/s",
                            lambda: rate_of(save(job, next(steps))) / 1e9, lambda: pack() / 1e9,
                            None, pairs=REPEATS, note="against torch.cat and one pinned copy")
        calls = [job.report(step).call_ns for step in range(2, 2 + REPEATS)]
    call_ms = statistics.median(calls) / 1e6
    return [row, pairs.Row("hf_save of 10,000 tensors", call_ms, "ms", goal="<= 1 ms",
                           holds=call_ms <= 1)]


class Matmuls:
    """A loop that keeps the device busy: matrix multiplications of a millisecond or two each."""

    name = "matmul"

    def __init__(self):
        size = 8192 if CUDA else 512
        dtype = torch.bfloat16 if CUDA else torch.float32
        self.a = torch.randn(size, size, device=OPTIONS.device, dtype=dtype)
        self.b = torch.randn(size, size, device=OPTIONS.device, dtype=dtype)
        self.c = torch.empty_like(self.a)

    def step(self):
        torch.matmul(self.a, self.b, out=self.c)


class Launches:
    """A loop that keeps the host busy: kernels that take less than their launch."""

    name = "launches"

    def __init__(self):
        self.a = torch.zeros(64, device=OPTIONS.device)

    def step(self):
        for _ in range(200):
            self.a.add_(1)


def timed(loop, count):
    """Enqueues `count` steps; a function that waits for them and returns milliseconds per step, by the
    device's clock."""
    if not CUDA:
        begun = time.perf_counter()
        for _ in range(count):
            loop.step()
        taken = (time.perf_counter() - begun) / count * 1e3
        return lambda: taken
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        loop.step()
    end.record()

    def read():
        end.synchronize()
        return begin.elapsed_time(end) / count
    return read


def large_tensors(image_bytes):
    return {f"t{i}": torch.zeros(image_bytes // 8, dtype=torch.uint8, device=OPTIONS.device)
            for i in range(8)}


def pace_name(mib_per_second):
    return f"paced at {mib_per_second} MiB/s" if mib_per_second else "unpaced"


def expected_capture_ms(report, mib_per_second=0):
    """From an earlier save's report, of memory that is registered with the driver by now."""
    paced_ms = report.image_bytes / MIB / mib_per_second * 1e3 if mib_per_second else 0
    return max(report.device_ns / 1e6 if CUDA else report.capture_ns / 1e6, paced_ms)


def slowdown(place, loop, mib_per_second, goal=None):
    """Steps beside a capture against as many of the same without, in turn. The loop never stops in
    between, so that clocks and power are the same for both, and both begin behind the same step."""
    loop.step()
    name = pace_name(mib_per_second)
    beside, alone, rates = [], [], []
    with place.job(f"{loop.name}-{mib_per_second}", large_tensors(OPTIONS.bytes // 2),
                   mib_per_second=mib_per_second) as job:
        for number in (1, 2, 3):  # both images' memory is registered then
            usual = save(job, number)
        for _ in range(3):
            step_ms = timed(loop, 100 if CUDA else 3)()
        # They end before the capture does.
        count = max(3, min(400, int(0.8 * expected_capture_ms(usual, mib_per_second) / step_ms)))
        filler = max(1, int(20 / step_ms))

        def with_capture(number):
            job.save(number, wait=SAVE_SECONDS)
            taken = timed(loop, count)()
            job.wait_captured()
            rates.append(rate_of(job.report(number)))
            # The device stays as warm as it was.
            while job.report(number).commit_ns == 0:
                timed(loop, filler)()
            return taken

        for number in range(4, 4 + PAIRS):
            timed(loop, filler)()
            if number % 2:
                alone.append(timed(loop, count)())
                beside.append(with_capture(number))
            else:
                beside.append(with_capture(number))
                alone.append(timed(loop, count)())
            job.wait_committed(number, timeout=SAVE_SECONDS)
    ratio, low, high = pairs.paired_ratio(beside, alone)
    row = pairs.Row(f"{loop.name} during capture, {name}", statistics.median(beside), "ms/step",
                    statistics.median(alone), 1 / ratio, (1 / high, 1 / low),
                    note=f"{100 * (ratio - 1):+.2f}% ({100 * (low - 1):+.2f} to "
                    f"{100 * (high - 1):+.2f}), "
                    f"{PAIRS} pairs of {count} steps; {statistics.median(rates) / 1e9:.1f} GB/s")
    if goal is not None and CUDA:
        row.goal, row.holds = f"<= {100 * goal:g}% slower", ratio - 1 <= goal
    return row


def beside_compute(place):
    """What a loop loses while an image is captured."""
    matmuls, launches = Matmuls(), Launches()
    rows = []
    for pace in (0, 8000, 4000, 2000):
        rows.append(slowdown(place, matmuls, pace, 0.01 if pace else None))
        place.clear()
    for pace in (0, 8000):
        rows.append(slowdown(place, launches, pace))
        place.clear()
    return rows


def waiting(place):
    """What hf_wait_captured costs. The host that enqueues everything and then waits is held up until the
    capture ends; what the loop loses is only the time for which the device has nothing to do."""
    loop = Matmuls()
    rows = []
    with place.job("waiting", large_tensors(OPTIONS.bytes)) as job:
        for number in (1, 2, 3):
            usual = save(job, number)
        timed(loop, 20)()
        step_ms = timed(loop, 50)()
        count = max(3, int(1.5 * expected_capture_ms(usual) / step_ms))
        found = {"ahead": [], "along": []}
        for index in range(2 * REPEATS):
            way = ("ahead", "along")[index % 2]
            number = 4 + index
            timed(loop, 10)()
            job.save(number, wait=SAVE_SECONDS)
            read = timed(loop, count)
            if way == "along":
                read()  # as a loop does that looks at its loss
            last = torch.cuda.Event(enable_timing=True) if CUDA else None
            update = torch.cuda.Event(enable_timing=True) if CUDA else None
            if CUDA:
                last.record()
            job.wait_captured()
            if CUDA:
                update.record()
            timed(loop, 1)()
            report = job.report(number)
            idle_ms = last.elapsed_time(update) if CUDA else 0.0
            found[way].append((report.blocked_ns / 1e6, idle_ms, report.capture_ns / 1e6))
            job.wait_committed(number, timeout=SAVE_SECONDS)
    what = {"ahead": f"behind {count} steps that were enqueued only",
            "along": f"behind {count} steps that were waited for"}
    for way, times in found.items():
        blocked, idle, capture = (statistics.median(column) for column in zip(*times))
        rows.append(pairs.Row(f"hf_wait_captured {what[way]}: the host is blocked", blocked, "ms",
                              note=f"of {capture:.1f} ms of capture; {count * step_ms:.1f} ms of steps"))
        if way == "ahead":
            rows.append(pairs.Row(f"hf_wait_captured {what[way]}: the device is idle", idle, "ms"))
    return rows


def train(place):
    """A training step of a model with Adam, with saves and without, and going on from the last."""
    width, layers = (4096, 12) if CUDA else (64, 2)

    def make():
        torch.manual_seed(1)
        model = torch.nn.Sequential(*[
            layer for _ in range(layers)
            for layer in (torch.nn.Linear(width, width), torch.nn.GELU())]).to(OPTIONS.device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4)

    model, optimizer = make()
    data = torch.randn(8192 if CUDA else 8, width, device=OPTIONS.device)

    def step(model, optimizer):
        with torch.autocast(OPTIONS.device, dtype=torch.bfloat16):
            loss = model(data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def run(checkpointer, first, count):
        synchronize()
        begun = time.perf_counter()
        for number in range(first, first + count):
            step(model, optimizer)
            if checkpointer is not None:
                checkpointer.after_step(number)
        synchronize()
        return (time.perf_counter() - begun) / count * 1e3

    state_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    os.environ["HOLDFAST_DEVICE_COPY_MIB_PER_SECOND"] = "0"
    every, block = 8, 16
    options = {"job": "train", "root": str(place.path / "root"), "every": every,
               "save_wait": SAVE_SECONDS, "on_error": "raise"}
    rows = []
    with holdfast.torch.Checkpointer(model, optimizer, **options) as checkpointer:
        checkpointer.restore()
        run(checkpointer, 1, every)  # the first save registers
        number = every + 1
        without, with_saves, reports = [], [], []
        for _ in range(3):
            without.append(run(None, number, block))
            with_saves.append(run(checkpointer, number, block))
            number += block
            checkpointer.before_update()
            reports.append(checkpointer.job.report())
            checkpointer.commit(checkpointer.job.report().step)
        checkpointer.commit(number)
        report = reports[-1]
        rows.append(pairs.Row(
            f"training step, a save of {state_bytes / 1e9:.1f} GB every {every} steps",
            statistics.median(with_saves), "ms", statistics.median(without),
            statistics.median(without) / statistics.median(with_saves),
            note=f"per save: captured in {report.capture_ns / 1e6:.0f} ms, host blocked "
                 f"{report.blocked_ns / 1e6:.0f} ms, {rate_of(report) / 1e9:.1f} GB/s, unpinned "
                 f"{report.unpinned_bytes} bytes"))
    saved = [tensor.detach().cpu().clone() for tensor in model.parameters()]
    moments = [optimizer.state[p]["exp_avg"].cpu().clone() for p in model.parameters()]
    other, other_optimizer = make()
    with holdfast.torch.Checkpointer(other, other_optimizer, **options) as checkpointer:
        resumed = checkpointer.restore()
        equal = resumed is not None and all(
            torch.equal(a.detach().cpu(), b) for a, b in zip(other.parameters(), saved)) and all(
            torch.equal(other_optimizer.state[p]["exp_avg"].cpu(), b)
            for p, b in zip(other.parameters(), moments))
        step(other, other_optimizer)  # it goes on
        rows.append(pairs.Row("the model goes on from its last save", float(equal), "", holds=equal,
                              goal="bit for bit"))
    return rows


PARTS = (throughput, small_tensors, waiting, train, beside_compute)


def keep(about, rows, failures, done):
    if OPTIONS.json is None:
        return
    result = {"about": about, "failures": failures, "done": done,
              "rows": [{key: pairs.finite(value) for key, value in vars(row).items()} for row in rows]}
    pathlib.Path(OPTIONS.json).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def main():
    if CUDA and not torch.cuda.is_available():
        print("device_capture: torch sees no CUDA device", file=sys.stderr)
        return 77
    about = {"torch": torch.__version__, "python": platform.python_version(),
             "processors": os.cpu_count(), "device": OPTIONS.device, "bytes": OPTIONS.bytes}
    if CUDA:
        about["device"] = torch.cuda.get_device_name(0)
        about["cuda"] = torch.version.cuda
    rows = []
    failures = []
    with tempfile.TemporaryDirectory(dir=OPTIONS.directory, ignore_cleanup_errors=True) as directory:
        place = Place(directory)
        for part in PARTS:
            begun = time.monotonic()
            try:
                rows += part(place)
            except (holdfast.Error, RuntimeError) as error:
                # The other parts have something to say all the same.
                failures.append(f"{type(error).__name__}: {error}")
                pairs.progress(f"FAILED: {failures[-1]}")
                place.show_logs()
            place.clear()
            if CUDA:
                torch.cuda.empty_cache()
            pairs.progress(f"{time.monotonic() - begun:.1f} s")
            # All so far, each time: whoever stops it has something.
            keep(about, rows, failures, done=part is PARTS[-1])
    print(json.dumps(about))
    pairs.show(rows)
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures or any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
