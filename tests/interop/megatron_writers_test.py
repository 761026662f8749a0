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


STATES = ("fp32", "exp_avg", "exp_avg_sq")
# Forms of the optimizer's states without names.
ANONYMOUS = ("dp_reshardable", "dp_zero_gather_scatter")


def make(case, seed, folder):
    chunks, optimizer = maker.build(case, seed)
    maker.train(case, chunks, optimizer, seed, maker.ITERATION)
    maker.save_dist(case, chunks, optimizer, pathlib.Path(folder, "own"))
    maker.save_legacy(case, chunks, optimizer, pathlib.Path(folder, "legacy"))
    for kind in ANONYMOUS:
        maker.save_dist(case, chunks, optimizer, pathlib.Path(folder, kind), kind)
    return maker.held(chunks, optimizer)


def resume(case, seed, checkpoints):
    """For each: what a fresh model has once it is loaded, and the loss with which it goes on."""
    found = {}
    for name, (load, folder) in checkpoints.items():
        chunks, optimizer = maker.build(case, seed + 17)
        state = getattr(maker, load)(chunks, optimizer, folder)
        loaded = maker.snapshot(chunks, optimizer)
        found[name] = {"loaded": loaded, "args": vars(state["args"]), "iteration": state["iteration"],
                       "scheduler": state["opt_param_scheduler"],
                       "loss": maker.train(case, chunks, optimizer, seed + 1, 2)}
    return found


def load_targets(case, seed, checkpoint):
    """What this rank of a job holds once it has loaded legacy files of its own degrees."""
    chunks, optimizer = maker.build(case, seed + 17)
    maker.load_legacy(chunks, optimizer, checkpoint)
    return maker.held(chunks, optimizer)


def load_weights(case, seed, checkpoints):
    found = {}
    for name, folder in checkpoints.items():
        chunks, _ = maker.build(case, seed + 17)
        state, _ = maker.load_legacy_weights(chunks, folder)
        found[name] = dict(chunks[0].module.state_dict()), vars(state["args"])
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
    for kind in ANONYMOUS:
        holdfast.run("diff", own, folder / kind)
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


def check_parts(found, whole, what):
    """What the ranks hold are the parts of the whole model, and all of them."""
    elements = {}
    for name, parts in (pair for rank in found for pair in rank.items()):
        # With several stages the last one has a copy of a tied embedding.
        of = whole.get(name) or whole["embedding.word_embeddings.weight"]
        assert torch.equal(parts["param"], of["param"]), f"{what}: {name} is another one"
        for state, (begin, part) in ((key, value) for key, value in parts.items() if key != "param"):
            assert torch.equal(part, of[state][1][begin:begin + part.numel()]), f"{what}: {state} of {name} is another one"
            elements.setdefault((name, state), set()).update(range(begin, begin + part.numel()))
    assert {(name, state) for name in whole for state in STATES} <= set(elements), f"{what}: some are on no rank"
    for (name, state), places in elements.items():
        assert len(places) == (whole.get(name) or whole["embedding.word_embeddings.weight"])["param"].numel(), (name, state)


def check_targets(holdfast, case, targets, seed, folder):
    """Legacy files for pipelines, model chunks and parallel experts: what one rank held whole."""
    (whole,) = maker.world(case, 1, make, seed, str(folder))
    for kind in ANONYMOUS:
        holdfast.run("diff", folder / "own", folder / kind)
    for target in targets:
        print(json.dumps({"case": case, "target": target}), flush=True)
        out = folder / "target"
        holdfast.run("convert", folder / "own", out, "--format", "megatron", "--force", "--to",
                     ",".join(f"{axis}={size}" for axis, size in target.items()))
        # Of tied embeddings the last stage has a copy besides.
        said = holdfast.run("diff", folder / "own", out, codes=(0, 1)).splitlines()[1:]
        assert all(not line or 'only in B: tensor "output_layer.weight"' in line for line in said), said
        ranks = target.get("pp", 1) * target.get("ep", 1)
        check_parts(maker.world(dict(case, **target), ranks, load_targets, seed, str(out)), whole, str(target))


def check_from_hf(holdfast, case, seed, folder):
    """A folder of Hugging Face's becomes legacy files for two tensor-parallel ranks: its configuration tells the arguments."""
    maker.world(case, 1, make, seed, str(folder))
    holdfast.run("convert", folder / "own", folder / "own_as_legacy", "--format", "megatron", "--to", "tp=2")
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(
        {"vocab_size": case["words"], "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 8}))
    holdfast.run("export", folder / "own", folder / "hf", "--map", "llama", "--model", config)
    holdfast.run("convert", folder / "hf", folder / "from_hf", "--format", "megatron", "--map", "llama:megatron-local", "--model",
                 config, "--set", f"padded_vocab={case['words']}", "--to", "tp=2")
    checkpoints = {name: str(folder / name) for name in ("own_as_legacy", "from_hf")}
    for rank, found in enumerate(maker.world(dict(case, tp=2), 2, load_weights, seed, checkpoints)):
        (own, args), (mine, said) = found["own_as_legacy"], found["from_hf"]
        for name, tensor in own.items():
            assert tensor is None or torch.equal(mine[name], tensor), f"rank {rank}: {name} is another one"
        # Those that check_checkpoint_args compares, and what else both say.
        assert {"num_layers", "hidden_size", "num_attention_heads", "tensor_model_parallel_size",
                "pipeline_model_parallel_size", "add_position_embedding"} <= set(said), said
        for key in set(said) & set(args):
            if key != "use_distributed_optimizer":
                assert said[key] == args[key], f"args.{key}: {said[key]}, not {args[key]}"


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
                "tied": rng.random() < 0.5, "mtp": 1 if tp == 2 else None}
        with tempfile.TemporaryDirectory() as scratch:
            check(holdfast, case, tp * dp, target, seed, pathlib.Path(scratch))
    dense = {"tp": 1, "layers": 4, "hidden": 16, "ffn": 24, "words": 40, "gated": True, "bias": False, "tied": True}
    with tempfile.TemporaryDirectory() as scratch:
        check_targets(holdfast, dense, ({"pp": 2, "vpp": 2}, {"pp": 2, "first": 1}), seed, pathlib.Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        check_from_hf(holdfast, dense, seed, pathlib.Path(scratch))
    experts = dict(dense, layers=2, experts=4, tied=False)
    with tempfile.TemporaryDirectory() as scratch:
        check_targets(holdfast, experts, ({"ep": 2}, {"pp": 2, "ep": 2}), seed, pathlib.Path(scratch))


if __name__ == "__main__":
    main()
