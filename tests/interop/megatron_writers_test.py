"""What holdfast writes for Megatron, Megatron-core resumes from: torch_dist (`--format megatron`) and legacy files (with
`--to`), loaded into another world by dist_checkpointing and DistributedOptimizer. What is loaded is what Megatron's own checkpoint gives there, bit for bit,
and training goes on with the same loss.

    megatron_writers_test.py HOLDFAST [SEED]
"""

import json
import os
import pathlib
import random
import sys
import tempfile

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import megatron_make as maker
import torch
from truth import Holdfast


def make(case, seed, folder):
    model, optimizer = maker.build(case, seed)
    maker.train(case, model, optimizer, seed, maker.ITERATION)
    maker.save_dist(case, model, optimizer, pathlib.Path(folder, "own"))
    maker.save_legacy(case, model, optimizer, pathlib.Path(folder, "legacy"))


def resume(case, seed, checkpoints):
    """For each: what a fresh model has once it is loaded, and the loss with which it goes on."""
    found = {}
    for name, (load, folder) in checkpoints.items():
        model, optimizer = maker.build(case, seed + 17)
        state = getattr(maker, load)(model, optimizer, folder)
        loaded = maker.snapshot(model, optimizer)
        found[name] = {"loaded": loaded, "args": vars(state["args"]), "iteration": state["iteration"],
                       "scheduler": state["opt_param_scheduler"],
                       "loss": maker.train(case, model, optimizer, seed + 1, 2)}
    return found


def check_equal(found, expected, what, ignored=()):
    for key in ("iteration", "loss", "scheduler"):
        assert found[key] == expected[key], f"{what}: {key}: {found[key]}, expected {expected[key]}"
    for key, value in expected["args"].items():
        assert key in ignored or found["args"][key] == value, f"{what}: args.{key}: {found['args'][key]}, not {value}"
    mine, own = found["loaded"], expected["loaded"]
    assert set(mine) == set(own), set(mine) ^ set(own)
    for key, value in own.items():
        same = torch.equal(mine[key], value) and mine[key].dtype == value.dtype if torch.is_tensor(value) else (
            mine[key] == value)
        assert same, f"{what}: {key} is another one than from Megatron's own checkpoint"


def check(holdfast, case, ranks, target, seed, folder):
    print(json.dumps({"case": case, "ranks": ranks, "target": target}), flush=True)
    maker.world(case, ranks, make, seed, str(folder))
    own = folder / "own"
    holdfast.run("convert", own, folder / "written", "--format", "megatron")
    holdfast.run("convert", folder / "legacy", folder / "from_legacy", "--format", "megatron")
    holdfast.run("convert", own, folder / "job", "--format", "holdfast")
    holdfast.run("convert", folder / "job", folder / "from_ours", "--format", "megatron")
    for name in ("written", "from_legacy", "from_ours"):
        holdfast.run("diff", own, folder / name)
        holdfast.run("verify", folder / name)
    checkpoints = {name: ("load_dist", str(folder / name)) for name in ("own", "written", "from_legacy", "from_ours")}
    aim = dict(case, tp=target["tp"])
    for name in ("own", "legacy"):
        out = folder / f"{name}_as_legacy"
        holdfast.run("convert", folder / name, out, "--format", "megatron", "--to", f"tp={target['tp']}")
        holdfast.run("diff", own, out)
        checkpoints[out.name] = ("load_legacy", str(out))
    for rank, found in enumerate(maker.world(aim, target["ranks"], resume, seed, checkpoints)):
        for name in checkpoints:
            # Legacy files are those of ranks: their degrees are the target's.
            degrees = ("tensor_model_parallel_size", "expert_tensor_parallel_size") if "_as_" in name else ()
            check_equal(found[name], found["own"], f"rank {rank}, {name}", degrees)


def main():
    holdfast = Holdfast(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    maker.shim_devices()
    rng = random.Random(seed)
    for tp, dp, target in ((2, 2, {"tp": 1, "ranks": 2}), (1, 2, {"tp": 2, "ranks": 2})):
        case = {"tp": tp, "layers": rng.choice((2, 3)), "hidden": rng.choice((16, 24)), "ffn": 4 * rng.randrange(3, 12),
                "words": 8 * rng.randrange(4, 12), "gated": rng.random() < 0.5, "bias": rng.random() < 0.5,
                "tied": rng.random() < 0.5}
        with tempfile.TemporaryDirectory() as scratch:
            check(holdfast, case, tp * dp, target, seed, pathlib.Path(scratch))


if __name__ == "__main__":
    main()
