"""Makes DeepSpeed checkpoints with one thing wrong in each, for tests/data/deepspeed_hostile.

    deepspeed_hostile.py OUT

OUT/<case>/ckpt has files with DeepSpeed's names and keys, written by torch.save; OUT/<case>/error.txt has
words that the error must hold, and is empty for the sound ones, from which the others differ in one thing.
"""

import collections
import copy
import pathlib
import shutil
import sys

import torch

OrderedDict = collections.OrderedDict


def sound(stage=2):
    """Two parameters of 6 and 4 elements on two ranks: as plain values, to be broken."""
    whole = torch.arange(12.0)
    model = {
        "module": OrderedDict(), "buffer_names": [], "param_shapes": [OrderedDict(a=(3, 2), b=(4, ))],
        "frozen_param_shapes": {}, "frozen_param_fragments": {}, "shared_params": {}, "global_steps": 3,
        "dp_world_size": 2, "mp_world_size": 1, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"bf16": {"enabled": True}},
    }
    if stage == 3:
        model["module"] = OrderedDict(a=torch.empty(0, dtype=torch.bfloat16), b=torch.empty(0, dtype=torch.bfloat16))
        parts = [torch.cat([whole[0:3], whole[6:8]]), torch.cat([whole[3:6], whole[8:10]])]
        optimizers = [{"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [part],
                       "optimizer_state_dict": {"state": {0: {"m": part.clone()}}, "param_groups": [{"params": [0]}]}}
                      for part in parts]
    else:
        flat = whole.bfloat16()
        model["module"] = OrderedDict(a=flat[:6].view(3, 2), b=flat[6:10])
        optimizers = [{"zero_stage": 2, "partition_count": [2], "group_paddings": [padding],
                       "single_partition_of_fp32_groups": [part],
                       "base_optimizer_state": {"state": {0: {"m": whole[:6].clone()}}, "param_groups": [{"params": [0]}]}}
                      for part, padding in ((whole[:6], 0), (whole[6:10], 2))]
    return {"stage": stage, "models": [model], "optimizers": [optimizers], "latest": "global_step3"}


def tensor_parallel(info):
    """Two tensor-parallel ranks that both have all of it."""
    checkpoint = sound()
    model = checkpoint["models"][0]
    model["mp_world_size"] = 2
    model["checkpoint_parallel_dimensions"]["tp_degree"] = 2
    if info is not None:
        model["universal_checkpoint_info"] = info
    checkpoint["models"].append(copy.deepcopy(model))
    checkpoint["optimizers"].append(copy.deepcopy(checkpoint["optimizers"][0]))
    return checkpoint


def affine(**changes):
    piece = {"shape": [3, 2], "source": [0, [2, 1]], "dest": [0, [2, 1]], "locations": [0, 1], **changes}
    ranks = {r: {"shard_shape": [3, 2], "pieces": [piece]} for r in (0, 1)}
    return tensor_parallel({"tp_replicated_parameter_patterns": ["b"],
                            "affine_map": {"version": 1, "params": {"^a$": {"logical_shape": [3, 2], "ranks": ranks}}}})


