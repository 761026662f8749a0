"""Data-parallel PyTorch (DDP, gloo, AdamW, CPU) that may be killed at any moment: run it again, and
it goes on from the newest committed step, bit for bit, also on another number of ranks.

    HOLDFAST_ROOT=/data/checkpoints torchrun --nproc-per-node 2 examples/torch_ddp.py [STEPS]
"""
import os
import sys

import torch
from torch import distributed, nn

import holdfast.torch

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
distributed.init_process_group("gloo")
torch.manual_seed(distributed.get_rank())  # data of its own; DDP spreads rank 0's model
model = nn.parallel.DistributedDataParallel(
    nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Dropout(0.1),
                  nn.Linear(256, 64)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)

with holdfast.torch.Checkpointer(model, optimizer, scheduler=scheduler, every=10,
                                 job=os.environ.get("HOLDFAST_JOB", "torch_ddp")) as checkpointer:
    holdfast.torch.watch(model)  # gloo has no profiler plugin
    resumed = checkpointer.restore()
    step = resumed.step if resumed else 0
    print(f"begins at step {step}", flush=True)
    while step < steps:
        data = torch.randn(32, 64)
        loss = nn.functional.mse_loss(model(data), data.flip(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        step += 1
        checkpointer.after_step(step)
        print(f"step {step} loss {loss.item().hex()}", flush=True)
    checkpointer.commit(step)
distributed.destroy_process_group()
