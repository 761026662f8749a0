"""What holdfast writes for PyTorch, PyTorch loads: one file (`--format torch`), rank files of FSDP2 (`--format fsdp`).
A model is trained with torch; what was written of its checkpoint is loaded into a new one, which is then the same, bit
for bit, and trains on with the same loss.

    torch_writers_test.py HOLDFAST [SEED]
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.tensor  # rank files name its classes
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class Net(nn.Module):
    def __init__(self, words, width):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)
        self.register_buffer("seen", torch.arange(3, dtype=torch.int64))

    def forward(self, ids):
        return self.head(self.norm(self.down(torch.tanh(self.up(self.embed(ids))))))


def groups_of(model):
    return [{"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in model.named_parameters() if p.dim() < 2], "weight_decay": 0.0}]


def optimizer_of(model):
    return torch.optim.AdamW(groups_of(model), lr=0.01, amsgrad=True, foreach=False)


def train(model, optimizer, words, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    loss = None
    for _ in range(steps):
        ids = torch.randint(0, words, (4, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(model, optimizer):
    """{(name, state): tensor}."""
    found = {(n, "model"): t for n, t in model.state_dict().items()}
    names = {id(p): n for n, p in model.named_parameters()}
    for p, states in optimizer.state.items():
        found.update({(names[id(p)], state): value for state, value in states.items()})
    return {key: whole(value).detach().clone() for key, value in found.items()}


def check_equal(found, expected):
    assert set(found) == set(expected), set(found) ^ set(expected)
    for key, tensor in expected.items():
        same = found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
        assert same, f"{key} is not what was trained"


def convert(holdfast, *arguments):
    done = subprocess.run([holdfast, "convert", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"holdfast convert: exit {done.returncode}: {done.stderr}"


def check_file(holdfast, case, folder, expected, loss):
    convert(holdfast, folder / "saved.pt", folder / "written.pt", "--format", "torch")
    loaded = torch.load(folder / "written.pt", weights_only=True)
    model = Net(case["words"], case["width"])
    optimizer = optimizer_of(model)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    check_equal(everything(model, optimizer), expected)
    for group, new in zip(loaded["optimizer"]["param_groups"], optimizer.param_groups):
        assert new["lr"] == 0.01 and new["amsgrad"] and new["betas"] == (0.9, 0.999), group
    assert loaded["global_step"] == case["steps"]
    assert train(model, optimizer, case["words"], case["seed"] + 1, 2) == loss
    # Weights alone are a state dict.
    convert(holdfast, folder / "saved.pt", folder / "weights.pt", "--format", "torch", "--drop", "*")
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert set(weights) == set(model.state_dict())


def load_rank_files(rank, case, folder, store):
    torch.set_num_threads(1)
    ranks = case["ranks"]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model = Net(case["words"], case["width"])
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",)))
    optimizer = optimizer_of(model)
    place = pathlib.Path(folder, "ranks")
    model.load_state_dict(torch.load(place / f"model_world_size_{ranks}_rank_{rank}.pt", weights_only=True))
    optimizer.load_state_dict(torch.load(place / f"optim_world_size_{ranks}_rank_{rank}.pt", weights_only=True))
    found = everything(model, optimizer)
    if rank == 0:
        torch.save(found, pathlib.Path(folder, "found.pt"))
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)
    train(model, optimizer, case["words"], case["seed"] + 1, 1)  # it can
    dist.barrier()
    dist.destroy_process_group()


def check_rank_files(holdfast, case, folder, expected):
    convert(holdfast, folder / "saved.pt", folder / "ranks", "--format", "fsdp", "--to", f"dp={case['ranks']}",
            "--drop", "objects")  # the step has no place there
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(load_rank_files, (case, str(folder), os.path.join(scratch, "store")), nprocs=case["ranks"])
    check_equal(torch.load(folder / "found.pt"), expected)


def main():
    holdfast = sys.argv[1]
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    rng = random.Random(seed)
    case = {"words": rng.randrange(5, 30), "width": rng.randrange(3, 12), "steps": rng.choice((1, 3)), "seed": seed,
            "ranks": rng.choice((2, 3))}
    print(json.dumps(case), flush=True)
    torch.manual_seed(seed)
    model = Net(case["words"], case["width"])
    optimizer = optimizer_of(model)
    train(model, optimizer, case["words"], seed, case["steps"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "global_step": case["steps"]},
                   folder / "saved.pt")
        expected = everything(model, optimizer)
        loss = train(model, optimizer, case["words"], seed + 1, 2)
        check_file(holdfast, case, folder, expected, loss)
        check_rank_files(holdfast, case, folder, expected)


if __name__ == "__main__":
    main()
