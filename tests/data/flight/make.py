#!/usr/bin/env python3
"""Makes the Flight Recorder dumps of this folder: CASE.RANK.pickle, and .json of one case, of four ranks of
real torch.distributed with gloo (made with torch 2.13.0, CPU). Without stack traces: they hold paths.

  clean          three all-reduces and a barrier, all done
  never-entered  rank 2 does not come to the fifth operation
  size           rank 1's fifth all-reduce has another size
  kind           rank 3's fifth operation is a broadcast
  subgroup       beside the default group {0, 2} and {1, 3}: rank 2 does not come to {0, 2}'s second

Usage: make.py DIRECTORY
"""

import os
import pathlib
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C import _distributed_c10d as c10d

RANKS = 4
TRIES = 20


def dump(directory, case, rank):
    pathlib.Path(directory, f"{case}.{rank}.pickle").write_bytes(
        c10d._dump_fr_trace(True, False, False))
    if case == "never-entered":
        pathlib.Path(directory, f"{case}.{rank}.json").write_bytes(
            c10d._dump_fr_trace_json(True, False))


def work(rank, directory, case, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/init", rank=rank,
                            world_size=RANKS)
    store = dist.FileStore(f"{rendezvous}/done", RANKS)
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])] if case == "subgroup" else []
    data = torch.ones(10, 4)
    for _ in range(3):
        dist.all_reduce(data)
    dist.barrier()
    open_work = []
    if case == "subgroup":
        group = pairs[rank % 2]
        dist.all_reduce(data, group=group)
        if rank == 0:
            open_work.append(dist.all_reduce(data, group=group, async_op=True))
    elif case != "clean" and not (case == "never-entered" and rank == 2):
        if case == "kind" and rank == 3:
            open_work.append(dist.broadcast(data, 0, async_op=True))
        else:
            mine = torch.ones(3, 4) if case == "size" and rank == 1 else data
            open_work.append(dist.all_reduce(mine, async_op=True))
    dump(directory, case, rank)
    # Nobody leaves before all have dumped: an operation that loses its peer ends. gloo aborts the
    # process in which sizes do not match.
    store.add("dumped", 1)
    deadline = time.monotonic() + 10
    while int(store.add("dumped", 0)) < RANKS and time.monotonic() < deadline:
        pass
    os._exit(0)


def run(directory, case):
    """Whether all ranks have dumped."""
    dumps = [pathlib.Path(directory, f"{case}.{rank}.pickle") for rank in range(RANKS)]
    for path in dumps:
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as rendezvous:
        spawn = mp.get_context("spawn")
        ranks = [spawn.Process(target=work, args=(rank, directory, case, rendezvous))
                 for rank in range(RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return all(path.exists() and path.stat().st_size for path in dumps)


def main():
    directory, = sys.argv[1:]
    for case in ("clean", "never-entered", "size", "kind", "subgroup"):
        # gloo may abort a process before it has dumped.
        if not any(run(directory, case) for _ in range(TRIES)):
            sys.exit(f"{case}: no dumps of all ranks in {TRIES} tries")


if __name__ == "__main__":
    main()
