"""What `--map` makes of a model of Hugging Face's is Megatron-Core's: the model computes the same logits; and what it makes
of Megatron's, transformers loads: the same tensors, bit by bit. The optimizer's states go there and back. Also torchtitan's
names, and the experts of transformers in memory.

    mapping_test.py HOLDFAST [SEED]
"""

import contextlib
import copy
import pathlib
import random
import sys
import tempfile

import torch
import torch.nn.functional as F
import transformers

import truth

WORDS = 12  # in a prompt


def cpu_megatron():
    """Megatron-Core's models on a CPU: what asks for a device, its random numbers or a kernel of a library that is not there."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    class Tracker:
        def fork(self, *_):
            return contextlib.nullcontext()

    torch.cuda.current_device = lambda: torch.device("cpu")
    tensor_parallel.get_cuda_rng_tracker = lambda *_, **__: Tracker()
    moe_utils.te_general_gemm = None  # 0.16.1 does not define it where TransformerEngine is absent
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def draw(rng, family):
    groups = rng.choice((2, 3))
    heads = groups * (1 if family == "gpt2" else rng.choice((1, 2)))
    common = {"vocab_size": rng.randrange(40, 90), "max_position_embeddings": 32, "hidden_size": heads * 8,
              "intermediate_size": rng.randrange(2, 5) * 8, "num_hidden_layers": rng.choice((2, 3)),
              "num_attention_heads": heads, "num_key_value_heads": groups, "rms_norm_eps": 1e-5,
              "attn_implementation": "eager"}
    if family == "gpt2":
        return transformers.GPT2Config(vocab_size=common["vocab_size"], n_positions=32, n_embd=heads * 8, n_head=heads,
                                       n_layer=common["num_hidden_layers"], attn_implementation="eager")
    if family == "llama":
        return transformers.LlamaConfig(**common, tie_word_embeddings=rng.random() < 0.5)
    return transformers.MixtralConfig(**common, num_local_experts=4)


def megatron_model(config, family, padded_words):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    gated = family != "gpt2"
    shape = TransformerConfig(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads if gated else config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size if gated else 4 * config.hidden_size, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, gated_linear_unit=gated, add_bias_linear=not gated,
        activation_func=F.silu if gated else (lambda x: F.gelu(x, approximate="tanh")),
        normalization="RMSNorm" if gated else "LayerNorm", layernorm_epsilon=1e-5, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
        num_moe_experts=4 if family == "mixtral" else None, moe_token_dispatcher_type="allgather",
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=config.intermediate_size if family == "mixtral" else None)
    spec = get_gpt_layer_local_spec(num_experts=shape.num_moe_experts, moe_grouped_gemm=False,
                                    normalization=shape.normalization)
    return GPTModel(shape, spec, vocab_size=padded_words, max_sequence_length=32,
                    rotary_base=int(config.rope_parameters["rope_theta"]) if gated else 10000,
                    position_embedding_type="rope" if gated else "learned_absolute",
                    share_embeddings_and_output_weights=config.tie_word_embeddings).eval()


def megatron_logits(model, tokens):
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        return model(tokens, torch.arange(length).expand(tokens.shape), mask)


def hf_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def expect_close(name, found, expected):
    if not torch.allclose(found, expected, atol=1e-5, rtol=1e-4):
        raise AssertionError(f"{name}: other logits: {(found - expected).abs().max()} apart")
    if torch.allclose(found, expected.roll(1, 0), atol=1e-5, rtol=1e-4):
        raise AssertionError(f"{name}: the logits tell nothing")


def expect_equal(name, found, expected):
    if set(found) != set(expected):
        raise AssertionError(f"{name}: other names: {sorted(set(found) ^ set(expected))[:4]}")
    for each, tensor in expected.items():
        if not torch.equal(found[each], tensor):
            raise AssertionError(f"{name}: {each} differs")


def check_megatron(holdfast, rng, model, family, folder):
    """Hugging Face -> Megatron -> Hugging Face."""
    words = model.config.vocab_size
    padded = words + rng.randrange(1, 30)
    file = folder / "megatron.pt"
    holdfast.run("convert", folder / "hf", file, "--format", "torch", "--map", f"{family}:megatron-local", "--set",
                 f"padded_vocab={padded}")
    state = torch.load(file, weights_only=True)
    if model.config.tie_word_embeddings and "output_layer.weight" in state:
        if not torch.equal(state.pop("output_layer.weight"), state["embedding.word_embeddings.weight"]):
            raise AssertionError("tied embeddings differ")
    megatron = megatron_model(model.config, family, padded)
    missing, unexpected = megatron.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.endswith("_extra_state")]:
        raise AssertionError(f"Megatron's model: missing {missing}, unexpected {unexpected}")
    tokens = torch.tensor([[rng.randrange(words) for _ in range(WORDS)] for _ in range(2)])
    expected = hf_logits(model, tokens)
    expect_close(family, megatron_logits(megatron, tokens)[..., :words], expected)
    # Other weights, by Megatron's own hand.
    with torch.no_grad():
        for parameter in megatron.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    torch.save({name: tensor for name, tensor in megatron.state_dict().items() if torch.is_tensor(tensor)}, file)
    holdfast.run("export", file, folder / "back", "--map", family, "--model", folder / "hf")
    again = type(model).from_pretrained(folder / "back", attn_implementation="eager")
    expect_close(family, hf_logits(again, tokens), megatron_logits(megatron, tokens)[..., :words])
    return len(state)


def check_training_state(holdfast, model, family, folder):
    """Weights and AdamW's states, as torch.save writes them, to other names and back."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(list(model.named_parameters()))
    for _ in range(2):
        model.train()(torch.arange(WORDS).view(2, -1), labels=torch.arange(WORDS).view(2, -1)).loss.backward()
        optimizer.step()
    state = folder / "training.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, state)
    namings = ["megatron", "megatron-local"]
    if family != "mixtral":
        namings.append("megatron-deepspeed")
    if family == "llama":
        namings.append("titan")
    own = "hf-fused" if family == "mixtral" else "hf"
    for naming in namings:
        there, back = folder / f"to-{naming}.pt", folder / f"from-{naming}.pt"
        holdfast.run("convert", state, there, "--format", "torch", "--map", f"{family}:{naming}", "--model", folder / "hf")
        holdfast.run("convert", there, back, "--format", "torch", "--map", f"{family}:{own}", "--model", folder / "hf")
        holdfast.run("diff", state, back)
        holdfast.run("diff", state, there, codes=(1,))
    # A folder of Megatron's own, which holds masters besides.
    options = ("--map", f"{family}:{own}", "--model", folder / "hf", "--drop", "objects", "--drop", "fp32")
    holdfast.run("convert", state, folder / "torch_dist", "--format", "megatron", "--map", family, "--model", folder / "hf")
    holdfast.run("convert", folder / "torch_dist", folder / "from-torch_dist.pt", "--format", "torch", *options)
    holdfast.run("diff", state, folder / "from-torch_dist.pt")
    found = torch.load(back, weights_only=True)["optimizer"]["state"]
    if {key for each in found.values() for key in each} != {"exp_avg", "exp_avg_sq", "step"}:
        raise AssertionError(f"states of AdamW: {found[0].keys()}")
    # What transformers keeps in memory is written as its files are.
    holdfast.run("export", state, folder / "files", "--map", family, "--model", folder / "hf")
    again = type(model).from_pretrained(folder / "files", attn_implementation="eager")
    expect_equal(family, dict(again.named_parameters()), dict(model.named_parameters()))
    return len(found)


