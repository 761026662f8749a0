"""The second client of the fault runs, which shares no code with the first: stock PyTorch, data
parallel over gloo, on the CPU. The gradients' all-reduces are told to the monitor
(holdfast.torch.watch); what a device would compute is waited.

    torch_trainer.py DEVICE_MS

Of the faults in $COLLECTIVES_FAULTS (examples/README.md) it knows `never-enter` and `slow-compute`,
with no other keys than `rank` and `factor`. Prints events as tiny_lm does.
"""
import datetime
import json
import os
import pathlib
import sys
import time

import torch
from torch import distributed, nn

import holdfast.torch
from holdfast import monitor

DEVICE_SECONDS = float(sys.argv[1]) / 1000


class Faults:
    """What this rank shall do wrong, read anew before every step."""

    def __init__(self, rank):
        self._rank = rank
        self._path = pathlib.Path(os.environ["COLLECTIVES_FAULTS"])
        self._told = set()

    def read(self, step):
        """The kinds that act now, with their keys."""
        acting = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            kind, *pairs = line.split()
            keys = dict(pair.split("=", 1) for pair in pairs)
            if int(keys["rank"]) == self._rank:
                acting[kind] = keys
        for kind in acting.keys() - self._told:
            say("fault", self._rank, kind=kind, step=step, monotonic_ns=time.monotonic_ns())
        self._told = set(acting)
        return acting


def say(event, rank, **members):
    print(json.dumps({"event": event, "rank": rank, **members}), flush=True)


def main():
    distributed.init_process_group("gloo", timeout=datetime.timedelta(hours=1))
    rank = distributed.get_rank()
    torch.manual_seed(rank)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)))
    holdfast.torch.watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    faults = Faults(rank)
    step = 0
    while True:
        step += 1
        wrong = faults.read(step)
        data = torch.randn(8, 256)
        loss = nn.functional.mse_loss(model(data), data.flip(1))
        time.sleep(DEVICE_SECONDS * float(wrong.get("slow-compute", {"factor": 1})["factor"]))
        while "never-enter" in wrong:
            time.sleep(3600)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step_done(step)
        say("step", rank, step=step, loss=loss.item())


if __name__ == "__main__":
    main()
