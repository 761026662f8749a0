"""`holdfast view` of a checkpoint of 600 tensors, and a read through it. No agent: the checkpoint is made by
tests/support/make_checkpoint; the command is the user's, start and fsync included."""

import json
import resource
import statistics
import subprocess
import time

import pairs

RANKS = 4
SHAPES = [([64, 48], 0), ([48, 64], 1), ([64], None), ([96, 32], 0)]  # and the dimension that tp cuts


def layout():
    """200 tensors of three states, tp=2 and dp=2 with ZeRO-1."""
    tensors = []
    for i in range(200):
        shape, dim = SHAPES[i % len(SHAPES)]
        place = [] if dim is None else [{"op": "shard", "dim": dim, "axis": "tp", "rule": "even"}]
        states = [{"state": "param", "dtype": "bfloat16", "place": place}]
        states += [{"state": state, "dtype": "float32", "place": place + [{"op": "zero", "pack": state}]}
                   for state in ("exp_avg", "exp_avg_sq")]
        tensors.append({"name": f"model.layers.{i // 8}.block.{i % 8}.weight", "shape": shape,
                        "states": states})
    return {"holdfast_layout": 1, "mesh": [{"axis": "tp", "size": 2}, {"axis": "dp", "size": RANKS // 2}],
            "zero": {"stage": 1, "axis": "dp"}, "tensors": tensors,
            "packs": [{"pack": state, "axis": "dp", "buffer": state} for state in ("exp_avg", "exp_avg_sq")]}


# By the python of Debian, whose h5py the tests use too.
READ_ALL = """
import h5py, sys, time
begun = time.perf_counter()
with h5py.File(sys.argv[1]) as view:
    count = sum(1 for state in view["tensors"].values() for tensor in state.values() if tensor[()] is not None)
print(time.perf_counter() - begun, count)
"""


def rows(place):
    document = place.directory / "layout.json"
    document.write_text(json.dumps(layout()), encoding="utf-8")
    job = place.directory / "job"
    subprocess.run([place.build / "tests" / "support" / "make_checkpoint", document, job, "1"], check=True)
    view = place.directory / "view.h5"

    cpu_seconds = []

    def make():
        view.unlink(missing_ok=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        result = subprocess.run([place.build / "cli" / "holdfast", "view", job, view, "--json"], check=True,
                                capture_output=True, text=True)
        seconds = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if json.loads(result.stdout)["tensors"] != 600:
            raise RuntimeError(f"expected a view of 600 tensors, found {result.stdout}")
        return seconds

    def read():
        result = subprocess.run(["/usr/bin/python3", "-c", READ_ALL, view], check=True, capture_output=True,
                                text=True)
        seconds, count = result.stdout.split()
        if count != "600":
            raise RuntimeError(f"expected 600 tensors in the view, found {count}")
        return float(seconds)

    made = pairs.measure("view of 600 tensors", "s", make, 0.2,
                         note=f"{RANKS} ranks, start of the command and fsync included")
    made.note += f"; CPU time {statistics.median(cpu_seconds):.3f} s"
    return [made, pairs.measure("all 600 read through the view by h5py", "s", read)]