def check_titan(holdfast, model, folder):
    """Meta's order of rows, as transformers' own converter undoes it."""
    holdfast.run("convert", folder / "hf", folder / "titan.pt", "--format", "torch", "--map", "llama:titan")
    found = torch.load(folder / "titan.pt", weights_only=True)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    for name, ours, count in (("q_proj", "wq", heads), ("k_proj", "wk", groups)):
        meta = found[f"layers.1.attention.{ours}.weight"]
        rows, columns = meta.shape
        permuted = meta.view(count, rows // count // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        if not torch.equal(permuted, getattr(model.model.layers[1].self_attn, name).weight):
            raise AssertionError(f"{ours}: other rows")


def main():
    holdfast = truth.Holdfast(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    torch.set_num_threads(1)
    cpu_megatron()
    with tempfile.TemporaryDirectory() as scratch:
        for family in ("gpt2", "llama", "mixtral"):
            folder = pathlib.Path(scratch, family)
            folder.mkdir()
            torch.manual_seed(rng.randrange(10**6))
            model = transformers.AutoModelForCausalLM.from_config(draw(rng, family))
            with torch.no_grad():  # norms and biases are ones and zeros else
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
            model.save_pretrained(folder / "hf")
            tensors = check_megatron(holdfast, rng, model, family, folder)
            states = check_training_state(holdfast, model, family, folder)
            print(f"{family}: {tensors} tensors, {states} parameters with states", flush=True)
            if family == "llama":
                check_titan(holdfast, model, folder)


if __name__ == "__main__":
    main()
