"""`holdfast view` of checkpoints of 600 tensors, ours and others', and a read through it. No agent: ours is made by
tests/support/make_checkpoint; the command is the user's, start and fsync included."""

import json
import resource
import statistics
import subprocess
import time

import safetensors.torch
import torch
import torch.distributed.checkpoint

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


def make_ours(place):
    document = place.directory / "layout.json"
    document.write_text(json.dumps(layout()), encoding="utf-8")
    job = place.directory / "job"
    subprocess.run([place.build / "tests" / "support" / "make_checkpoint", document, job, "1"], check=True)
    return job, f"{RANKS} ranks"


def make_torch(place):
    """One torch.save of a training state: 200 parameters with two states each."""
    parameters = {f"model.layers.{i // 8}.block.{i % 8}.weight": torch.ones(SHAPES[i % len(SHAPES)][0])
                  for i in range(200)}
    optimizer = {"state": {i: {"exp_avg": p.clone(), "exp_avg_sq": p.clone()} for i, p in enumerate(parameters.values())},
                 "param_groups": [{"lr": 0.1, "params": list(range(200))}]}
    path = place.directory / "training.pt"
    torch.save({"model": parameters, "optimizer": optimizer}, path)
    return path, "torch.save of a training state"


def make_hf(place):
    """A Hugging Face folder of 600 tensors in four shards."""
    folder = place.directory / "hf"
    folder.mkdir()
    weight_map = {}
    for shard in range(4):
        tensors = {f"model.layers.{i // 8}.block.{i % 8}.weight": torch.ones(SHAPES[i % len(SHAPES)][0])
                   for i in range(shard * 150, shard * 150 + 150)}
        name = f"model-{shard + 1:05}-of-00004.safetensors"
        safetensors.torch.save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder, "Hugging Face folder, 4 shards"


def make_dcp(place):
    """PyTorch's DCP, one file per item: 600 items."""
    tensors = {f"model.layers.{i // 8}.block.{i % 8}.weight": torch.ones(SHAPES[i % len(SHAPES)][0])
               for i in range(600)}
    folder = place.directory / "dcp"
    writer = torch.distributed.checkpoint.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
    torch.distributed.checkpoint.save({"model": tensors}, storage_writer=writer, no_dist=True)
    return folder, "DCP, 600 files"


def rows(place):
    found = []
    for name, make in (("ours", make_ours), ("torch", make_torch), ("hf", make_hf), ("dcp", make_dcp)):
        checkpoint, note = make(place)
        found += rows_of(place, f"view of 600 tensors, {name}", checkpoint, note)
    return found


def rows_of(place, name, checkpoint, note):
    view = place.directory / "view.h5"
    cpu_seconds = []

    def make():
        view.unlink(missing_ok=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begun = time.perf_counter()
        result = subprocess.run([place.build / "cli" / "holdfast", "view", checkpoint, view, "--json"], check=True,
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

    made = pairs.measure(name, "s", make, 0.2, note=f"{note}; start of the command and fsync included")
    made.note += f"; CPU time {statistics.median(cpu_seconds):.3f} s"
    return [made, pairs.measure(f"{name}: all read by h5py", "s", read)]
