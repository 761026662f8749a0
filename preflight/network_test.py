#!/usr/bin/python3
"""holdfast preflight in network namespaces, with one end or one path slowed: the node or the pair is
named. Usage: network_test.py HOLDFAST DIRECTORY_OF_TESTS_FAULTS

Needs root and the tools that tests/faults/network.py names; otherwise skipped, in the form that
scripts/test counts.
"""

import os
import sys
import unittest

from nodes_testing import ODD, Nodes

HOLDFAST, FAULTS = (os.path.abspath(path) for path in sys.argv[1:3])
sys.path.insert(0, FAULTS)
import network  # noqa: E402

SKIPPED = 77
NODES = 4
SLOW_BITS = network.RATE_BITS // 20


class InNamespaces(Nodes):
    """Only the network is slow here: it decides alone what is found."""

    def measure(self, net, expected):
        nodes = self.start(net.nodes, ["--seconds", "3", "--slow-ratio", "4", "--json"],
                           address=net.address(0),
                           prefix=lambda rank: ("ip", "netns", "exec", net.namespace(rank)))
        return self.finish(nodes, expected)

    def metrics(self, finding):
        return {evidence["metric"] for evidence in finding["evidence"]}

    # Whoever is named for CPUs and memory is named by the other tests of this machine: not by us.
    def by_network(self, report):
        return [(finding["subject"], finding["ranks"]) for finding in report["findings"]
                if self.metrics(finding) & {"one_way", "both_ways"}]

    def test_a_node_that_sends_slowly_is_named(self):
        with network.Network("preflight", NODES) as net:
            net.slow_sender(2, SLOW_BITS)
            report = self.measure(net, ODD)
        self.assertEqual(self.by_network(report), [("node", [2])], report)
        for pair in report["pairs"]:
            for direction in (0, 1):
                slow = pair["ranks"][direction] == 2
                self.assertLess(pair["one_way"][direction], 2e6 if slow else 30e6)
                self.assertGreater(pair["one_way"][direction], 0.5e6 if slow else 8e6)

    def test_a_pair_with_a_slow_path_is_named(self):
        with network.Network("preflight", NODES) as net:
            net.slow_path(1, 2, SLOW_BITS)
            report = self.measure(net, ODD)
        self.assertEqual(self.by_network(report), [("pair", [1, 2])], report)
        named, = (finding["text"] for finding in report["findings"] if finding["ranks"] == [1, 2])
        self.assertIn("from rank 1 to rank 2", named)
        # Both ways at once it is slow too: its acknowledgements share the slow direction.
        self.assertNotIn("from rank 2 to rank 1", named.split("both ways at once")[0])


if __name__ == "__main__":
    Nodes.holdfast = HOLDFAST
    try:
        network.check_possible()
        with network.Exclusive():
            program = unittest.main(argv=sys.argv[:1], exit=False)
    except network.CannotRun as reason:
        print(f"[  SKIPPED ] preflight_network_test ({reason})")
        sys.exit(SKIPPED)
    sys.exit(not program.result.wasSuccessful())
