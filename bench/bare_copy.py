"""What reading and writing some files takes at least: one after the other through one reused buffer of 8 MiB."""

import mmap
import os
import shutil
import statistics
import time

import pairs

BUFFER_BYTES = 8 << 20
BLOCK_BYTES = 4096  # in which O_DIRECT transfers


def drop_from_cache(files):
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(files, target, direct, durable=True):
    """Copies `files` into the directory `target`, which is made and removed; `direct`: with O_DIRECT, `durable`: synced."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    flags = os.O_DIRECT if direct else 0
    memory = mmap.mmap(-1, BUFFER_BYTES)
    memory[:] = bytes(BUFFER_BYTES)
    begun = time.perf_counter()
    buffer = memoryview(memory)
    for index, path in enumerate(files):
        size = path.stat().st_size
        reader = os.open(path, os.O_RDONLY | flags)
        writer = os.open(target / str(index), os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600)
        os.posix_fallocate(writer, 0, size)
        for at in range(0, size, BUFFER_BYTES):
            count = min(BUFFER_BYTES, size - at)
            part = buffer[:-(-count // BLOCK_BYTES) * BLOCK_BYTES if direct else count]
            if os.preadv(reader, [part], at) != count or os.pwritev(writer, [part], at) != len(part):
                raise RuntimeError("a short transfer")
        if direct:
            os.truncate(writer, size)  # whole blocks were written
        if durable:
            os.fsync(writer)
        os.close(writer)
        os.close(reader)
    found = time.perf_counter() - begun
    shutil.rmtree(target)
    return found


def fastest_is_direct(copy):
    """Whether O_DIRECT is the faster way on this machine; `copy(direct)` returns seconds."""
    medians = {direct: statistics.median(copy(direct) for _ in range(2)) for direct in (True, False)}
    pairs.progress(f"copy: O_DIRECT {medians[True]:.2f} s, through the page cache {medians[False]:.2f} s")
    return medians[True] <= medians[False]
