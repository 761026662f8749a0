"""Checkpoints of PyTorch's DCP and FSDP on CPU, in a configuration that the caller chooses, each with the truth
beside it: expected.json, taken from the live tensors before anything is saved.

    sharded_make.py OUT [SAMPLE ...]    the samples of tests/data/sharded, or some of them
"""

import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Layer(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, words, width, inner, layers):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width, inner) for _ in range(layers))
        self.out = nn.Linear(width, words)
        self.register_buffer("counts", torch.arange(5, dtype=torch.int64) * 3)

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def shard(model, case):
    """FSDP2 over the first axes of the mesh, tensor parallelism over the last one where there is a tp."""
    mesh = init_device_mesh("cpu", tuple(case["mesh"]), mesh_dim_names=tuple(case["axes"]))
    data = mesh
    if case["axes"][-1] == "tp":
        plan = {"out": ColwiseParallel(output_layouts=Replicate())}
        for i in range(len(model.layers)):
            plan[f"layers.{i}.up"] = ColwiseParallel()
            plan[f"layers.{i}.down"] = RowwiseParallel()
        parallelize_module(model, mesh["tp"], plan)
        data = mesh[tuple(case["axes"][:-1])]
    for layer in model.layers:
        fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)


def record(name, state, tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)  # FSDP resizes what .numpy() pins
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {"name": name, "state": state, "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape), "sha256": hashlib.sha256(content).hexdigest()}


def records(model, optimizer):
    found = [record(name, "param", p) for name, p in model.named_parameters()]
    found += [record(name, "buffer", b) for name, b in model.named_buffers()]
    names = {id(p): name for name, p in model.named_parameters()}
    for p, states in optimizer.state.items():
        found += [record(names[id(p)], state, v) for state, v in states.items() if isinstance(v, torch.Tensor)]
    return found


def clean(name):
    return name.replace("_fsdp_wrapped_module.", "")


def flat_records(model, optimizer):
    """FSDP1: whole parameters, and states cut out of the gathered flat ones. Also the units, as --names has them."""
    found, units = [], []
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        found += [record(clean(name), "param", p) for name, p in model.named_parameters()]
        found += [record(clean(name), "buffer", b) for name, b in model.named_buffers()]
    for name, module in model.named_modules():
        if not isinstance(module, FullyShardedDataParallel):
            continue
        flat = module._handle.flat_param
        unit = clean(name + ".") if name else ""
        pieces = [{"name": unit + clean(n), "shape": list(s)} for n, s in zip(flat._fqns, flat._shapes)]
        units.append({"unit": unit.rstrip("."), "pieces": pieces})
        for state, value in sorted(optimizer.state[flat].items()):
            if value.dim() > 0:
                parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, value)
                value = torch.cat(parts)
            offset = 0
            for piece in pieces:
                count = torch.Size(piece["shape"]).numel()
                part = value if value.dim() == 0 else value[offset:offset + count].view(piece["shape"])
                found.append(record(piece["name"], state, part))
                offset += count
    return found, units


def save_rank_files(model_state, optimizer_state, rank, world):
    os.makedirs("ckpt", exist_ok=True)
    torch.save(model_state, f"ckpt/model_world_size_{world}_rank_{rank}.pt")
    torch.save(optimizer_state, f"ckpt/optim_world_size_{world}_rank_{rank}.pt")


def save(case, model, optimizer, rank):
    if case["kind"] == "rank_files":
        save_rank_files(model.state_dict(), optimizer.state_dict(), rank, case["world"])
        return
    options = StateDictOptions(flatten_optimizer_state_dict=case.get("flatten", False))
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    state = {"model": model_state, "optim": optimizer_state, "step": case["steps"]}
    writer = dcp.FileSystemWriter("ckpt", thread_count=case.get("threads", 1),
                                  single_file_per_rank=case.get("file_per_rank", True))
    dcp.save(state, storage_writer=writer, use_collectives=case.get("collectives", True))


def worker(rank, case, folder, store):
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case["world"])
    torch.manual_seed(case["seed"])
    model = Model(case["words"], case["width"], case["inner"], case["layers"]).to(getattr(torch, case["dtype"]))
    flat = case["kind"] == "flat"
    if flat:
        model = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({Layer}), use_orig_params=False,
                                         device_id=torch.device("cpu"))
    else:
        shard(model, case)
    if case["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=case["optimizer"] == "amsgrad",
                                      foreach=False)
    for step in range(case["steps"]):
        ids = torch.arange(6).remainder(case["words"]).view(2, 3) + step % 2
        model(ids).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    truth = {"what": f"{case}", "tensors": [], "layout": {}, "scalars": {}}
    if flat:
        truth["tensors"], truth["layout"]["units"] = flat_records(model, optimizer)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.LOCAL_STATE_DICT):
            if case.get("inside_dcp"):  # of the optimizer's plain tensors DCP would keep one rank's
                dcp.save({"model": model.state_dict()}, checkpoint_id="ckpt")
                truth["tensors"] = [r for r in truth["tensors"] if r["state"] in ("param", "buffer")]
            else:
                save_rank_files(model.state_dict(), optimizer.state_dict(), rank, case["world"])
    else:
        truth["tensors"] = records(model, optimizer)
        truth["layout"]["optimizer_index"] = [name for name, _ in model.named_parameters()]
        save(case, model, optimizer, rank)
    if rank == 0:
        pathlib.Path("expected.json").write_text(json.dumps(truth, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def make(folder, case):
    """Writes folder/ckpt and folder/expected.json."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(worker, (case, os.path.abspath(folder), os.path.join(scratch, "store")), nprocs=case["world"])


SMALL = {"words": 11, "width": 6, "inner": 8, "layers": 1, "dtype": "float32", "optimizer": "sgd", "steps": 2, "seed": 7}
SAMPLES = {
    # Tensor parallelism inside of FSDP2: _StridedShard; words do not divide evenly.
    "dcp_strided": {**SMALL, "kind": "dcp", "world": 4, "mesh": [2, 2], "axes": ["dp", "tp"], "words": 12},
    # Every rank has its own metadata.
    "dcp_rank_metadata": {**SMALL, "kind": "dcp", "world": 2, "mesh": [2], "axes": ["dp"], "collectives": False,
                          "dtype": "bfloat16"},
    "rank_files_strided": {**SMALL, "kind": "rank_files", "world": 4, "mesh": [2, 2], "axes": ["dp", "tp"], "words": 12},
    "flat": {**SMALL, "kind": "flat", "world": 2, "optimizer": "adamw"},
    "dcp_flat": {**SMALL, "kind": "flat", "world": 3, "inside_dcp": True},
}

if __name__ == "__main__":
    for sample in sys.argv[2:] or SAMPLES:
        make(os.path.join(sys.argv[1], sample), SAMPLES[sample])
