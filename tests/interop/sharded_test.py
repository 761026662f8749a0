"""Checkpoints that PyTorch's DCP and FSDP write here and now, in configurations drawn at random, are to holdfast
what training held: every tensor and state, bit for bit. What holdfast writes of them as DCP, torch loads: the same.

    sharded_test.py HOLDFAST [SEED]

The seed is printed; it draws sizes, meshes, dtypes, optimizers and the writer's options.
"""

import json
import pathlib
import random
import sys
import tempfile

import sharded_make
import truth


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


def check(holdfast, folder):
    expected = json.loads((folder / "expected.json").read_text())
    names = folder / "names.json"
    names.write_text(json.dumps({"units": expected["layout"].get("units", []),
                                 "parameters": expected["layout"].get("optimizer_index", [])}))
    tensors = expected["tensors"]
    holdfast.expect(folder / "ckpt", tensors, "--names", names)
    holdfast.expect_dcp(folder / "ckpt", folder / "out", tensors, "--names", names)
    return len(tensors)


def main():
    holdfast = truth.Holdfast(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        for number, kind in enumerate(("dcp", "dcp", "rank_files", "flat")):
            case = draw(rng, kind)
            folder = pathlib.Path(scratch, str(number))
            sharded_make.make(folder, case)
            print(f"{check(holdfast, folder)} tensors: {case}", flush=True)


if __name__ == "__main__":
    main()
