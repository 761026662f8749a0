"""One rank of a job for gpu-check: it does what it is told on standard input, line by line.

It begins with {"ready": true, ...}; then, for every line {"do": NAME, ...}, it answers with one JSON
line on the descriptor in $GPU_CHECK_ANSWERS (standard output belongs to the libraries):

    reduce   elements, times, sleep_seconds: `times` all-reduces, behind a kernel that spins for so
             long (on this rank); answers once they are done: seconds, and how long one took to enqueue
    verify   elements: one all-reduce; answers whether the sum is right
    graph    elements, times, replays: captures `times` all-reduces in a CUDA graph and replays it
    exchange elements: sends to the next rank, receives from the one before, and an all-to-all
    quit     destroys the process group and ends

With --backend gloo it runs on the CPU (a rehearsal of gpu-check) and tells its all-reduces through
Holdfast's hook API, because no plugin of NCCL sees them.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time


class Nccl:
    """On GPU 0, whatever the rank: the ranks share it."""

    def __init__(self):
        import torch
        from torch import distributed
        self.torch, self.distributed = torch, distributed
        torch.cuda.set_device(0)
        distributed.init_process_group("nccl")
        self.device = "cuda:0"
        torch.cuda._sleep(1000)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.cuda._sleep(200_000_000)
        torch.cuda.synchronize()
        self.ticks_per_second = 200_000_000 / (time.perf_counter() - begin)

    def about(self):
        return {"torch": self.torch.__version__, "nccl": ".".join(map(str, self.torch.cuda.nccl.version())),
                "device": self.torch.cuda.get_device_name(0)}

    def told(self, elements):
        return contextlib.nullcontext()

    def spin(self, seconds):
        """Occupies the stream: the kernels behind it come late, as after a slow computation."""
        self.torch.cuda._sleep(int(seconds * self.ticks_per_second))

    def wait(self):
        self.torch.cuda.synchronize()


class Gloo:
    def __init__(self):
        import torch
        from torch import distributed
        from holdfast import monitor
        self.torch, self.distributed, self.monitor = torch, distributed, monitor
        distributed.init_process_group("gloo")
        self.device = "cpu"
        self.communicator = monitor.Communicator(
            id=7, ranks=distributed.get_world_size(), rank=distributed.get_rank(), name="world")

    def about(self):
        return {"torch": self.torch.__version__, "nccl": None, "device": "cpu"}

    @contextlib.contextmanager
    def connection(self, operation, peer_offset, wait, send):
        """One transfer of one step, which waits for one thing all the time."""
        rank, ranks = self.distributed.get_rank(), self.distributed.get_world_size()
        transfer = self.monitor.Transfer(self.communicator, operation, channel=0,
                                         peer=(rank + peer_offset) % ranks, send=send, steps=1)
        step = transfer.begin_step(0)
        transfer.wait(step, wait)
        try:
            yield
        finally:
            transfer.end_step(step)
            transfer.end()

    @contextlib.contextmanager
    def told(self, elements):
        with self.communicator.operation(self.monitor.Kind.ALL_REDUCE, 4 * elements) as operation, \
                self.connection(operation, -1, self.monitor.Wait.RECEIVE_PEER, send=False):
            yield

    def spin(self, seconds):
        with self.connection(None, 1, self.monitor.Wait.SEND_LOCAL, send=True):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                pass

    def wait(self):
        pass


class Rank:
    def __init__(self, backend):
        self.backend = backend
        self.torch, self.distributed = backend.torch, backend.distributed
        self.rank = self.distributed.get_rank()
        self.ranks = self.distributed.get_world_size()
        self.tensors = {}
        self.reduce(elements=1024, times=1)  # communicators are made with the first operation

    def tensor(self, elements):
        if elements not in self.tensors:
            self.tensors[elements] = self.torch.zeros(elements, device=self.backend.device)
        return self.tensors[elements]

    def all_reduce(self, elements):
        with self.backend.told(elements):
            self.distributed.all_reduce(self.tensor(elements))

    def reduce(self, elements, times, sleep_seconds=0.0):
        self.tensor(elements)
        self.backend.wait()
        begin = time.perf_counter()
        if sleep_seconds > 0:
            self.backend.spin(sleep_seconds)
        moments = [time.perf_counter()]
        for _ in range(times):
            self.all_reduce(elements)
            moments.append(time.perf_counter())
        self.backend.wait()
        return {"seconds": time.perf_counter() - begin,
                "enqueue_seconds": statistics.median(b - a for a, b in zip(moments, moments[1:]))}

    def verify(self, elements):
        tensor = self.torch.full((elements,), float(self.rank + 1), device=self.backend.device)
        with self.backend.told(elements):
            self.distributed.all_reduce(tensor)
        expected = self.ranks * (self.ranks + 1) / 2
        return {"right": bool((tensor == expected).all().item())}

    def graph(self, elements, times, replays):
        stream = self.torch.cuda.Stream()
        tensor = self.tensor(elements)
        stream.wait_stream(self.torch.cuda.current_stream())
        with self.torch.cuda.stream(stream):
            self.distributed.all_reduce(tensor)  # nothing is set up during the capture
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(times):
                self.distributed.all_reduce(tensor)
        begin = time.perf_counter()
        for _ in range(replays):
            graph.replay()
        self.torch.cuda.synchronize()
        # NCCL keeps the capture's plans until the graph is gone.
        del graph
        return {"seconds": time.perf_counter() - begin}

    def exchange(self, elements):
        send, receive = self.tensor(elements), self.torch.zeros(elements, device=self.backend.device)
        if self.ranks > 1:
            work = self.distributed.batch_isend_irecv([
                self.distributed.P2POp(self.distributed.isend, send, (self.rank + 1) % self.ranks),
                self.distributed.P2POp(self.distributed.irecv, receive, (self.rank - 1) % self.ranks)])
            for item in work:
                item.wait()
        part = elements // self.ranks * self.ranks
        self.distributed.all_to_all_single(receive[:part], send[:part])
        self.backend.wait()
        return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["nccl", "gloo"], required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(int(os.environ["GPU_CHECK_ANSWERS"]), "w", buffering=1)
    backend = Nccl() if arguments.backend == "nccl" else Gloo()
    rank = Rank(backend)
    answers.write(json.dumps({"ready": True, **backend.about()}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        if name == "quit":
            break
        answers.write(json.dumps(getattr(rank, name)(**command)) + "\n")
    backend.distributed.destroy_process_group()
    answers.write(json.dumps({"ended": True}) + "\n")


if __name__ == "__main__":
    main()
