"""Figures of reading and exporting other frameworks' checkpoints: how fast `inspect` is with very many files and with
very much metadata, `export` against cp of the same bytes, and of DCP's shards against PyTorch's own consolidation. The
commands are the user's, start included. Where it is said that neither side syncs, ours runs under eatmydata."""

import json
import os
import pickle
import shutil
import subprocess
import time

import numpy as np
import safetensors.numpy
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties,
                                                   TensorStorageMetadata)

import pairs

MIB = 1 << 20
EXPORT_BYTES = 2048 * MIB
SHARDS = 4


def holdfast(place, *arguments, syncs=True):
    """Seconds, and standard output."""
    command = [] if syncs else ["eatmydata"]
    begun = time.perf_counter()
    done = subprocess.run([*command, place.build / "cli" / "holdfast", *map(str, arguments)], check=True,
                          capture_output=True)
    return time.perf_counter() - begun, done.stdout


def inspect_row(place, name, checkpoint, goal, tensors, note):
    def once():
        seconds, out = holdfast(place, "inspect", checkpoint, "--json")
        found = sum(state["tensors"] for state in json.loads(out)["states"].values())
        if found != tensors:
            raise RuntimeError(f"{name}: expected {tensors} tensors, found {found}")
        return seconds

    return pairs.measure(name, "s", once, goal, note=note)


def many_files(place):
    folder = place.directory / "files"
    state = {"model": {f"layers.{i}.weight": torch.ones(64) for i in range(1000)}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False), no_dist=True)
    return inspect_row(place, "inspect, DCP of 1,000 files", folder, 1, 1000, "one file for each tensor")


def large_metadata(place, ranks=64):
    """A .metadata of at least 100 MB as a training on very many ranks writes it. The data is not there; it is not read."""
    folder = place.directory / "metadata"
    folder.mkdir()
    size, count = 0, 9000
    while size < 100e6:
        tensors, storage, plan = {}, {}, {}
        for i in range(count):
            key = f"model.layers.{i // 12}.attention.part_{i % 12}.weight"
            plan[key] = tuple(key.split(".", 1))
            chunks = [ChunkStorageMetadata(torch.Size((4 * r, 0)), torch.Size((4, 1024))) for r in range(ranks)]
            for r in range(ranks):
                storage[MetadataIndex(key, (4 * r, 0), r)] = _StorageInfo(f"__{r}_0.distcp", 17000 * i, 17000)
            properties = TensorProperties(dtype=torch.float32)
            tensors[key] = TensorStorageMetadata(properties, torch.Size((4 * ranks, 1024)), chunks)
        with open(folder / ".metadata", "wb") as file:
            pickle.dump(Metadata(tensors, plan, storage, None, "1.0.0"), file)
        size, tried = (folder / ".metadata").stat().st_size, count
        count = int(count * 101e6 / size) + 1
    return inspect_row(place, "inspect, DCP metadata of 100 MB", folder, 2, tried,
                       f"{size / 1e6:.0f} MB, {tried * ranks} chunks; what is written in .metadata only")


def random_tensors(shard):
    """Of a shard's bytes: 16 matrices."""
    rows = EXPORT_BYTES // SHARDS // 16 // 4096 // 4
    return {f"layers.{shard}.{i}.weight": np.frombuffer(os.urandom(rows * 4096 * 4), np.float32).reshape(rows, 4096)
            for i in range(16)}


def export(place):
    folder = place.directory / "hf"
    folder.mkdir()
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = random_tensors(shard)
        safetensors.numpy.save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    out = place.directory / "out"

    def cleared(run):
        subprocess.run(["rm", "-rf", out], check=True)
        return EXPORT_BYTES / run() / 1e9

    def ours(syncs):
        return cleared(lambda: holdfast(place, "export", folder, out, "--shard-bytes", EXPORT_BYTES // SHARDS,
                                        syncs=syncs)[0])

    def copy(syncs):
        begun = time.perf_counter()
        subprocess.run(["cp", "-r", "--reflink=never", folder, out], check=True)
        for path in out.iterdir() if syncs else ():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return time.perf_counter() - begun

    ours(True)  # the source is in memory for both

    def against_copy(syncs, words, note):
        return pairs.compare(f"export to a Hugging Face folder, against {words}", "GB/s", lambda: ours(syncs),
                             lambda: cleared(lambda: copy(syncs)), 1.0, note=note)

    found = [against_copy(False, "cp --reflink=never", "neither side syncs"),
             against_copy(True, "cp --reflink=never and fsync", "both durable: ours ends with its fsyncs")]
    subprocess.run(["rm", "-rf", out, folder], check=True)
    return found


def consolidation(place):
    """Every tensor cut by rows over 4 ranks, as HuggingFaceStorageWriter(save_distributed=True) leaves them, made whole."""
    folder, out = place.directory / "shards", place.directory / "whole"
    folder.mkdir()
    parts, file_of = [{} for _ in range(SHARDS)], {}
    for shard in range(SHARDS):
        for name, tensor in random_tensors(shard).items():
            file_of[name] = shard + 1
            for rank, part in enumerate(np.array_split(tensor, SHARDS)):
                parts[rank][name] = part
        for rank in range(SHARDS):
            offsets = {name: {"saved_offsets": [len(part) * rank, 0]} for name, part in parts[rank].items()}
            path = folder / f"shard-{rank + 1:05}-model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
            safetensors.numpy.save_file({name: np.ascontiguousarray(part) for name, part in parts[rank].items()}, path,
                                        {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"})
            parts[rank].clear()

    def ours(syncs=False):
        subprocess.run(["rm", "-rf", out], check=True)
        return EXPORT_BYTES / holdfast(place, "export", folder, out, "--shard-bytes", EXPORT_BYTES // SHARDS,
                                       syncs=syncs)[0] / 1e9

    def theirs():
        subprocess.run(["rm", "-rf", theirs_out], check=True)
        theirs_out.mkdir()
        begun = time.perf_counter()
        consolidate_safetensors_files(str(folder), str(theirs_out), file_of, num_threads=SHARDS)
        return EXPORT_BYTES / (time.perf_counter() - begun) / 1e9

    theirs_out = place.directory / "theirs"
    theirs()
    durable = ours(syncs=True)
    holdfast(place, "diff", out, theirs_out)  # or a mistake would be measured
    row = pairs.compare("DCP's safetensors shards to a Hugging Face folder, against PyTorch's consolidation", "GB/s", ours,
                        theirs, 1.0, note=f"neither side syncs; theirs without Python's start, {SHARDS} threads; "
                                          f"ours durable {durable:.2f} GB/s")
    subprocess.run(["rm", "-rf", out, theirs_out, folder], check=True)
    return row


def rows(place):
    if shutil.which("eatmydata") is None:
        raise RuntimeError("eatmydata is not installed")
    return [many_files(place), large_metadata(place), *export(place), consolidation(place)]
