"""What holdfast writes for other parallelism than of data (`--format deepspeed --to tp=..,pp=..,ep=..`) and for Muon,
DeepSpeed resumes from: a model that an mpu splits, a PipelineModule with a tied embedding, DeepSpeed's experts. What was
loaded is what was trained, bit for bit; in the source's own layout training goes on with the loss that DeepSpeed's own
checkpoint gives, and ds_to_universal makes the same of both.

    deepspeed_parallel_test.py HOLDFAST [SEED [COUNT]]

With COUNT so many of the cases, drawn from the seed.
"""

import itertools
import json
import math
import pathlib
import re
import shutil

import deepspeed_make as maker
import torch
import torch.distributed as dist
import truth
from torch import nn

VOCAB, HIDDEN, FFN = 12, 6, 8
EXPERTS = 4
LAYOUT = {"rules": [{"parameters": "up\\.", "cut": 0}, {"parameters": "down\\.weight", "cut": 1},
                    {"parameters": "", "cut": "replicated"}]}
# Source, target, options of the conversion. `compare`: what ds_to_universal makes of both. `format`: ucp is loaded with
# load_universal.
CASES = [
    (dict(kind="pipe", pp=2), dict(kind="pipe", pp=2), dict(compare=True)),
    (dict(kind="pipe", pp=2), dict(kind="pipe", pp=1), {}),
    (dict(kind="pipe", pp=1), dict(kind="pipe", pp=2), dict(layout={"pipeline": {"tied": {"embed": [0, 6]}}})),
    (dict(kind="split", tp=2), dict(kind="split", tp=2), dict(compare=True)),
    (dict(kind="split", tp=2, stage=2), dict(kind="split", tp=1), {}),
    (dict(kind="split", tp=1, stage=2), dict(kind="split", tp=2, stage=2), dict(layout=LAYOUT)),
    (dict(kind="split", tp=2), dict(kind="split", tp=2), dict(format="ucp")),
    (dict(kind="split", tp=1, stage=2), dict(kind="split", tp=2), dict(format="ucp", layout=LAYOUT)),
    (dict(kind="moe", ep=2, stage=2), dict(kind="moe", ep=2, stage=2), {}),
    (dict(kind="moe", ep=2), dict(kind="moe", ep=1, stage=2), {}),
    (dict(kind="muon", stage=2), dict(kind="muon", stage=2), {}),
    (dict(kind="muon", stage=2), dict(kind="muon", stage=1), {}),
]
CUT = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
INFO = {  # the client state that a job of this kind saves
    "moe": None, "muon": None,
    "split": {"universal_checkpoint_version": 0.4, "tp_replicated_parameter_patterns": [r"(embed|norm)\..*", r"down\.bias"],
              "parameter_with_row_parallelism_patterns": [r"down\.weight"]},
    "pipe": {"universal_checkpoint_version": 0.4, "pipeline_replicated_parameter_patterns": [r"tied_modules\.embed\.weight"]},
}


