"""Checkpoints that PyTorch's DCP and FSDP write here and now, in configurations drawn at random, are to holdfast
what training held: every tensor and state, bit for bit. What holdfast writes of them as DCP, torch loads: the same.

    sharded_test.py HOLDFAST [SEED]

The seed is printed; it draws sizes, meshes, dtypes, optimizers and the writer's options.
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile

import torch
import torch.distributed.checkpoint as dcp

import sharded_make

ONE_CLASS = {"param", "buffer", "tensor", "other"}  # keys do not tell them apart


def draw(rng, kind):
    axes = rng.choice((["dp"], ["replicate", "shard"], ["dp", "tp"]))
    mesh = [rng.choice((2, 3))] if len(axes) == 1 else [2, 2]
    even = axes[-1] == "tp"  # PyTorch's tensor parallelism wants sizes that divide
    case = {"kind": kind, "axes": axes, "mesh": mesh, "world": mesh[0] * (mesh[1] if len(mesh) > 1 else 1),
            "words": rng.randrange(4, 12) * 2 + (0 if even else 1), "width": rng.randrange(2, 8) * 2,
            "inner": rng.randrange(2, 8) * 2, "layers": rng.choice((1, 2)), "steps": rng.choice((1, 3)),
            "dtype": rng.choice(("float32", "bfloat16")), "optimizer": rng.choice(("sgd", "adamw", "amsgrad")),
            "seed": rng.randrange(10**6), "threads": rng.choice((1, 2)), "file_per_rank": rng.random() < 0.7,
            "flatten": rng.random() < 0.5, "collectives": rng.random() < 0.7}
    if kind == "flat":
        case.update(world=rng.choice((2, 3)), dtype="float32", inside_dcp=rng.random() < 0.5)
    return case


def key(record):
    return record["name"], "a tensor" if record["state"] in ONE_CLASS else record["state"]


def check(holdfast, folder):
    truth = json.loads((folder / "expected.json").read_text())
    names = folder / "names.json"
    names.write_text(json.dumps({"units": truth["layout"].get("units", []),
                                 "parameters": truth["layout"].get("optimizer_index", [])}))
    command = [holdfast, "inspect", folder / "ckpt", "--names", names, "--tensors", "--sha256", "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"holdfast inspect: exit {done.returncode}: {done.stderr}")
    found = {key(r): r for r in json.loads(done.stdout)["tensors"]}
    for want in truth["tensors"]:
        have = found.pop(key(want), None)
        if have is None:
            raise AssertionError(f"missing: {key(want)}")
        for field in ("dtype", "shape", "sha256"):
            if have[field] != want[field]:
                raise AssertionError(f"{key(want)}: {field}: {want[field]} expected, {have[field]} found")
    if found:
        raise AssertionError(f"not expected: {sorted(found)}")
    verified = subprocess.run([holdfast, "verify", str(folder / "ckpt"), "--names", str(names)], capture_output=True,
                              text=True, check=False)
    if verified.returncode != 0:
        raise AssertionError(f"holdfast verify: exit {verified.returncode}: {verified.stdout}{verified.stderr}")
    return len(truth["tensors"])


def check_written(holdfast, folder):
    """torch.distributed.checkpoint.load of what `holdfast convert --format dcp` has made."""
    truth = json.loads((folder / "expected.json").read_text())["tensors"]
    command = [holdfast, "convert", folder / "ckpt", folder / "out", "--format", "dcp", "--names", folder / "names.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"holdfast convert: exit {done.returncode}: {done.stderr}")
    model, states = {}, {}
    for want in truth:
        empty = torch.empty(want["shape"], dtype=getattr(torch, want["dtype"]))
        if want["state"] in ONE_CLASS:
            model[want["name"]] = empty
        else:
            states.setdefault(want["name"], {})[want["state"]] = empty
    loaded = {"model": model, "optim": {"state": states}} if states else {"model": model}
    dcp.load(loaded, checkpoint_id=str(folder / "out"), no_dist=True)
    for want in truth:
        one_class = want["state"] in ONE_CLASS
        tensor = model[want["name"]] if one_class else states[want["name"]][want["state"]]
        if sharded_make.record(want["name"], want["state"], tensor)["sha256"] != want["sha256"]:
            raise AssertionError(f"torch loads another {want['name']}, {want['state']}")


def main():
    holdfast = sys.argv[1]
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        for number, kind in enumerate(("dcp", "dcp", "rank_files", "flat")):
            case = draw(rng, kind)
            folder = pathlib.Path(scratch, str(number))
            sharded_make.make(folder, case)
            print(f"{check(holdfast, folder)} tensors: {case}", flush=True)
            check_written(holdfast, folder)


if __name__ == "__main__":
    main()
