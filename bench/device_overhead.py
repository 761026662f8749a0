"""What our own code costs when tensors are captured from devices, on a CUDA driver that does nothing. Figures
about a GPU are those of scripts/gpu-check."""

import json
import subprocess

import pairs


def rows(place):
    driver = place.build / "tests" / "support" / "null_cuda" / "libcuda.so.1"
    found = []

    def once():
        result = subprocess.run([place.build / "bench" / "bench_device_overhead", driver], check=True,
                                capture_output=True, text=True)
        found.append(json.loads(result.stdout))
        return found[-1]["save"]

    note = "our own code only: a driver that does nothing, no GPU"
    save = pairs.measure("hf_save of 10,000 device tensors", "us", once, 1000, note=note)
    # Of the same runs.
    chunk = iter([run["chunk"] for run in found])
    tensor = iter([run["tensor"] for run in found])
    return [save,
            pairs.measure("a chunk copied from a device", "us", lambda: next(chunk), 5, note=note),
            pairs.measure("a small device tensor that is not joined", "us", lambda: next(tensor), note=note)]
