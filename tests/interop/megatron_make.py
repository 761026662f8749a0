"""A world of Megatron-core on the CPU: a small GPT with DistributedOptimizer that trains, saves in Megatron's formats by
Megatron's own functions, and resumes. Ranks are processes that this one forks, over gloo.

What is shimmed is devices alone: "cuda" is the CPU, streams are nothing, the device's random generator is the CPU's.
"""

import argparse
import contextlib
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import traceback
import types

import torch
import torch._dynamo  # it lists torch's functions while loading: before they are replaced
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
ITERATION = 3


class OnCpu(TorchFunctionMode):
    """device="cuda" means the CPU."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return CPU if "cuda" in str(args[0]) else func(*args, **kwargs)
        if "cuda" in str(kwargs.get("device", "")):
            kwargs = dict(kwargs, device=CPU)
        return func(*args, **kwargs)


class Stream:
    def __init__(self, *_, **__):
        pass

    def wait(self, *_, **__):
        pass

    wait_stream = wait_event = synchronize = record = wait

    def record_event(self, *_):
        return Stream()


def shim_devices():
    OnCpu().__enter__()
    cuda = torch.cuda

    def nothing(*_, **__):
        return None

    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0)
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda *_: Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.set_device = cuda.set_stream = cuda.synchronize = cuda.empty_cache = nothing
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda self, *_, **__: self
    type_of = torch.Tensor.type
    # Megatron's optimizers sort parameters by this text.
    torch.Tensor.type = lambda self, *a, **k: type_of(self, *a, **k) if a or k else re.sub(
        r"^torch\.(cuda\.)*", "torch.cuda.", type_of(self))
    torch.compile = lambda f=None, **_: f if f else (lambda g: g)
    barrier = dist.barrier
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)
    from megatron.core.safe_globals import register_safe_globals
    register_safe_globals()
    torch.serialization.add_safe_globals([getattr])  # by which Python 3.11.2 pickles members of enums
    from megatron.core.tensor_parallel import random as tp_random
    tp_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    from megatron.core.transformer.moe import moe_utils
    moe_utils.te_general_gemm = None  # 0.16.1 does not define it where TransformerEngine is absent


def build(case, seed):
    """The model chunks of this rank's stage, and their optimizer."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    activation = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu} if case["gated"] else {}
    experts = {"num_moe_experts": case["experts"], "moe_ffn_hidden_size": case["ffn"], "moe_router_topk": 2,
               "moe_token_dispatcher_type": "allgather", "moe_router_load_balancing_type": "none",
               "expert_model_parallel_size": case.get("ep", 1)} if case.get("experts") else {}
    config = TransformerConfig(
        num_layers=case["layers"], hidden_size=case["hidden"], num_attention_heads=4, num_query_groups=2,
        ffn_hidden_size=case["ffn"], use_cpu_initialization=True, bf16=True, params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16, add_bias_linear=case["bias"], attention_dropout=0.0, hidden_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=case.get("pp", 1), virtual_pipeline_model_parallel_size=case.get("vpp"),
        num_layers_in_first_pipeline_stage=case.get("first"), mtp_num_layers=case.get("mtp"),
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        normalization="LayerNorm" if case["bias"] else "RMSNorm", **activation, **experts)
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False,
                                    normalization=config.normalization)
    # Of multi-token prediction.
    more = {"mtp_block_spec": get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)} if case.get("mtp") else {}
    chunks = []
    for number in range(case.get("vpp") or 1):
        place = {"vp_stage": number} if case.get("vpp") else {}
        model = GPTModel(config, spec, vocab_size=case["words"], max_sequence_length=8, position_embedding_type="rope",
                         share_embeddings_and_output_weights=case["tied"],
                         pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **place),
                         post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **place), **place, **more)
        model.bfloat16()
        chunks.append(DistributedDataParallel(
            config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True,
                                                  overlap_grad_reduce=False), model, disable_bucketing=number > 0))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.01, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16,
                        use_distributed_optimizer=True, clip_grad=1.0), chunks)
    return chunks, optimizer


