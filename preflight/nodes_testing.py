"""Several nodes of `holdfast preflight` as processes of this machine, for its tests."""

import json
import os
import select
import socket
import subprocess
import time
import unittest

TOKEN = "0123456789abcdef0123456789abcdef"
FINE, ODD, USAGE, FAILED = 0, 1, 2, 75
PATIENCE = 90


def free_port():
    """A port such that it and its neighbour, which a holder of the first makes rank 0 take, are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Node:
    """One process of preflight."""

    def __init__(self, rank, environment, arguments, prefix=()):
        self.rank = rank
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(("SLURM_", "HOLDFAST_", "LD_"))}
        self.process = subprocess.Popen(
            [*prefix, Nodes.holdfast, "preflight", *arguments], env={**clean, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.stderr = ""

    def wait_for(self, text):
        """Reads standard error up to a line with `text`, the way progress is told."""
        end = time.monotonic() + PATIENCE
        while text not in self.stderr:
            if not select.select([self.process.stderr], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"no '{text}' from rank {self.rank}: {self.stderr}")
            # Past Python's buffers, of which select() knows nothing.
            said = os.read(self.process.stderr.fileno(), 65536)
            if not said:
                raise AssertionError(f"rank {self.rank} ended without '{text}': {self.stderr}")
            self.stderr += said.decode()

    def finish(self):
        out, err = self.process.communicate(timeout=PATIENCE)
        self.stdout, self.stderr = out.decode(), self.stderr + err.decode()
        return self.process.returncode


class Nodes(unittest.TestCase):
    """A test that starts nodes, and ends those that are left."""
    holdfast = None  # the command: set by the program

    def start(self, node_count, arguments=(), change=lambda rank, environment: None, ranks=None,
              address="127.0.0.1", port=None, prefix=lambda rank: (), own_arguments=lambda rank: ()):
        """Starts nodes. `change(rank, environment)` edits a node's environment."""
        port = port or free_port()
        nodes = []
        for rank in range(node_count) if ranks is None else ranks:
            environment = {"RANK": str(rank), "WORLD_SIZE": str(node_count), "LOCAL_RANK": "0",
                           "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "MASTER_ADDR": address,
                           "MASTER_PORT": str(port), "HOLDFAST_PREFLIGHT_TOKEN": TOKEN,
                           "HOLDFAST_NODE": f"node-{rank}"}
            change(rank, environment)
            nodes.append(Node(rank, environment, [*arguments, *own_arguments(rank)], prefix(rank)))
            self.addCleanup(self.stop, nodes[-1].process)
        return nodes

    @staticmethod
    def stop(process):
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()

    def finish(self, nodes, expected):
        """All end with the same code; gives what rank 0 has found."""
        codes = {node.rank: node.finish() for node in nodes}
        told = "\n".join(f"rank {node.rank} -> {codes[node.rank]}: {node.stderr}{node.stdout}"
                         for node in nodes)
        self.assertEqual(set(codes.values()), {expected}, told)
        for node in nodes:
            if node.rank != 0:
                self.assertEqual(node.stdout, "")
        return json.loads(nodes[0].stdout) if nodes[0].rank == 0 else None

    def subjects(self, report):
        return [(finding["subject"], finding["ranks"]) for finding in report["findings"]]
