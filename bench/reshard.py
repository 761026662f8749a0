"""Resharding 3 GB, dp=4 ZeRO-1 to tp=2 dp=2, beside what reading and writing the same bytes takes: one
file after the other through one buffer of 8 MiB, in the fastest way that this machine has. Both begin
with a source that is not in the page cache, and end with their bytes synced. The command is measured as
a process of its own, from its start to its exit."""

import json
import shutil
import subprocess
import time

import bare_copy
import pairs

MEMORY_BYTES = 256 << 20
HIDDEN, LAYERS, VOCABULARY = 1024, 16, 16384
MOMENTS = ("master", "exp_avg", "exp_avg_sq")


def document():
    """A transformer: bfloat16 parameters, cut by columns or rows over tp; float32 master copies and
    moments of what a rank has, one behind the other, cut over dp."""
    def tensor(name, shape, dim=None):
        cut = [] if dim is None else [{"op": "shard", "dim": dim, "axis": "tp", "rule": "even"}]
        states = [{"state": "param", "dtype": "bfloat16", "place": cut + [{"op": "zero", "rule": "ceil"}]}]
        states += [{"state": state, "dtype": "float32", "place": cut + [{"op": "zero", "pack": state}]}
                   for state in MOMENTS]
        return {"name": name, "shape": shape, "states": states}

    tensors = [tensor("embedding", [VOCABULARY, HIDDEN], 0)]
    for layer in range(LAYERS):
        tensors += [tensor(f"h.{layer}.norm", [HIDDEN]),
                    tensor(f"h.{layer}.qkv", [3 * HIDDEN, HIDDEN], 0),
                    tensor(f"h.{layer}.proj", [HIDDEN, HIDDEN], 1),
                    tensor(f"h.{layer}.up", [4 * HIDDEN, HIDDEN], 0),
                    tensor(f"h.{layer}.down", [HIDDEN, 4 * HIDDEN], 1)]
    return {"holdfast_layout": 1,
            "mesh": [{"axis": "dp", "size": 4}, {"axis": "tp", "size": 1}],
            "zero": {"stage": 1, "axis": "dp"},
            "packs": [{"pack": state, "axis": "dp", "buffer": state} for state in MOMENTS],
            "tensors": tensors}


def make_source(place):
    path = place.directory / "layout.json"
    path.write_text(json.dumps(document()))
    subprocess.run([place.build / "tests" / "support" / "make_checkpoint", "--large", "0", path,
                    place.root / "reshard", "1"], check=True)
    return next((place.root / "reshard").glob("s*.a*"))


def reshard(place, source, out):
    """Seconds, and what it reports."""
    shutil.rmtree(out, ignore_errors=True)
    bare_copy.drop_from_cache(source.iterdir())
    out.mkdir()
    begun = time.perf_counter()
    result = subprocess.run([place.build / "cli" / "holdfast", "reshard", source, out, "--to",
                             "tp=2,dp=2,zero=1", "--memory", str(MEMORY_BYTES), "--json"],
                            check=True, capture_output=True, text=True)
    return time.perf_counter() - begun, json.loads(result.stdout)


def rows(place):
    source = make_source(place)
    size = sum(path.stat().st_size for path in source.glob("*.h5"))
    out, target = place.directory / "out", place.directory / "copy"
    peaks = []

    def ours():
        seconds, report = reshard(place, source, out)
        peaks.append(report["result"]["peak_memory_bytes"])
        return size / seconds / 1e9

    def copy(direct):
        files = sorted(source.glob("*.h5"))
        bare_copy.drop_from_cache(files)
        return bare_copy.seconds(files, target, direct)

    direct = bare_copy.fastest_is_direct(copy)
    ours()
    states = json.loads(subprocess.run(
        [place.build / "cli" / "holdfast", "verify", out / "reshard", "--json"], check=True,
        capture_output=True, text=True).stdout)["fingerprints"]["checked"]
    speed = pairs.compare(
        "reshard, dp=4 ZeRO-1 to tp=2 dp=2", "GB/s", ours,
        lambda: size / copy(direct) / 1e9, round(1 / 1.3, 3),
        note=f"read and written with one 8 MiB buffer, {'O_DIRECT' if direct else 'buffered'}; "
             f"{size / 1e9:.2f} GB, {states} tensor states")
    speed.goal = "<= 1.3 times as long"
    peak = max(peaks) / (1 << 20)
    memory = pairs.Row("reshard, peak memory", peak, "MiB", goal="<= 256 MiB",
                       holds=peak <= MEMORY_BYTES >> 20, note=f"VmHWM of the one process, {len(peaks)} runs")
    shutil.rmtree(out)
    return [speed, memory]
