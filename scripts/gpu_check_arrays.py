"""Arrays of one framework through the Python package: saved, restored into other arrays of it, and compared bit for bit.

Usage: gpu_check_arrays.py torch|cupy|jax|numpy     ($HOLDFAST_LIBRARY, $HOLDFASTD, $HOLDFAST_ROOT: see docs/PYTHON.md)

numpy's lie in host memory: for a rehearsal. Exit status: 0 if they are equal, 1 if not, 77 if there is no such
framework here, or it sees no GPU.
"""

import sys

import holdfast
import numpy

# Of one array each: none, less and more than a block of an image, and an odd number.
COUNTS = (0, 1, 1_000_003, 4 << 20)
SECONDS = 60
ABSENT = 77


class Torch:
    def __init__(self):
        import torch
        if not torch.cuda.is_available():
            raise ImportError("torch sees no CUDA device")
        self.torch = torch

    def make(self, values):
        return self.torch.from_numpy(values.copy()).to("cuda")

    def read(self, array):
        return array.cpu().numpy()


class Cupy:
    def __init__(self):
        import cupy
        cupy.cuda.runtime.getDeviceCount()
        self.cupy = cupy

    def make(self, values):
        return self.cupy.asarray(values)

    def read(self, array):
        return self.cupy.asnumpy(array)


class Jax:
    def __init__(self):
        import jax
        self.jax = jax
        self.device = jax.devices("gpu")[0]

    def make(self, values):
        return self.jax.device_put(values, self.device).block_until_ready()

    def read(self, array):
        return numpy.asarray(array)


class Numpy:
    def make(self, values):
        return values.copy()

    def read(self, array):
        return array


def registered(job, arrays):
    memories = {f"param/{i}": holdfast.memory_of(array, f"array {i}") for i, array in enumerate(arrays)}
    job.register(holdfast.replicated(memories, 1), list(memories.items()))
    return memories


def main():
    name = sys.argv[1]
    try:
        framework = {"torch": Torch, "cupy": Cupy, "jax": Jax, "numpy": Numpy}[name]()
    except Exception as absent:  # a framework without its GPU says so in many ways
        print(f"no {name}: {type(absent).__name__}: {absent}", file=sys.stderr)
        return ABSENT
    random = numpy.random.default_rng(1)
    values = [random.integers(0, 1 << 30, count, dtype=numpy.int32) for count in COUNTS]
    saved = [framework.make(value) for value in values]
    others = [framework.make(numpy.zeros_like(value)) for value in values]
    with holdfast.Job("arrays", rank=0, world_size=1) as job:
        memories = registered(job, saved)
        job.save(1, wait=SECONDS)
        job.wait_captured(timeout=SECONDS)
        report = job.report(1)
        job.wait_committed(1, timeout=SECONDS)
    with holdfast.Job("arrays", rank=0, world_size=1) as job:
        registered(job, others)
        job.restore(timeout=SECONDS)
    for count, value, array in zip(COUNTS, values, others):
        if not numpy.array_equal(framework.read(array), value):
            print(f"the array of {count} elements differs", file=sys.stderr)
            return 1
    on_device = sum(memory.bytes for memory in memories.values() if memory.device is not None)
    if on_device != report.device_bytes:
        print(f"{on_device} bytes lie on the device, {report.device_bytes} were captured from it", file=sys.stderr)
        return 1
    print(f"{len(COUNTS)} arrays bit for bit, {report.device_bytes} bytes from the device at "
          f"{report.device_bytes_per_second / 1e9:.3g} GB/s, {report.unpinned_bytes} of them unpinned")
    return 0


if __name__ == "__main__":
    sys.exit(main())
