"""What holdfast writes for DeepSpeed, DeepSpeed resumes from: native checkpoints (`--format deepspeed`) and universal
folders (`--format ucp`), from one stage and number of ranks to another. What was loaded is what was trained, bit for
bit; where the number of ranks is the same, training goes on with the loss that DeepSpeed's own checkpoint gives.

    deepspeed_writers_test.py HOLDFAST [SEED [COUNT]]

With COUNT so many of the cases, drawn from the seed.
"""

import json
import pathlib
import shutil

import deepspeed_make as maker
import truth

# What is made, and into what it is loaded: stage, ranks, and whether by way of a universal folder.
CASES = [
    (dict(stage=2, world=2, groups=2), dict(stage=2, world=2)),
    (dict(stage=2, world=2, groups=2), dict(stage=1, world=3)),
    (dict(stage=3, world=2), dict(stage=2, world=2)),
    (dict(stage=1, world=3), dict(stage=3, world=2)),
    (dict(stage=2, world=2, dtype="fp16", groups=2, frozen=True), dict(stage=2, world=3)),
    (dict(stage=2, world=3, zero={"round_robin_gradients": True}), dict(stage=2, world=2)),
    (dict(stage=2, world=2, groups=2), dict(stage=2, world=3, universal=True)),
    (dict(stage=3, world=2), dict(stage=3, world=3, universal=True)),
]


def resume(rank, case, seed, folder, universal, scratch):
    """One rank of a fresh world, which loads the folder, says what it has, and trains on."""
    maker.enter(rank, case, scratch)
    if universal:
        case = dict(case, config={**case.get("config", {}), "checkpoint": {"load_universal": True}})
    engine = maker.make_engine(case, seed + 7)  # other weights, until it loads
    loaded, _ = engine.load_checkpoint(folder)
    assert loaded is not None
    rows, step = [maker.row(*each) for each in maker.truth_of(engine)], engine.global_steps
    loss = maker.train(engine, case, seed + 1, steps=2)
    if rank == 0:
        pathlib.Path(scratch, "found.json").write_text(json.dumps({"rows": rows, "loss": loss, "step": step}))
    maker.leave()


def resumed(case, seed, folder, universal):
    scratch = maker.run_world(resume, case, seed, str(folder), universal)
    found = json.loads((scratch / "found.json").read_text())
    shutil.rmtree(scratch)
    return found


def check(holdfast, source, target, seed, folder):
    made = maker.run_world(maker.make, source, seed)
    expected = {(r["name"], r["state"]): r for r in json.loads((made / "expected.json").read_text())}
    universal = target.get("universal", False)
    to = f"zero={target['stage']}" + ("" if universal else f",dp={target['world']}")
    form = "ucp" if universal else "deepspeed"
    holdfast.run("convert", made / "ckpt", folder / "out", "--format", form, "--to", to)
    case = {**{k: v for k, v in source.items() if k not in ("stage", "world")},
            "stage": target["stage"], "world": target["world"]}
    found = resumed(case, seed, folder / "out", universal)
    assert found["step"] == 3, found["step"]
    for row in found["rows"]:
        key = (row["name"], row["state"])
        # DeepSpeed restores neither buffers nor frozen weights from a universal folder.
        if universal and (row["state"] == "buffer" or row["name"].startswith("still.")):
            continue
        want = expected.pop(key)
        for field in ("dtype", "shape", "sha256"):
            assert row[field] == want[field], f"{key}: {field}: {want[field]} was trained, {row[field]} was loaded"
    left = [key for key in expected if key[1] != "buffer" and not key[0].startswith("still.")]
    assert not left, f"not loaded: {left}"
    if not universal and source["world"] == target["world"] and source["stage"] == target["stage"]:
        own = resumed(case, seed, made / "ckpt", False)
        assert own["loss"] == found["loss"], (own["loss"], found["loss"])
    shutil.rmtree(made)


if __name__ == "__main__":
    truth.run_cases(CASES, check)
