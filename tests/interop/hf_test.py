"""Hugging Face folders that transformers writes here and now are to holdfast what the model held; what `export` makes of
them and of a training state, transformers and safetensors load: the same, and the same logits.

    hf_test.py HOLDFAST [SEED]
"""

import pathlib
import random
import sys
import tempfile

import safetensors
import torch
import transformers

import truth

SHARDS = ("5GB", "1KB")


def draw(rng, family):
    heads = rng.choice((2, 4))
    width = heads * rng.choice((4, 8))  # torch multiplies experts only if rows are multiples of 16 bytes
    common = {"vocab_size": rng.randrange(40, 90), "max_position_embeddings": 32, "hidden_size": width,
              "intermediate_size": rng.randrange(2, 5) * 8, "num_hidden_layers": rng.choice((1, 2)),
              "num_attention_heads": heads, "num_key_value_heads": heads // 2,
              "tie_word_embeddings": rng.random() < 0.5}
    if family == "gpt2":
        return transformers.GPT2Config(vocab_size=common["vocab_size"], n_positions=32, n_embd=width, n_head=heads,
                                       n_layer=common["num_hidden_layers"])
    if family == "llama":
        return transformers.LlamaConfig(**common)
    return transformers.MixtralConfig(**common, num_local_experts=4)


def logits(model, words):
    with torch.no_grad():
        return model.eval()(torch.arange(12).remainder(words).view(2, 6)).logits


def written_tensors(folder):
    """As the official library reads them."""
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        with safetensors.safe_open(shard, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def check_loads(model, folder):
    again = type(model).from_pretrained(folder, dtype=model.dtype)
    words = model.config.vocab_size
    if not torch.equal(logits(model, words), logits(again, words)):
        raise AssertionError(f"{folder.name}: transformers computes other logits")
    return len(list(folder.glob("*.safetensors")))


def check(holdfast, rng, family, folder):
    torch.manual_seed(rng.randrange(10**6))
    model = transformers.AutoModelForCausalLM.from_config(draw(rng, family))
    model = model.to(rng.choice((torch.float32, torch.bfloat16)))
    written = folder / "written"
    model.save_pretrained(written, max_shard_size=rng.choice(SHARDS))
    # The truth is the model in memory, and where transformers has other names in files (experts) what the official
    # library reads. Of tied weights it writes one name.
    state, tensors = model.state_dict(), written_tensors(written)
    if not set(tensors) & set(state):
        raise AssertionError(f"expected the names of the model in the files, found {sorted(tensors)}")
    inspected = holdfast.expect(written, [truth.record(name, "param", state.get(name, tensors[name])) for name in tensors],
                                aliases=[truth.record(name, "param", state[name]) for name in set(state) - set(tensors)])
    if inspected["format"] != "hf":
        raise AssertionError(f"expected the format hf, found {inspected['format']}")
    counts = set()
    for number, shard_bytes in enumerate(SHARDS):
        out = folder / f"exported{number}"
        holdfast.run("export", written, out, "--shard-bytes", shard_bytes)
        counts.add(check_loads(model, out))
        holdfast.run("diff", written, out)
    if len(counts) == 1:
        raise AssertionError("expected one shard, and several")
    # A training state of torch.save, exported beside the model's configuration.
    state = folder / "training.pt"
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()(torch.zeros((1, 4), dtype=torch.int64)).logits.float().sum().backward()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, state)
    holdfast.run("export", state, folder / "from_state", "--model", written)
    check_loads(model, folder / "from_state")
    return len(inspected["tensors"])


def main():
    holdfast = truth.Holdfast(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**9)
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for family in ("gpt2", "llama", "mixtral"):
            folder = pathlib.Path(scratch, family)
            folder.mkdir()
            print(f"{family}: {check(holdfast, rng, family, folder)} tensors", flush=True)


if __name__ == "__main__":
    main()
