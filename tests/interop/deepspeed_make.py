"""Makes small DeepSpeed checkpoints with DeepSpeed itself, on CPU, and the truth about them.

    deepspeed_make.py OUT [--case NAME ...] [--seed N]

Each case becomes OUT/<name>/ckpt and OUT/<name>/expected.json: name, state, dtype, shape and sha256 of
every whole tensor, from the live training objects: flat partitions are gathered and cut by the
optimizer's own layout in memory (never by its slice mappings, which are wrong under round robin).
With `universal` the checkpoint is what DeepSpeed's ds_to_universal makes of it.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

CASES = {
    "zero1_sgd": dict(stage=1, optimizer="sgd"),
    "zero2_round_robin": dict(stage=2, world=3, groups=2, zero={"round_robin_gradients": True}),
    "zero2_frozen": dict(stage=2, frozen=True, dtype="fp16", groups=2),
    "zero2_aligned_round_robin": dict(stage=2, zero={"round_robin_gradients": True, "parameter_alignment": True}),
    "bf16_optimizer": dict(stage=1, groups=2, config={"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero3_sub_groups": dict(stage=3, world=3, groups=2, frozen=True, zero={"sub_group_size": 60}),
    "zero3_fp32": dict(stage=3, dtype="fp32", optimizer="adagrad"),
    "universal_round_robin": dict(stage=2, world=3, zero={"round_robin_gradients": True}, universal=True),
    "universal_zero3": dict(stage=3, groups=2, zero={"sub_group_size": 60}, universal=True),
}
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
}


class Net(nn.Module):
    """Odd sizes, a tied weight, buffers of two dtypes, perhaps a frozen layer."""

    def __init__(self, case):
        super().__init__()
        hidden = case.get("hidden", 5)
        self.embed = nn.Embedding(11, hidden)
        self.up = nn.Linear(hidden, 7)
        self.still = nn.Linear(7, 7)
        self.down = nn.Linear(7, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, hidden))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        if case.get("frozen"):
            self.still.requires_grad_(False)

    def forward(self, ids):
        self.calls += 1
        x = self.embed(ids[:, :-1]) * self.scale.to(self.embed.weight.dtype)
        x = self.norm(x + self.down(torch.tanh(self.still(self.up(x)))))
        return nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), ids[:, 1:].flatten())


def make_engine(case, seed):
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    # The CPU accelerator admits fp16 only with mkldnn's blessing; torch computes it everywhere.
    get_accelerator().is_fp16_supported = lambda: True
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
    torch.manual_seed(seed)
    model = Net(case)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained}]
    if case.get("groups") == 2:
        groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
                  {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0, **case.get("zero", {})},
        "steps_per_print": 10**9,
        **case.get("config", {}),
    }
    dtype = case.get("dtype", "bf16")
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
        if dtype == "fp16":
            config[dtype]["initial_scale_power"] = 8
    optimizer = OPTIMIZERS[case.get("optimizer", "adamw")](groups)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def pieces_of(engine, rank=None):
    """{name: (shape, first element, {state: elements})} of this rank; of Muon's momentum all elements. `rank`: the number
    of its partition, or a function of the group; by default the rank."""
    optimizer, names = engine.optimizer, {id(p): n for n, p in engine.module.named_parameters()}
    rank, found = torch.distributed.get_rank() if rank is None else rank, {}

    def add(parameter, shape, first, flat, begin, count, whole_at=None):
        states = {"fp32": flat.detach()[begin:begin + count].clone()}
        for key, value in optimizer.optimizer.state[flat].items():
            value = value if torch.is_tensor(value) else torch.tensor(value)
            if value.dim() > 0 and key == "momentum_buffer" and getattr(parameter, "use_muon", False):
                if count > 0:
                    states[key] = value.detach()[whole_at:whole_at + parameter.numel()].clone()
            else:
                states[key] = value.detach()[begin:begin + count].clone() if value.shape == flat.shape else value.clone()
        found[names[id(parameter)]] = (list(shape), first, states)

    if engine.zero_optimization_stage() == 3:
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat):
            begin = 0
            for p in group:
                width = p.partition_numel()
                add(p, p.ds_shape, rank * width, flat, begin, max(0, min(width, p.ds_numel - rank * width)))
                begin += width
        return found
    if hasattr(optimizer, "bf16_groups"):
        groups, flats, offsets = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, None
    else:
        groups, flats = optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups
        offsets = optimizer.round_robin_bit16_offsets
    for g, (group, flat) in enumerate(zip(groups, flats)):
        at, whole_at, mine = 0, 0, rank(g) if callable(rank) else rank
        for i, p in enumerate(group):
            place = offsets[g][i] if offsets else at
            at += p.numel()
            low, high = mine * flat.numel(), (mine + 1) * flat.numel()
            begin, end = max(low, place), min(high, place + p.numel())
            add(p, p.shape, max(0, begin - place), flat, begin - low, max(0, end - begin), whole_at)
            whole_at += p.numel() if end > begin else 0
    return found


def truth_of(engine):
    import deepspeed
    rows = []
    for name, p in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            rows.append((name, "param", p.detach().clone().view(getattr(p, "ds_shape", p.shape))))
    dtypes = {name: tensor.dtype for name, _, tensor in rows}
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, pieces_of(engine))
    for name, (shape, _, states) in gathered[0].items():
        for state, sample in states.items():
            if state == "fp32" and sample.dtype == dtypes[name]:
                continue
            if sample.dim() > 0:
                sample = torch.cat([of[name][2][state] for of in gathered]).view(shape)
            rows.append((name, state, sample))
    return rows + [(name, "buffer", b.clone()) for name, b in engine.module.named_buffers()]


def row(name, state, tensor):
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {"name": name, "state": state, "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape), "sha256": hashlib.sha256(data).hexdigest()}


def train(engine, case, seed, steps=3):
    """Steps; the last loss, which is the same on the same weights, data and optimizer state."""
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    loss = None
    for _ in range(steps):
        loss = engine(torch.randint(0, 11, (2, 6), generator=generator))
        engine.backward(loss)
        engine.step()
    return loss.item()


def make(rank, case, seed, scratch):
    """One rank of a fresh world."""
    enter(rank, case, scratch)
    engine = make_engine(case, seed)
    train(engine, case, seed)
    rows = truth_of(engine)
    engine.save_checkpoint(f"{scratch}/ckpt")
    if rank == 0:
        pathlib.Path(scratch, "expected.json").write_text(json.dumps([row(*r) for r in rows]))
    leave()


def enter(rank, case, scratch):
    log = open(f"{scratch}/log{rank}", "w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    world = case.get("world", 2)
    # Ranks meet at a file; DeepSpeed wants to see an address all the same.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank,
                                         world_size=world)
    import deepspeed
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def leave():
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)  # engines keep threads and process groups; nothing is left to flush


def run_world(function, case, *arguments):
    """Runs function(rank, case, *arguments, scratch) on every rank, in a new folder, which is returned."""
    scratch = tempfile.mkdtemp()
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=function, args=(r, case, *arguments, scratch)) for r in range(case.get("world", 2))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    if any(process.exitcode != 0 for process in ranks):
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(pathlib.Path(scratch).glob("log*")))
        raise RuntimeError(f"a rank failed\n{logs}")
    return pathlib.Path(scratch)


def ds_to_universal(source, out, *options):
    """DeepSpeed's own converter, of the newest tag in a checkpoint folder."""
    tag = (source / "latest").read_text()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source / tag),
               "--output_folder", str(out), "--num_extract_workers", "1", "--num_merge_workers", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])


def universal(source, out):
    """What DeepSpeed's own converter makes of a checkpoint folder."""
    tag = (source / "latest").read_text()
    ds_to_universal(source, out / f"{tag}_universal", "--inject_missing_state")


def make_case(case, seed, target):
    """Writes target/ckpt and target/expected.json."""
    scratch = run_world(make, case, seed)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if case.get("universal"):
        universal(scratch / "ckpt", target / "ckpt")
    else:
        shutil.copytree(scratch / "ckpt", target / "ckpt", ignore=shutil.ignore_patterns("*.py"))
    rows = json.loads((scratch / "expected.json").read_text())
    text = ",\n".join("  " + json.dumps(r) for r in rows)
    (target / "expected.json").write_text(f'{{"seed": {seed}, "tensors": [\n{text}\n]}}\n')
    shutil.rmtree(scratch)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--case", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for name in options.case:
        make_case(CASES[name], options.seed, options.out / name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
