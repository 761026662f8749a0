"""Comparing two checkpoints of 3 GB: from fingerprints, and by bytes beside what reading the same files
takes. Each comparison is a process of its own, from its start to its exit."""

import json
import subprocess
import time

import pairs
import spine

TENSORS = 200  # of 1024 x 1280 float32, each with two moments: 600 tensor states, 3.1 GB
STATES = ("param", "exp_avg", "exp_avg_sq")


def layout(mesh, zero_stage, shard):
    """`shard`: operations in front of ZeRO's for every other tensor (by rows) and the rest (by columns)."""
    zero = [{"op": "zero", "rule": "ceil"}]
    placements = {f"{kind}{which}": shard(which) + (zero if kind == "m" else [])
                  for kind in "pm" for which in (0, 1)}
    return {"holdfast_layout": 1,
            "mesh": [{"axis": axis, "size": size} for axis, size in mesh],
            "zero": {"stage": zero_stage, "axis": "dp"}, "placements": placements,
            "tensors": [{"name": f"h.{i // 2}.{'up' if i % 2 else 'down'}", "shape": [1024, 1280],
                         "states": [{"state": state, "dtype": "float32",
                                     "place": f"{'p' if state == 'param' else 'm'}{i % 2}"}
                                    for state in STATES]} for i in range(TENSORS)]}


def make(place, job, document, seed=0):
    """Every element differs between two seeds, and nothing else."""
    path = place.directory / f"{job}.json"
    path.write_text(json.dumps(document))
    subprocess.run([place.build / "tests" / "support" / "make_checkpoint", "--large", str(seed), path,
                    place.root / job, "1"], check=True)
    return next((place.root / job).glob("s*.a*"))


def diff(place, a, b, *flags, equal=True):
    """Seconds, and the report, which must say that all tensor states are equal, or that none is."""
    begun = time.perf_counter()
    result = subprocess.run([place.build / "cli" / "holdfast", "diff", a, b, "--json", *flags],
                            capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    report = json.loads(result.stdout)
    states = TENSORS * len(STATES)
    if (result.returncode, report["states_equal"]) != ((0, states) if equal else (1, 0)):
        raise RuntimeError(f"expected {'equal' if equal else 'entirely different'} checkpoints, "
                           f"found {result.stdout[:2000]} {result.stderr}")
    return seconds, report


def rows(place):
    zero1 = layout([("dp", 4)], 1, lambda _: [])
    tp2 = layout([("tp", 2), ("dp", 2)], 0, lambda dim: [{"op": "shard", "dim": dim, "axis": "tp", "rule": "even"}])
    a = make(place, "zero1", zero1)
    same = make(place, "same", zero1)
    other = make(place, "tp2", tp2)
    changed = make(place, "changed", zero1, seed=1)
    found = [pairs.measure("diff from fingerprints", "s", lambda: diff(place, a, other)[0], 0.1,
                           note="600 tensor states, 3.1 GB each; dp=4 ZeRO-1 against tp=2 dp=2")]
    images = [str(image) for checkpoint in (a, same) for image in sorted(checkpoint.glob("*.h5"))]
    setting = spine.best_of(spine.FIO_SETTINGS, lambda block, depth: spine.fio_read(":".join(images), block, depth))
    for name, b, equal in (("equal layouts", same, True), ("dp=4 ZeRO-1 against tp=2 dp=2", other, True),
                           ("every element differs", changed, False)):
        files = [image for checkpoint in (a, b) for image in sorted(checkpoint.glob("*.h5"))]
        size = sum(image.stat().st_size for image in files)
        joined = ":".join(map(str, files))
        _, report = diff(place, a, b, "--bytes", equal=equal)
        found.append(pairs.compare(
            f"diff by bytes, {name}", "GB/s",
            lambda b=b, size=size, equal=equal: size / diff(place, a, b, "--bytes", equal=equal)[0] / 1e9,
            lambda joined=joined, size=size: size / spine.fio_read(joined, *setting) / 1e9,
            0.8 if equal else None,  # then elements cost, and there is no goal
            note=f"fio read {setting[0]} x {setting[1]} of the same {size / 1e9:.1f} GB; "
                 f"{report['bytes_read'] / size:.2f} times as many bytes read"))
    return found