def train(case, chunks, optimizer, seed, steps):
    from megatron.core.distributed import finalize_model_grads
    (model,) = chunks
    generator = torch.Generator().manual_seed(seed)
    loss = None
    for _ in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        words = torch.randint(0, case["words"], (2, 8), generator=generator)
        places = torch.arange(8).expand(2, 8)
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
        loss = model(words, places, mask, labels=words.roll(1, 1)).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
    return loss.item()


def arguments(case):
    """What of Megatron-LM's arguments says how tensors are laid out, and something that is a class."""
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    return argparse.Namespace(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None, expert_model_parallel_size=1,
        expert_tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(), context_parallel_size=1,
        num_layers=case["layers"], hidden_size=case["hidden"], num_attention_heads=4, group_query_attention=True,
        num_query_groups=2, swiglu=case["gated"], untie_embeddings_and_output_weights=not case["tied"],
        transformer_impl="local", use_distributed_optimizer=True, overlap_grad_reduce=False, ddp_bucket_size=None,
        params_dtype=torch.bfloat16, model_type=ModelType.encoder_or_decoder, num_experts=case.get("experts"),
        moe_layer_freq=1)


FULLY = "fully_reshardable"


def content(loading=False, kind=FULLY):
    from megatron.core import parallel_state
    said = {"distrib_optim_sharding_type": kind, "singleton_local_shards": False,
            "distrib_optim_fully_reshardable_mem_efficient": False, "chained_optim_avoid_prefix": True}
    group = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return dict(said, **group) if loading else said


def sharded(chunks, optimizer, is_loading, kind=FULLY):
    (model,) = chunks
    state = {"model": model.module.sharded_state_dict(metadata=content(True, kind))}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=content(True, kind))
    return state


