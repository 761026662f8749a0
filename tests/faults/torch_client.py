"""Runs a PyTorch program as it stands and makes, from outside, what it would do on a device and in
trouble: the second client of the fault runs, which shares no code with the first, is
examples/torch_ddp.py.

    torch_client.py PROGRAM [ARGUMENT...]

Between every forward of a DistributedDataParallel model and its backward it waits for FAULTS_DEVICE_MS,
for what a device would compute. Of the faults in $COLLECTIVES_FAULTS (examples/README.md) it knows `never-enter` and
`slow-compute`, with no other keys than `rank` and `factor`; that one acts is printed as tiny_lm does.
"""
import json
import os
import pathlib
import runpy
import sys
import time

from torch import nn

RANK = int(os.environ["RANK"])
DEVICE_SECONDS = float(os.environ["FAULTS_DEVICE_MS"]) / 1000
FAULTS = pathlib.Path(os.environ["COLLECTIVES_FAULTS"])
told = set()


def acting():
    """The kinds that this rank shall do now, with their keys."""
    found = {}
    for line in FAULTS.read_text(encoding="utf-8").splitlines():
        kind, *pairs = line.split()
        keys = dict(pair.split("=", 1) for pair in pairs)
        if int(keys["rank"]) == RANK:
            found[kind] = keys
    for kind in found.keys() - told:
        told.add(kind)
        print(json.dumps({"event": "fault", "rank": RANK, "kind": kind,
                          "monotonic_ns": time.monotonic_ns()}), flush=True)
    return found


def after_forward(module, _inputs, _output):
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return
    wrong = acting()
    while "never-enter" in wrong:
        time.sleep(3600)
    time.sleep(DEVICE_SECONDS * float(wrong.get("slow-compute", {"factor": 1})["factor"]))


if __name__ == "__main__":
    nn.modules.module.register_module_forward_hook(after_forward)  # of every module
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
