"""Checkpoints that DeepSpeed writes here and now, in configurations drawn at random, are to holdfast what training held:
every tensor and state, bit for bit. What holdfast writes of them, torch loads: the same.

    deepspeed_test.py HOLDFAST [SEED]

The seed is printed; it draws stages, worlds, dtypes, optimizers, groups, frozen layers, sizes and options.
"""

import json
import pathlib
import random
import sys
import tempfile

import deepspeed_make
import truth


def draw(rng, stage, universal):
    dtype = rng.choice(("bf16", "fp16", "fp32"))
    case = {"stage": stage, "world": rng.choice((2, 3)), "dtype": dtype, "hidden": rng.randrange(3, 9),
            "groups": rng.choice((1, 2)), "frozen": rng.random() < 0.4 and not universal, "universal": universal,
            "optimizer": rng.choice(("adamw", "adamw", "sgd", "adagrad")) if not universal else "adamw", "zero": {}}
    if stage == 3:
        case["zero"]["sub_group_size"] = rng.choice((60, 10**9))
    elif rng.random() < 0.5:
        case["zero"]["round_robin_gradients"] = True
    return case


def check(holdfast, folder):
    expected = json.loads((folder / "expected.json").read_text())["tensors"]
    report = holdfast.expect(folder / "ckpt", expected)
    holdfast.expect_dcp(folder / "ckpt", folder / "dcp", expected)
    job = folder / "root" / "job"
    job.parent.mkdir()
    holdfast.run("convert", folder / "ckpt", job, "--format", "holdfast")
    holdfast.run("diff", folder / "ckpt", job)
    return f"{len(expected)} tensors, {len(report['repairs'])} repairs"


def main():
    holdfast = truth.Holdfast(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (stage, universal) in enumerate(((1, False), (2, False), (3, False), (2, True))):
            case = draw(rng, stage, universal)
            folder = pathlib.Path(scratch, str(number))
            print(case, flush=True)
            deepspeed_make.make_case(case, rng.randrange(10**6), folder)
            print(check(holdfast, folder), flush=True)


if __name__ == "__main__":
    main()
