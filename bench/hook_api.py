"""Jobs of one rank for the benchmarks, through the Python package of this tree."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "hook" / "python"))
import holdfast  # noqa: E402  (the path comes first)


class Job(holdfast.Job):
    """`arrays` is a list of (name, address, bytes), all of them one-dimensional uint8 tensors."""

    def __init__(self, library, job, root, arrays, copy_threads=1, check_source=0):
        os.environ["HOLDFAST_LIBRARY"] = library
        super().__init__(job, rank=0, world_size=1, local_rank=0, root=root, private_agent=True,
                         check_source=holdfast.CheckSource(check_source), copy_threads=copy_threads)
        layout = {
            "holdfast_layout": 1, "mesh": [{"axis": "dp", "size": 1}],
            "tensors": [{"name": name, "shape": [size],
                         "states": [{"state": "param", "dtype": "uint8"}]}
                        for name, _, size in arrays]}
        self.register(layout, [
            holdfast.Buffer(f"param/{name}", holdfast.Memory(address, size, "uint8", (size,)))
            for name, address, size in arrays], timeout=None)


def environment(build, directory):
    """What a private agent of this build in `directory` needs."""
    os.environ["HOLDFASTD"] = os.path.join(build, "agent", "holdfastd")
    os.environ["HOLDFAST_RUNTIME_DIR"] = directory
    os.environ["HOLDFAST_LINGER"] = "1s"
    return os.path.join(build, "hook", "libholdfast.so")