def cases():
    """Yields (name, words of the error, checkpoint)."""
    yield "sound_zero2", "", sound()
    yield "sound_zero3", "", sound(3)
    yield "sound_tensor_parallel", "", tensor_parallel({"tp_replicated_parameter_patterns": ["a", "b"]})
    yield "sound_affine", "", affine()

    c = sound()
    c["optimizers"][0][1]["single_partition_of_fp32_groups"] = [torch.zeros(5)]
    yield "partition_too_long", "expected 4 of rank 1", c
    c = sound()
    c["optimizers"][0][0]["single_partition_of_fp32_groups"] = [torch.zeros(4)]
    yield "partitions_too_short", "expected partitions of at least 5", c
    c = sound()
    c["optimizers"][0][1]["single_partition_of_fp32_groups"] = [torch.zeros(4), torch.zeros(2)]
    yield "groups_differ", "data-parallel rank 1: expected stage 2 with 1 groups", c
    c = sound()
    c["models"][0]["param_shapes"].append(OrderedDict(c=(1, )))
    yield "a_group_without_partition", "expected 2 parameter groups", c
    c = sound()
    c["models"][0]["param_shapes"][0]["a"] = (2**62, 2**62)
    yield "shape_overflow", "elements", c
    c = sound()
    c["models"][0]["param_shapes"][0]["a"] = (-3, -2)
    yield "negative_shape", "mp_rank_00_model_states", c
    c = sound()
    c["models"][0]["param_shapes"][0]["a"] = (6, 2)
    yield "shape_of_another_parameter", "expected partitions of at least 8", c
    for count, words in ((0, "found 0"), (3, "found 3"), (2**62, "partition_count")):
        c = sound()
        for rank in c["optimizers"][0]:
            rank["partition_count"] = [count]
        yield f"partition_count_{count}", words, c
    c = sound()
    c["models"][0]["module"] = None
    for rank in c["optimizers"][0]:
        rank["param_alignment_paddings"] = [[2**63 - 1, 0]]
    yield "alignment_overflow", "at most", c
    c = sound()
    c["models"][0]["module"] = None
    for rank in c["optimizers"][0]:
        rank["param_alignment_paddings"] = [[0]]
    yield "alignment_of_other_parameters", "found 1", c
    c = sound()
    flat = torch.arange(12.0).bfloat16()
    c["models"][0]["module"] = OrderedDict(a=flat[:6].view(3, 2), b=flat[4:8])
    yield "views_that_overlap", "overlap", c
    c = sound()
    c["models"][0]["dp_world_size"] = 4
    yield "world_size", "expected files of 4 data-parallel ranks", c
    c = sound()
    c["latest"] = "../../global_step3"
    yield "latest_leads_outside", "there is no such checkpoint", c
    c = sound()
    c["optimizers"][0][1] = []
    yield "no_optimizer_state", "expected a dict with optimizer_state_dict", c
    c = sound(3)
    c["optimizers"][0][1]["fp32_flat_groups"] = [torch.zeros(6)]
    yield "zero3_partition_too_long", "data-parallel rank 1: fp32_flat_groups: expected 5", c
    for count in (0, 2**40):
        c = sound(3)
        for rank in c["optimizers"][0]:
            rank["partition_count"] = count
        yield f"zero3_partition_count_{count}", "partition_count", c
    c = sound(3)
    c["models"][0]["frozen_param_fragments"] = {"f": torch.zeros(3)}
    c["models"][0]["frozen_param_shapes"] = {"g": (4, )}
    yield "fragment_without_shape", "no shape in frozen_param_shapes", c
    yield "tensor_parallel_untold", "does not say how it was cut", tensor_parallel(None)
    yield "tensor_parallel_injected", "does not say how it was cut", tensor_parallel({"universal_checkpoint_version": 0.4})
    yield "pattern_with_look_ahead", "(?=a)", tensor_parallel({"tp_replicated_parameter_patterns": ["(?=a)a"]})
    c = tensor_parallel({"tp_replicated_parameter_patterns": ["a", "b"]})
    c["models"][1]["param_shapes"][0]["a"] = (2, 3)
    c["models"][1]["module"]["a"] = c["models"][1]["module"]["a"].reshape(2, 3)
    yield "replicas_of_other_shapes", "expected equal replicas", c
    yield "affine_outside", "expected it inside of 6 elements", affine(source=[1, [2, 1]])
    yield "affine_overflow", "inside of 6 elements", affine(source=[0, [2**62, 1]])
    yield "affine_scaled", "multiplied by 0.5", affine(scale=0.5)
    yield "affine_twice", "twice", affine(dest=[0, [1, 1]])
    c = tensor_parallel({"tp_replicated_parameter_patterns": ["a", "b"]})
    for model in c["models"]:
        model["checkpoint_parallel_dimensions"] = {"pp_degree": 2, "tp_degree": 1}
    yield "one_name_on_two_stages", "found on 2 pipeline stages", c


def write(checkpoint, out):
    prefix, folder = "bf16_zero_pp_rank", out / "global_step3"
    folder.mkdir(parents=True)
    (out / "latest").write_text(checkpoint["latest"])
    for mp, model in enumerate(checkpoint["models"]):
        names = [f"mp_rank_{mp:02d}_model_states.pt"]
        if checkpoint["stage"] == 3:
            names = [f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt" for dp in (0, 1)]
        for name in names:
            torch.save(model, folder / name)
    for mp, ranks in enumerate(checkpoint["optimizers"]):
        for dp, state in enumerate(ranks):
            torch.save({"optimizer_state_dict": state, "ds_version": "0.19.8"},
                       folder / f"{prefix}_{dp}_mp_rank_{mp:02d}_optim_states.pt")


def main():
    out = pathlib.Path(sys.argv[1])
    shutil.rmtree(out, ignore_errors=True)
    for name, words, checkpoint in cases():
        write(checkpoint, out / name / "ckpt")
        (out / name / "error.txt").write_text(words + "\n" if words else "")


if __name__ == "__main__":
    main()
