"""Checkpoints that DeepSpeed writes here and now, in configurations drawn at random, are to holdfast what
training held: every tensor and state, bit for bit.

    deepspeed_test.py HOLDFAST [SEED]

The seed is printed; it draws sizes, worlds, stages, dtypes, optimizers and options.
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile

import deepspeed_make

ROUNDS = 3


def draw(rng):
    stage = rng.choice((1, 2, 2, 3))
    case = {
        "stage": stage,
        "world": rng.choice((2, 3)),
        "hidden": rng.randrange(3, 9),
        "dtype": rng.choice(("bf16", "fp16", "fp32")),
        "optimizer": rng.choice(("adamw", "sgd", "adagrad")),
        "groups": rng.choice((1, 2)),
        "frozen": rng.random() < 0.5,
        "zero": {},
    }
    if stage == 2:
        case["zero"]["round_robin_gradients"] = rng.random() < 0.6
        case["zero"]["parameter_alignment"] = rng.random() < 0.3
    if stage == 3:
        case["zero"]["sub_group_size"] = rng.choice((20, 60, 10**9))
    # DeepSpeed's own converter knows Adam's states only.
    case["universal"] = case["optimizer"] == "adamw" and case["dtype"] != "fp32" and rng.random() < 0.6
    return case


def records(holdfast, folder):
    command = [holdfast, "inspect", str(folder), "--tensors", "--sha256", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"holdfast inspect: exit {done.returncode}: {done.stderr}")
    return {(r["name"], r["state"]): r for r in json.loads(done.stdout)["tensors"]}


def check(name, folder, holdfast):
    expected = json.loads((folder / "expected.json").read_text())["tensors"]
    found = records(holdfast, folder / "ckpt")
    for want in expected:
        have = found.pop((want["name"], want["state"]), None)
        if have is None:
            raise AssertionError(f"{name}: missing {want['name']}, {want['state']}")
        for key in ("dtype", "shape", "sha256"):
            if have[key] != want[key]:
                raise AssertionError(f"{name}: {want['name']}, {want['state']}: {key}: {want[key]} expected, {have[key]} found")
    if found:
        raise AssertionError(f"{name}: not expected: {sorted(found)}")
    return len(expected)


def main():
    holdfast = sys.argv[1]
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        for i in range(ROUNDS):
            case = draw(rng)
            print(f"case {i}: {case}", flush=True)
            deepspeed_make.CASES[f"random{i}"] = case
            deepspeed_make.make_case(f"random{i}", rng.randrange(1000), pathlib.Path(directory))
            count = check(f"random{i}", pathlib.Path(directory, f"random{i}"), holdfast)
            print(f"  {count} tensors equal", flush=True)


if __name__ == "__main__":
    main()
