#!/usr/bin/python3
"""holdfast preflight as users run it, with several nodes on loopback: what is found, who is named, and
that all exit codes are the same. Usage: preflight_test.py HOLDFAST

A clock that is set needs libfaketime; without it that test is skipped, and says so.
"""

import glob
import os
import socket
import subprocess
import sys
import tempfile
import time
import unittest

from nodes_testing import FAILED, FINE, ODD, PATIENCE, TOKEN, USAGE, Nodes, free_port

# Processes that share two CPUs and a disk with each other, and with other tests, differ without bounds and are not odd:
# in these tests no measured speed decides.
TOLERANT = ["--slow-ratio", "1e6"]


class OnLoopback(Nodes):
    def runs_with(self, library):
        """A sanitizer's runtime wants to be the first library: it ends, or never begins."""
        try:
            return subprocess.run([self.holdfast, "--version"], capture_output=True, timeout=20,
                                  env={**os.environ, "LD_PRELOAD": library}).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def test_nodes_that_are_alike_are_fine(self):
        def as_srun(rank, environment):
            if rank == 2:
                for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
                    del environment[name]
                environment.update(SLURM_PROCID="2", SLURM_NTASKS="3", SLURM_LOCALID="0")

        port = free_port()
        with tempfile.TemporaryDirectory(dir=".") as directory, socket.create_server(
                ("127.0.0.1", port)) as store:
            nodes = self.start(3, ["--seconds", "1", "--json", "--directory", directory, *TOLERANT],
                               as_srun, port=port)
            report = self.finish(nodes, FINE)
            self.assertEqual(os.listdir(directory), [])
            # What holds the port was connected to, and nothing was sent to it.
            store.setblocking(False)
            held = store.accept()[0]
            with held:
                held.setblocking(True)
                self.assertEqual(held.recv(1), b"")
        self.assertEqual(report["schema_version"], 1)
        self.assertEqual(report["outcome"], "fine")
        self.assertEqual([node["host"] for node in report["nodes"]], ["node-0", "node-1", "node-2"])
        for node in report["nodes"]:
            for metric in ("cpu_count", "memory", "cpu", "slowest_core", "disk_write", "disk_sync",
                           "disk_read"):
                self.assertGreater(node[metric], 0, metric)
        self.assertEqual([pair["ranks"] for pair in report["pairs"]], [[0, 1], [1, 2], [0, 2]])
        for pair in report["pairs"]:
            for value in (*pair["one_way"], *pair["both_ways"], pair["round_trip"],
                          pair["round_trip_p99"]):
                self.assertGreater(value, 0)
        for line in ("all 3 nodes have come", "each node alone", "round 1 of 3", "rank 2 (node-2) sits out",
                     "rank 0 (node-0) sits out"):
            self.assertIn(line, nodes[0].stderr)

    def test_one_node_has_nothing_to_compare_and_needs_no_token_on_loopback(self):
        nodes = self.start(1, ["--seconds", "1", "--no-progress"],
                           lambda rank, environment: environment.pop("HOLDFAST_PREFLIGHT_TOKEN"))
        self.assertEqual(nodes[0].finish(), FINE, nodes[0].stderr)
        self.assertEqual(nodes[0].stderr, "")
        for part in ("node-0", "GB/s", "nothing to compare"):
            self.assertIn(part, nodes[0].stdout)

    def test_a_node_without_its_disk_is_named(self):
        with tempfile.TemporaryDirectory(dir=".") as directory:
            nodes = self.start(
                3, ["--seconds", "1", "--json", *TOLERANT],
                own_arguments=lambda rank: ["--directory", directory + "/none" * (rank == 1)])
            report = self.finish(nodes, ODD)
        self.assertEqual(self.subjects(report), [("node", [1])])
        self.assertIn("disk could not be measured", report["findings"][0]["text"])

    def test_wrong_tokens_strangers_and_missing_nodes_are_named(self):
        def spoil(rank, environment):
            if rank == 2:
                environment["HOLDFAST_PREFLIGHT_TOKEN"] = TOKEN[::-1]

        expected = ([2, 3], {"does not speak this protocol",
                             "says that it is rank 2, another token (HOLDFAST_PREFLIGHT_TOKEN)"})
        for seconds in (3, 15, 60):  # longer if not all of them have come by then
            port = free_port()
            nodes = self.start(4, ["--seconds", "1", "--join-seconds", str(seconds), "--json"], spoil, port=port,
                               ranks=(0, 1, 2))
            end = time.monotonic() + PATIENCE
            while True:  # until rank 0 listens
                try:
                    stranger = socket.create_connection(("127.0.0.1", port))
                    break
                except ConnectionRefusedError:
                    self.assertLess(time.monotonic(), end)
            with stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                report = self.finish(nodes, FAILED)
            found = report["missing_ranks"], {entry["reason"] for entry in report["turned_away"]}
            if found == expected:
                break
        self.assertEqual(found, expected)
        self.assertEqual(report["outcome"], "failed")
        self.assertIn("missing: ranks 2, 3", report["failure"])
        self.assertIn("another token", nodes[2].stderr)
        # The one that has come hears why.
        self.assertIn("missing: ranks 2, 3", nodes[1].stderr)

    def test_a_node_that_is_killed_is_named(self):
        nodes = self.start(3, ["--seconds", "4", "--json"])
        nodes[0].wait_for("each node alone")
        nodes[1].process.kill()
        report = self.finish([nodes[0], nodes[2]], FAILED)
        self.assertEqual(report["missing_ranks"], [1])
        self.assertIn("rank 1 (node-1) is lost", report["failure"])
        self.assertIn("rank 1 (node-1) is lost", nodes[2].stderr)

    def test_without_rank_0_all_others_end(self):
        nodes = self.start(3, ["--seconds", "2"])
        nodes[0].wait_for("round 1 of 3")
        nodes[0].process.kill()
        self.finish(nodes[1:], FAILED)
        for node in nodes[1:]:
            self.assertIn("rank 0", node.stderr)

    def test_it_refuses_to_start_wrongly(self):
        for change, named in (({"MASTER_ADDR": "192.0.2.1", "HOLDFAST_PREFLIGHT_TOKEN": ""}, "HOLDFAST_PREFLIGHT_TOKEN"),
                              ({"HOLDFAST_PREFLIGHT_TOKEN": "short"}, "HOLDFAST_PREFLIGHT_TOKEN"),
                              ({"LOCAL_RANK": "1"}, "LOCAL_RANK"),
                              ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE"),
                              ({"RANK": "7"}, "RANK"),
                              ({"MASTER_PORT": "http"}, "MASTER_PORT")):
            node, = self.start(2, (), lambda rank, environment: environment.update(change), ranks=(0,))
            self.assertEqual(node.finish(), USAGE)
            self.assertIn(named, node.stderr)
        node, = self.start(1, ["--seconds", "0"])
        self.assertEqual(node.finish(), USAGE)

    def test_a_clock_that_is_set_back_is_named(self):
        found = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
        if not found:
            self.skipTest("libfaketime is not installed")
        if not self.runs_with(found[0]):
            self.skipTest("programs of this build do not run with libfaketime (a sanitizer's)")
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "time")

            def set_time(offset):
                with open(path + ".new", "w") as file:
                    file.write(offset)
                os.rename(path + ".new", path)

            def fake(rank, environment):
                if rank == 1:
                    environment.update(LD_PRELOAD=found[0], FAKETIME_TIMESTAMP_FILE=path,
                                       FAKETIME_NO_CACHE="1", DONT_FAKE_MONOTONIC="1")

            set_time("+0")
            nodes = self.start(3, ["--seconds", "2", "--json", *TOLERANT], fake)
            nodes[0].wait_for("round 1 of 3")
            set_time("-30")
            report = self.finish(nodes, ODD)
        self.assertEqual(self.subjects(report), [("node", [1])])
        self.assertEqual([evidence["metric"] for evidence in report["findings"][0]["evidence"]],
                         ["clock_step", "clock_offset"])
        self.assertAlmostEqual(report["nodes"][1]["clock_step_seconds"], -30, delta=1)


if __name__ == "__main__":
    Nodes.holdfast = os.path.abspath(sys.argv.pop(1))
    unittest.main()
