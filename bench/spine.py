"""Figures of the spine: save, capture, flush, restore, registration. Every run goes through the real
hook library and a real private agent; what the agent itself reports of a save is what is shown."""

import ctypes
import json
import mmap
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import hook_api
import pairs

MIB = 1 << 20
BYTES = 1 << 30
FIO_SETTINGS = [("1M", 16), ("4M", 4), ("4M", 8), ("8M", 4)]


class Place:
    """A directory of its own for one benchmark: root, runtime directory, agent."""

    def __init__(self, build, directory):
        self.build = build
        self.directory = directory
        self.root = directory / "root"
        self.runtime = directory / "run"
        self.root.mkdir(exist_ok=True)
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        self.library = hook_api.environment(str(build), str(self.runtime))
        os.environ["HOLDFAST_HOST_MEMORY"] = "5GiB"

    def job(self, name, arrays, **options):
        return hook_api.Job(self.library, name, str(self.root), arrays, **options)

    def agent_pids(self):
        """Keeper and workers of this place."""
        pids = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            environment = b""
            if b"holdfastd" in command:
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    pass
            if str(self.runtime).encode() in command + environment:
                pids.append(int(entry.name))
        return pids

    def kill_agent(self):
        """All at once and for good: nothing stays in memory."""
        for _ in range(200):
            pids = self.agent_pids()
            if not pids:
                return
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.01)
        raise RuntimeError("the agent does not die")

    def remove_checkpoints(self, name, keep=0):
        """As docs/OPERATING.md says: the manifest first."""
        found = sorted((self.root / name).glob("s*.a*"))
        for directory in found[:len(found) - keep]:
            (directory / "MANIFEST.json").unlink(missing_ok=True)
            shutil.rmtree(directory)


def new_array(size):
    """Host memory with contents that neither the kernel nor a disk can shrink."""
    memory = mmap.mmap(-1, size)
    pattern = os.urandom(MIB)
    for offset in range(0, size, MIB):
        memory[offset:offset + MIB] = pattern[:min(MIB, size - offset)]
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, address


def fio(arguments):
    result = subprocess.run(["fio", "--output-format=json", "--name=bench", "--thread",
                             "--ioengine=io_uring", "--direct=1", *arguments],
                            check=True, capture_output=True, text=True)
    return json.loads(result.stdout)["jobs"][0]


def fio_write(directory, block, depth, size):
    """Seconds of writing one new, fallocated file and syncing it."""
    path = directory / "fio.bin"
    path.unlink(missing_ok=True)
    job = fio([f"--filename={path}", "--rw=write", f"--bs={block}", f"--iodepth={depth}",
               f"--size={size}", "--fallocate=native", "--end_fsync=1", "--overwrite=0"])
    path.unlink()
    return job["job_runtime"] / 1000


def fio_read(path, block, depth):
    job = fio([f"--filename={path}", "--rw=read", f"--bs={block}", f"--iodepth={depth}",
               "--readonly"])
    return job["job_runtime"] / 1000


def best_of(settings, once):
    """The setting with the least median time of three runs."""
    medians = {setting: statistics.median(once(*setting) for _ in range(3)) for setting in settings}
    best = min(medians, key=medians.get)
    pairs.progress("fio settings (block, depth): " + ", ".join(
        f"{block} x {depth}: {seconds:.3f} s" for (block, depth), seconds in medians.items()))
    return best


def flush(place):
    memory, address = new_array(BYTES)
    job = place.job("flush", [("data", address, BYTES)])
    step = 0

    def ours():
        nonlocal step
        step += 1
        place.remove_checkpoints("flush")
        job.save(step)
        job.wait_captured()
        job.wait_committed(step)
        report = job.report(step)
        return report.image_bytes / report.flush_ns  # GB/s

    ours()  # memory and files warm
    size = job.report().image_bytes
    setting = best_of(FIO_SETTINGS, lambda block, depth: fio_write(place.root, block, depth, size))
    row = pairs.compare("flush, checksums and fsync included", "GB/s", ours,
                        lambda: size / fio_write(place.root, *setting, size) / 1e9, 0.95,
                        note=f"fio {setting[0]} x {setting[1]}, {size / MIB:.0f} MiB")
    job.close()
    place.kill_agent()
    del memory
    return [row]