def save_dist(case, chunks, optimizer, folder, kind=FULLY):
    """torch_dist, as Megatron-LM's save_checkpoint writes it, with this form of the optimizer's states."""
    from megatron.core import dist_checkpointing
    place = pathlib.Path(folder, f"iter_{ITERATION:07d}")
    place.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = {"args": arguments(case), "checkpoint_version": 3.0, "iteration": ITERATION,
             **sharded(chunks, optimizer, False, kind), "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 2**70}}
    dist_checkpointing.save(state, str(place), ("torch_dist", 1), content_metadata=content(kind=kind))
    tracker(folder)


def save_legacy(case, chunks, optimizer, folder):
    """The legacy format, likewise."""
    from megatron.core import parallel_state
    (model,) = chunks
    place = legacy_place(folder, f"iter_{ITERATION:07d}")
    place.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    optimizer.save_parameter_state(str(place / "distrib_optim.pt"))
    if parallel_state.get_data_parallel_rank() == 0:
        torch.save({"args": arguments(case), "checkpoint_version": 3.0, "iteration": ITERATION,
                    "model": model.module.state_dict_for_save_checkpoint(), "optimizer": optimizer.state_dict(),
                    "opt_param_scheduler": {"max_lr": 0.01, "num_steps": 2**70}}, place / "model_optim_rng.pt")
    tracker(folder)


def legacy_place(folder, iteration):
    """What get_checkpoint_name of Megatron-LM's checkpointing.py says."""
    from megatron.core import parallel_state as state
    name = f"mp_rank_{state.get_tensor_model_parallel_rank():02d}"
    if state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{state.get_pipeline_model_parallel_rank():03d}"
    if state.get_expert_model_parallel_world_size() > 1:
        name += f"_{state.get_expert_model_parallel_rank():03d}"
    return pathlib.Path(folder, iteration, name)


def tracker(folder):
    if dist.get_rank() == 0:
        pathlib.Path(folder, "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    dist.barrier()


def prepare_to_load(optimizer):
    """Without apex 0.16.1 cannot load its own files: an optimizer that never stepped has no `step`, and none comes with the
    states. So one step is taken before, and the step that load_state_dict has restored from the groups is kept."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        each._init_optimizer_states_with_dummy_values()

        def put(param, tensors, each=each, put=each._set_main_param_and_optimizer_states):
            group, order = each.model_param_group_index_map[param]
            main = each.optimizer.param_groups[group]["params"][order]
            put(param, dict(tensors, step=each.optimizer.state[main]["step"]))
        each._set_main_param_and_optimizer_states = put


def load_dist(chunks, optimizer, folder):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    prepare_to_load(optimizer)
    place = str(pathlib.Path(folder, f"iter_{ITERATION:07d}"))
    # What is missing, or there without being asked for, is an error.
    state = dist_checkpointing.load(sharded(chunks, optimizer, True), place, strict=StrictHandling.RAISE_ALL)
    chunks[0].module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def load_legacy_weights(chunks, folder):
    latest = pathlib.Path(folder, "latest_checkpointed_iteration.txt").read_text()
    place = legacy_place(folder, latest if latest == "release" else f"iter_{int(latest):07d}")
    state = torch.load(place / "model_optim_rng.pt", weights_only=True)
    for number, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state["model" if len(chunks) == 1 else f"model{number}"])
    return state, place


def load_legacy(chunks, optimizer, folder):
    prepare_to_load(optimizer)
    state, place = load_legacy_weights(chunks, folder)
    optimizer.load_state_dict(state["optimizer"])
    optimizer.load_parameter_state(str(place / "distrib_optim.pt"))
    return state


def held(chunks, optimizer):
    """What this rank holds by the names of the whole model: {name: {"param": the tensor, state: (where the part begins, its
    elements)}}."""
    from megatron.core import parallel_state
    found, names = {}, {}
    for chunk in chunks:
        model = chunk.module
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        experts = (model.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
        first = parallel_state.get_expert_model_parallel_rank() * experts
        for name, parameter in model.named_parameters():
            name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda number: str(layers[int(number[0])]), name)
            name = re.sub(r"(?<=\.local_experts\.)\d+", lambda number: str(first + int(number[0])), name)
            names[parameter] = name
            found[name] = {"param": parameter.detach().clone()}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in each.model_param_gbuf_map:
            group, order = each.model_param_group_index_map[parameter]
            main = each.optimizer.param_groups[group]["params"][order]
            begin = each._get_model_param_range_map(parameter)["param"].start
            for state, tensor in {"fp32": main, **each.optimizer.state[main]}.items():
                if state != "step":
                    found[names[parameter]][state] = (begin, tensor.detach().reshape(-1).clone())
    return found


def snapshot(chunks, optimizer):
    """Everything that this rank holds, in its own layout."""
    (model,) = chunks
    found = {f"model {name}": p.detach().clone() for name, p in model.named_parameters()}
    for o, each in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        for g, group in enumerate(each.optimizer.param_groups):
            for i, main in enumerate(group["params"]):
                found[f"{o} {g} {i} main"] = main.detach().clone()
                found.update({f"{o} {g} {i} {key}": value.clone() for key, value in each.optimizer.state[main].items()
                              if torch.is_tensor(value)})
            found[f"{o} {g}"] = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "wd_mult", "lr_mult")}
    return found


def world(case, ranks, work, *arguments_of_work):
    """work(*arguments) in `ranks` processes, parallel as the case says; what each returned, by rank."""
    with tempfile.TemporaryDirectory() as scratch:
        children = {}
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    torch.save(enter(case, ranks, rank, scratch, work, arguments_of_work), f"{scratch}/found{rank}")
                    code = 0
                except BaseException:
                    print(f"rank {rank}:\n{traceback.format_exc()}", flush=True)
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            children[child] = rank
        failed = []
        while children:
            child, status = os.wait()
            if child not in children:
                continue
            rank = children.pop(child)
            if status != 0:
                failed.append(rank)
                for other in children:  # they wait for this one
                    os.kill(other, 15)
        assert not failed, f"ranks that failed: {failed}"
        return [torch.load(f"{scratch}/found{rank}", weights_only=False) for rank in range(ranks)]


def enter(case, ranks, rank, scratch, work, arguments_of_work):
    from megatron.core import parallel_state
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case["tp"], pipeline_model_parallel_size=case.get("pp", 1),
        virtual_pipeline_model_parallel_size=case.get("vpp"), expert_model_parallel_size=case.get("ep", 1))
    found = work(case, *arguments_of_work)
    dist.barrier()
    for left in multiprocessing.active_children():  # servers of queues, which Megatron's writers leave behind
        left.kill()
        left.join()
    return found
