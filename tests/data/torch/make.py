#!/usr/bin/env python3
"""Writes the samples of this folder with torch itself (2.13.0), and expected.json: every tensor as it was in memory, by the
names that converter/torch_reader.h gives. Usage: make.py [OUT]"""

import argparse
import collections
import hashlib
import json
import pathlib
import sys

import torch

OUT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)


def record(name, state, tensor):
    flat = tensor.detach().contiguous().resolve_conj().resolve_neg().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return {"name": name, "state": state, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
            "sha256": hashlib.sha256(data).hexdigest()}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(13, 5)
        self.head = torch.nn.Linear(5, 13)
        self.head.weight = self.emb.weight
        self.norm = torch.nn.BatchNorm1d(5)

    def forward(self, ids):
        return self.head(self.norm(self.emb(ids)))


def training():
    net = torch.nn.DataParallel(Net())  # names begin with module.
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.01)
    for step in range(2):
        ids = torch.arange(step, step + 8) % 13
        torch.nn.functional.cross_entropy(net(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    average = collections.OrderedDict((k, v.double() * 0.5) for k, v in net.state_dict().items())
    whole = {"model": net.state_dict(), "model_ema": average, "optimizer": optimizer.state_dict(), "global_step": 2,
             "rng": {"torch": torch.get_rng_state()[:64].clone()}, "args": argparse.Namespace(lr=0.01), "loss": torch.tensor(0.25)}
    expected = [record(k.removeprefix("module."), "param", v) for k, v in net.state_dict().items()]
    expected += [record(k.removeprefix("module."), "ema", v) for k, v in average.items()]
    for name, parameter in net.named_parameters():
        expected += [record(name.removeprefix("module."), key, v) for key, v in optimizer.state[parameter].items()]
    expected += [record("rng.torch", "rng", whole["rng"]["torch"]), record("loss", "other", whole["loss"])]
    return whole, expected


def tensors():
    torch.manual_seed(7)
    base = torch.randn(6, 7)
    complex_base = torch.randn(3, 4, dtype=torch.complex64)
    whole = {"base": base, "columns": base.t()[1:4], "stepped": base[::2, 1::3], "expanded": base[0, :3].expand(2, 3),
             "conjugated": complex_base.conj(), "plain": complex_base, "negative": complex_base.clone().conj().imag,
             "bf16": base.to(torch.bfloat16), "fp8": base.to(torch.float8_e4m3fn), "u32": torch.arange(5).to(torch.uint32),
             "flag": base > 0, "zero_d": torch.tensor(3, dtype=torch.int64), "empty": torch.empty(0, 4),
             "parameter": torch.nn.Parameter(base[1].clone()), "nested": [{"deep": torch.ones(2)}, (torch.zeros(1),)]}
    expected = [record(k, "param" if k == "parameter" else "tensor", v) for k, v in whole.items() if k != "nested"]
    expected += [record("nested.0.deep", "tensor", torch.ones(2)), record("nested.1.0", "tensor", torch.zeros(1))]
    return whole, expected


def main():
    torch.manual_seed(1)
    table = {}
    for name, make, options in (("training.pt", training, {}), ("tensors.pt", tensors, {}),
                                ("tensors_protocol4.pt", tensors, {"pickle_protocol": 4}),
                                ("tensors_old.pt", tensors, {"_use_new_zipfile_serialization": False})):
        whole, expected = make()
        torch.save(whole, OUT / name, **options)
        table[name] = expected
    with open(OUT / "expected.json", "w", encoding="utf-8") as file:
        json.dump(table, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