def save(place):
    """Nine series: a percentile of one has no quartiles."""
    count, size, series, saves = 10_000, 1024, 9, 100
    memory, address = new_array(count * size)
    job = place.job("save", [(f"layer.{i}.weight", address + i * size, size) for i in range(count)])
    calls, blocked = [], []
    for step in range(1, series * saves + 1):
        job.save(step)
        job.wait_captured()
        job.wait_committed(step)
        report = job.report(step)
        calls.append(report.call_ns / 1e6)
        blocked.append(report.blocked_ns / 1e6)
        if step % 20 == 0:
            place.remove_checkpoints("save", keep=1)
    job.close()
    place.kill_agent()
    del memory

    def row(name, figures, percent, goal_ms, note):
        def percentile(values):
            return sorted(values)[len(values) * percent // 100]
        value = percentile(figures)
        of_series = [percentile(figures[at:at + saves]) for at in range(0, len(figures), saves)]
        return pairs.Row(f"{name}, p{percent}", value, "ms", quartiles=pairs.quartiles(of_series),
                         goal=f"<= {goal_ms} ms" if goal_ms else "",
                         holds=value <= goal_ms if goal_ms else None,
                         note=f"{series} series of {saves} saves{note}")

    return [
        row("hf_save of 10,000 tensors", calls, 50, 1, ""),
        row("hf_save of 10,000 tensors", calls, 99, 1, ""),
        row("blocked in hf_wait_captured right behind it", blocked, 50, None,
            "; the whole capture: nothing computes in between"),
    ]


def capture(place):
    memory, address = new_array(BYTES)
    job = place.job("capture", [("data", address, BYTES)], copy_threads=1)
    descriptor = os.memfd_create("bench")
    os.ftruncate(descriptor, BYTES)
    target = mmap.mmap(descriptor, BYTES)
    target_address = ctypes.addressof(ctypes.c_char.from_buffer(target))
    step = 0

    def ours():
        nonlocal step
        step += 1
        place.remove_checkpoints("capture")
        job.save(step)
        job.wait_captured()
        rate = BYTES / job.report(step).capture_ns
        job.wait_committed(step)  # the flush must not run beside the other side's measurement
        return rate

    def memcpy():
        begun = time.perf_counter_ns()
        ctypes.memmove(target_address, address, BYTES)
        return BYTES / (time.perf_counter_ns() - begun)

    ours()
    memcpy()  # its pages are there now
    row = pairs.compare("capture of host tensors", "GB/s", ours, memcpy, 0.9,
                        note="memcpy of 1 GiB by one thread; ours runs beside checksums and flush")
    job.close()
    place.kill_agent()
    return [row]


RESTORE_ONCE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import hook_api, spine
memory, address = spine.new_array(int(sys.argv[5]))
job = hook_api.Job(sys.argv[2], sys.argv[3], sys.argv[4], [("data", address, int(sys.argv[5]))])
result = job.restore()
print(json.dumps({"ns": result.nanoseconds, "bytes": result.bytes,
                  "memory": result.bytes_from_memory}))
job.close()
"""


def restore_once(place, name, size):
    """Restores in a new process, as a restarted trainer does; its tensors' pages are warm."""
    result = subprocess.run(
        [sys.executable, "-c", RESTORE_ONCE, str(pathlib.Path(__file__).parent), place.library, name,
         str(place.root), str(size)], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def saved_once(place, name, size):
    memory, address = new_array(size)
    job = place.job(name, [("data", address, size)])
    job.save(1)
    job.wait_captured()
    job.wait_committed(1)
    job.close()
    del memory
    return next((place.root / name).glob("s*.a*/rank-00000*.h5"))


def restore_storage(place):
    size = BYTES
    path = saved_once(place, "restore", size)
    place.kill_agent()

    def ours():
        result = restore_once(place, "restore", size)
        if result["memory"] != 0:
            raise RuntimeError(f"expected a restore from storage, found {result}")
        place.kill_agent()
        return result["bytes"] / result["ns"]

    setting = best_of(FIO_SETTINGS, lambda block, depth: fio_read(path, block, depth))
    return [pairs.compare("restore from storage", "GB/s", ours,
                          lambda: path.stat().st_size / fio_read(path, *setting) / 1e9, 0.9,
                          note=f"fio read {setting[0]} x {setting[1]}")]


def restore_memory(place):
    size = BYTES
    os.environ["HOLDFAST_LINGER"] = "300s"
    # Another process saves: the images of a living one would have to be copied first.
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import pathlib, spine; "
            "place = spine.Place(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])); "
            "import os; os.environ['HOLDFAST_LINGER'] = '300s'; "
            "spine.saved_once(place, 'memory', int(sys.argv[4]))")
    subprocess.run([sys.executable, "-c", code, str(pathlib.Path(__file__).parent), str(place.build),
                    str(place.directory), str(size)], check=True)
    source, source_address = new_array(size)
    target, target_address = new_array(size)

    def ours():
        result = restore_once(place, "memory", size)
        if result["memory"] != result["bytes"]:
            raise RuntimeError(f"expected a restore from memory, found {result}")
        return result["bytes"] / result["ns"]

    def memcpy():
        begun = time.perf_counter_ns()
        ctypes.memmove(target_address, source_address, size)
        return size / (time.perf_counter_ns() - begun)

    memcpy()
    row = pairs.compare("restore from memory, checksums included", "GB/s", ours, memcpy, 0.7,
                        note="memcpy of 1 GiB by one thread")
    place.kill_agent()
    del source, target
    return [row]


def registration(place):
    count = 100_000
    memory, address = new_array(count * 64)
    arrays = [(f"model.layers.{i // 10}.block.{i % 10}.weight", address + i * 64, 64)
              for i in range(count)]

    def once():
        begun = time.perf_counter()
        job = place.job("registration", arrays)
        seconds = time.perf_counter() - begun
        job.close()
        place.kill_agent()
        return seconds

    row = pairs.measure("registration of 100,000 tensors", "s", once, 10, repeats=3,
                        note="start of the agent included")
    del memory
    return [row]


def stamp_head(place):
    def once():
        result = subprocess.run([place.build / "bench" / "bench_stamp_head", str(place.directory)],
                                check=True, capture_output=True, text=True)
        return json.loads(result.stdout)["milliseconds"]

    return [pairs.measure("head of an image of 10,000 tensors stamped", "ms", once, 20)]


def planner(place):
    peaks = []

    def once():
        result = subprocess.run([place.build / "bench" / "bench_planner"], check=True,
                                capture_output=True, text=True)
        found = json.loads(result.stdout)
        peaks.append(found["peak_mib"])
        return found["seconds"] + found["cover_seconds"]

    row = pairs.measure("plan of 1,000 tensors in 1,000 flat shards against dimension 1 cut by 8", "s",
                        once, 5, repeats=3,
                        note="a million pieces, a million runs, proof of the cover included")
    row.note += f"; peak memory {max(peaks):.0f} MiB"
    return [row]
