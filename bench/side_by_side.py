"""The same state made durable by what people use today, in one run: every side ends with its bytes
synced to the device. One GiB in 64 float32 tensors."""

import os
import shutil
import subprocess
import time

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import pairs

TENSORS = 64
ELEMENTS = (1 << 30) // 4 // TENSORS


def sync_tree(path):
    """fsync of every file and directory below `path`, and of the directory that holds it."""
    for directory, _, files in os.walk(path):
        for name in files:
            sync(os.path.join(directory, name))
        sync(directory)
    sync(os.path.dirname(path))


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(work):
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def rows(place):
    state = {f"layer.{i}.weight": torch.randn(ELEMENTS) for i in range(TENSORS)}
    size = TENSORS * ELEMENTS * 4
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    job = place.job("side", [(name, tensor.data_ptr(), ELEMENTS * 4)
                             for name, tensor in state.items()])
    target = place.directory / "other"
    step = 0

    def holdfast():
        nonlocal step
        step += 1
        place.remove_checkpoints("side")

        def work():
            job.save(step)
            job.wait_captured()
            job.wait_committed(step)
        return size / timed(work) / 1e9

    def durable(work):
        def once():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()

            def all_of_it():
                work()
                sync_tree(str(target))
            rate = size / timed(all_of_it) / 1e9
            shutil.rmtree(target)
            return rate
        return once

    source = place.directory / "source.bin"
    torch.save(state, source)

    def copy():
        subprocess.run(["cp", "--reflink=never", source, target / "copy.bin"], check=True)

    def asynchronous():
        dcp.async_save(state, checkpoint_id=str(target / "dcp"), no_dist=True).result()

    others = {
        "cp": copy,
        "torch.save": lambda: torch.save(state, target / "state.pt"),
        "safetensors": lambda: save_file(state, target / "state.safetensors"),
        "torch.distributed.checkpoint": lambda: dcp.save(state, checkpoint_id=str(target / "dcp"),
                                                         no_dist=True),
        "torch.distributed.checkpoint, async": asynchronous,
    }
    holdfast()
    result = []
    for name, work in others.items():
        once = durable(work)
        try:
            once()
        except Exception as error:  # a peer that cannot run is reported, never left out in silence
            result.append(pairs.Row(f"durable save against {name}", float("nan"), "GB/s",
                                    note=f"the peer failed: {error}"))
            continue
        result.append(pairs.compare(f"durable save against {name}", "GB/s", holdfast, once, None))
    job.close()
    place.kill_agent()
    return result