class Grid:
    """The mpu of a job whose tensor-parallel ranks are neighbours."""

    def __init__(self, tp):
        self.tp, self.rank = tp, dist.get_rank()
        world = dist.get_world_size()
        groups = {(axis, i): dist.new_group(ranks) for axis, i, ranks in itertools.chain(
            (("tp", d, list(range(d * tp, d * tp + tp))) for d in range(world // tp)),
            (("dp", t, list(range(t, world, tp))) for t in range(tp)))}
        self.tp_group, self.dp_group = groups["tp", self.rank // tp], groups["dp", self.rank % tp]

    def get_model_parallel_rank(self):
        return self.rank % self.tp

    def get_model_parallel_world_size(self):
        return self.tp

    def get_model_parallel_group(self):
        return self.tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self):
        return self.rank // self.tp

    def get_data_parallel_world_size(self):
        return dist.get_world_size() // self.tp

    def get_data_parallel_group(self):
        return self.dp_group


class Spread(torch.autograd.Function):
    """The same forward, a sum over the tensor-parallel ranks backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class Sum(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Split(nn.Module):
    """A gated column and a row of linear layers, each rank with its part of them."""

    def __init__(self, grid):
        super().__init__()
        self.grid = grid
        self.embed, self.norm = nn.Embedding(VOCAB, HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        for name, dimension in CUT.items():
            layer, kind = name.split(".")
            whole = getattr(getattr(self, layer), kind).detach()
            shard = whole.chunk(grid.tp, dimension)[grid.get_model_parallel_rank()].clone()
            setattr(getattr(self, layer), kind, nn.Parameter(shard))

    def forward(self, ids):
        x = self.embed(ids[:, :-1])
        y = torch.tanh(self.up(Spread.apply(self.norm(x), self.grid.tp_group)))
        x = x + Sum.apply(y @ self.down.weight.t(), self.grid.tp_group) + self.down.bias
        return nn.functional.cross_entropy((x @ self.embed.weight.t()).float().flatten(0, 1), ids[:, 1:].flatten())


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, HIDDEN) * 0.1)

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN))

    def forward(self, x):
        return x + self.scale.to(x.dtype) * self.down(torch.tanh(self.up(x)))


def unembed(module, x):
    return x @ module.weight.t()


def double(x):
    return x * 2


def pipe_loss(logits, labels):
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def pipeline(stages):
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    layers = [TiedLayerSpec("embed", Embed), LayerSpec(Mlp, FFN), LayerSpec(Mlp, 2 * FFN), double, LayerSpec(Mlp, FFN),
              LayerSpec(nn.LayerNorm, HIDDEN), TiedLayerSpec("embed", Embed, forward_fn=unembed)]
    return PipelineModule(layers, num_stages=stages, loss_fn=pipe_loss)


class Experts(nn.Module):
    """Two layers of DeepSpeed's experts."""

    def __init__(self, ep):
        from deepspeed.moe.layer import MoE
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(
            MoE(HIDDEN, Mlp(width), num_experts=EXPERTS, ep_size=ep, k=1, use_rts=False, min_capacity=1, capacity_factor=2.0)
            for width in (FFN, 5))

    def forward(self, ids):
        x = self.embed(ids[:, :-1])
        for block in self.blocks:
            x = x + block(x)[0]
        return nn.functional.cross_entropy((x @ self.embed.weight.t()).float().flatten(0, 1), ids[:, 1:].flatten())


class Plain(nn.Module):
    """Matrices for Muon, the rest for its Adam."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, HIDDEN), nn.LayerNorm(HIDDEN)
        self.blocks = nn.ModuleList(Mlp(width) for width in (FFN, 5))
        for name, parameter in self.named_parameters():
            parameter.use_muon = parameter.dim() == 2 and name.startswith("blocks.")

    def forward(self, ids):
        x = self.embed(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy((self.norm(x) @ self.embed.weight.t()).float().flatten(0, 1),
                                           ids[:, 1:].flatten())


def global_names(engine):
    """Of what is not called the same on every rank: experts."""
    from deepspeed.utils import groups
    names = {}
    for prefix, module in engine.module.named_modules():
        if hasattr(module, "expert_group_name"):
            first = groups._get_expert_parallel_rank(module.expert_group_name) * module.num_local_experts
            for name, _ in itertools.chain(module.named_parameters(), module.named_buffers()):
                found = re.match(r"(.*\.deepspeed_experts\.)(\d+)(\..*)", name)
                if found:
                    names[f"{prefix}.{name}"] = f"{prefix}.{found[1]}{int(found[2]) + first}{found[3]}"
    return names


def build(case, seed, universal=False):
    """The engine, and where in the job this rank is: stage, tensor-parallel rank, data-parallel rank."""
    import deepspeed
    torch.manual_seed(seed)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "bf16": {"enabled": True},
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
              "zero_optimization": {"stage": case.get("stage", 1)}}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    arguments = {}
    kind = case["kind"]
    if kind == "pipe":
        model = pipeline(case["pp"])
    elif kind == "split":
        grid = Grid(case["tp"])
        model, arguments = Split(grid), {"mpu": grid}
    else:
        model = Experts(case["ep"]) if kind == "moe" else Plain()
    groups = [{"params": list(model.parameters()), "name": "all"}]
    if kind == "moe":
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    if kind == "muon":
        config["optimizer"] = {"type": "Muon", "params": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01}}
        arguments["model_parameters"] = model.parameters()
    else:
        arguments["optimizer"] = maker.OPTIMIZERS["adamw"](groups)
    engine = deepspeed.initialize(model=model, config=config, **arguments)[0]
    if kind == "pipe":
        return engine, (engine.grid.get_stage_id(), 0, engine.grid.get_data_parallel_id())
    if kind == "split":
        return engine, (0, grid.get_model_parallel_rank(), grid.get_data_parallel_rank())
    return engine, (0, 0, dist.get_rank())


def train(engine, case, at, seed, steps):
    generator = torch.Generator().manual_seed(1000 * seed + at[2])
    loss = None
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (2, 7), generator=generator)
        if case["kind"] == "pipe":
            loss = engine.train_batch(data_iter=iter([(ids[:, :-1], ids[:, 1:])]))
        else:
            loss = engine(ids)
            engine.backward(loss)
            engine.step()
    return float(loss)


def dump(engine, at, scratch):
    names = global_names(engine)

    def named(of):
        return {names.get(name, name): value for name, value in of}

    def partition(group):
        return dist.get_rank(group=engine.optimizer.real_dp_process_group[group])

    torch.save({"at": at, "step": engine.global_steps, "pieces": named(maker.pieces_of(engine, partition).items()),
                "params": named((n, p.detach().clone()) for n, p in engine.module.named_parameters()),
                "buffers": named((n, b.clone()) for n, b in engine.module.named_buffers())},
               f"{scratch}/dump{dist.get_rank()}")


def make(rank, case, seed, scratch):
    maker.enter(rank, case, scratch)
    engine, at = build(case, seed)
    train(engine, case, at, seed, steps=3)
    info = INFO[case["kind"]]
    engine.save_checkpoint(f"{scratch}/ckpt", client_state={"universal_checkpoint_info": info} if info else {})
    dump(engine, at, scratch)
    maker.leave()


def resume(rank, case, seed, folder, is_universal, scratch):
    maker.enter(rank, case, scratch)
    engine, at = build(case, seed + 7, is_universal)  # other weights, until it loads
    loaded, _ = engine.load_checkpoint(folder)
    assert loaded is not None
    dump(engine, at, scratch)
    loss = train(engine, case, at, seed + 1, steps=2)
    pathlib.Path(scratch, f"loss{rank}").write_text(json.dumps(loss))
    maker.leave()


def whole(scratch):
    """{(name, state): tensor} of all ranks together; replicas are the same."""
    shards, pieces = {}, {}
    for path in sorted(scratch.glob("dump*")):
        rank = torch.load(path, weights_only=False)
        assert rank["step"] == 3, rank["step"]
        stage, tp, dp = rank["at"]
        for state in ("params", "buffers"):
            for name, tensor in rank[state].items():
                known = shards.setdefault((name, state), {}).setdefault(tp, tensor)
                assert torch.equal(known, tensor), f"{name}: replicas differ"
        for name, (shape, first, states) in rank["pieces"].items():
            for state, tensor in states.items():
                pieces.setdefault((name, state, stage, tp), []).append((dp, first, shape, tensor))
    for (name, state, _, tp), parts in pieces.items():
        parts.sort(key=lambda part: part[1])
        shape, tensor = parts[0][2], parts[0][3]
        if tensor.dim() > 0:
            # One rank may have all of it; of Muon's momentum every rank that has any.
            full = [part[3] for part in parts if part[3].numel() == math.prod(shape)]
            assert all(torch.equal(each, full[0]) for each in full), f"{name}, {state}: ranks differ"
            tensor = (full[0] if full else torch.cat([part[3] for part in parts])).view(shape)
        known = shards.setdefault((name, state), {}).setdefault(tp, tensor)
        assert torch.equal(known, tensor), f"{name}, {state}: stages differ"
    found = {}
    for (name, state), by_rank in shards.items():
        parts = [by_rank[tp] for tp in sorted(by_rank)]
        if name in CUT and parts[0].dim() > 0:
            found[name, state] = torch.cat(parts, CUT[name])
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name}, {state}: replicas differ"
            found[name, state] = parts[0]
    return found


def expect_equal(expected, found):
    assert set(expected) == set(found), set(expected) ^ set(found)
    for key, tensor in expected.items():
        # DeepSpeed loads Muon's momentum as float32, whatever it was.
        if key[1] != "momentum_buffer":
            assert tensor.dtype == found[key].dtype, key
        assert torch.equal(tensor.float(), found[key].float()), key


def universal(folder, out):
    """{parameter/state: tensor} of what ds_to_universal makes."""
    maker.ds_to_universal(folder, out)
    found = {}
    for path in sorted((out / "zero").glob("**/*.pt")):
        if path.name != "optimizer_state.pt":
            state = torch.load(path, weights_only=False)
            found[str(path.relative_to(out / "zero"))] = state["param"] if isinstance(state, dict) else torch.as_tensor(state)
    return found


def losses(scratch):
    return [json.loads(path.read_text()) for path in sorted(scratch.glob("loss*"))]


def check(holdfast, source, target, options, seed, folder):
    made = maker.run_world(make, source, seed)
    expected = whole(made)
    dp = 2 // target.get("pp", target.get("tp", 1))
    form = options.get("format", "deepspeed")
    to = f"zero={target.get('stage', 1)}"
    if form == "deepspeed":
        to += f",dp={dp}" + "".join(f",{axis}={target[axis]}" for axis in ("tp", "pp", "ep") if axis in target)
    cuts = []
    if "layout" in options:
        (folder / "layout.json").write_text(json.dumps(options["layout"]))
        cuts = ["--layout-file", folder / "layout.json"]
    holdfast.run("convert", made / "ckpt", folder / "out", "--format", form, "--to", to, *cuts)
    ours = maker.run_world(resume, target, seed, str(folder / "out"), form == "ucp")
    expect_equal(expected, whole(ours))
    if source == target:
        own = maker.run_world(resume, target, seed, str(made / "ckpt"), False)
        assert losses(own) == losses(ours), (losses(own), losses(ours))
        shutil.rmtree(own)
    if options.get("compare"):
        expect_equal(universal(made / "ckpt", folder / "theirs"), universal(folder / "out", folder / "ours"))
    for scratch in (made, ours):
        shutil.rmtree(scratch)


if __name__ == "__main__":
    truth.run_cases(CASES, check)
