#!/usr/bin/python3
"""The faults of network.py are what they claim, measured between sockets in the namespaces: which
pairs of nodes they slow or cut, and which they leave alone. And nothing stays behind.

Needs root and the tools that network.py names; otherwise skipped, in the form that scripts/test
counts.
"""
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import network as net

SKIPPED = 77
NODES = 3
SLOW_BITS = net.RATE_BITS // 8
# Far more than the bursts of both queues, so that the rate decides.
PROBE_BYTES = 1 << 20
# No fault makes a pair faster: it is as fast as it was once. Whoever waits for a processor, as this process may, is slower.
TRIES = 10
PATIENCE = 60  # seconds


def listener(network, node):
    with net.inside(network.namespace(node)):
        server = socket.create_server((network.address(node), 0))
    server.settimeout(PATIENCE)
    return server


def connect(network, sender, server):
    with net.inside(network.namespace(sender)):
        return socket.create_connection(server.getsockname(), timeout=PATIENCE)


def pair(network, sender, receiver):
    """A connection, as its two ends."""
    with listener(network, receiver) as server:
        near = connect(network, sender, server)
        far, _ = server.accept()
    far.settimeout(PATIENCE)
    return near, far


def rate_bits(network, sender, receiver):
    """What one connection reaches, in bits per second of payload."""
    near, far = pair(network, sender, receiver)
    with near, far:
        writer = threading.Thread(target=lambda: (near.sendall(bytes(PROBE_BYTES)),
                                                  near.shutdown(socket.SHUT_WR)))
        began = time.monotonic()
        writer.start()
        count = 0
        while data := far.recv(1 << 16):
            count += len(data)
        took = time.monotonic() - began
        writer.join()
    assert count == PROBE_BYTES
    return count * 8 / took


def reaches(network, sender, receiver, bits):
    return any(rate_bits(network, sender, receiver) > bits for _ in range(TRIES))


def slow_pairs(network):
    """The pairs that never reach half of a healthy NIC's rate."""
    return {(sender, receiver)
            for sender in range(NODES) for receiver in range(NODES) if sender != receiver
            if not reaches(network, sender, receiver, net.RATE_BITS / 2)}


class NetworkTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.exclusive = cls.enterClassContext(net.Exclusive())
        cls.network = cls.enterClassContext(net.Network("test", NODES))

    def tearDown(self):
        self.network.heal()

    def test_row_column_and_point_are_what_is_slow_and_nothing_else(self):
        self.assertEqual(slow_pairs(self.network), set(), "a healthy network")
        for what, begin, expected in (
                ("row", lambda: self.network.slow_sender(1, SLOW_BITS), {(1, 0), (1, 2)}),
                ("column", lambda: self.network.slow_receiver(1, SLOW_BITS), {(0, 1), (2, 1)}),
                ("point", lambda: self.network.slow_path(1, 2, SLOW_BITS), {(1, 2)})):
            with self.subTest(what):
                begin()
                self.assertEqual(slow_pairs(self.network), expected)
                for one in expected:  # slow, not cut
                    self.assertTrue(reaches(self.network, *one, SLOW_BITS * 0.6), one)
                self.network.heal()
                self.assertEqual(slow_pairs(self.network), set(), "healed")

    def assert_arrives(self, near, far):
        near.sendall(b"x")
        self.assertEqual(far.recv(1), b"x")

    def assert_does_not_arrive(self, near, far):
        near.sendall(b"x")
        far.settimeout(0.5)
        with self.assertRaises(TimeoutError):
            far.recv(1)
        far.settimeout(PATIENCE)

    def test_a_cut_is_one_way_or_both_and_heals(self):
        for both in (False, True):
            with self.subTest(both_ways=both):
                near, far = pair(self.network, 0, 1)
                near_of_other, far_of_other = pair(self.network, 0, 2)
                with near, far, near_of_other, far_of_other:
                    self.assert_arrives(near, far)
                    (self.network.cut_both_ways if both else self.network.cut)(0, 1)
                    # Data first in the direction that is open: once node 0 has sent what nobody
                    # acknowledges, node 1 would hear nothing either.
                    (self.assert_does_not_arrive if both else self.assert_arrives)(far, near)
                    self.assert_does_not_arrive(near, far)
                    self.assert_arrives(near_of_other, far_of_other)
                    self.network.heal()
                    self.assertEqual(far.recv(1), b"x", "sent again once the path is whole")

    def test_networks_side_by_side_do_not_meet(self):
        with net.Network("other", 2) as other:
            with listener(other, 1) as server:
                with self.assertRaises(OSError):
                    with net.inside(self.network.namespace(0)):
                        socket.create_connection(server.getsockname(), timeout=1)
                connect(other, 0, server).close()


class CleanupTest(unittest.TestCase):
    def test_what_a_killed_user_left_is_removed_by_the_next(self):
        program = ("import subprocess, sys, time; sys.path.insert(0, sys.argv[1]); import network\n"
                   "with network.Exclusive(), network.Network('killed', 2) as made:\n"
                   "    with network.inside(made.namespace(1)):\n"
                   "        child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
                   "    print(child.pid, flush=True)\n"
                   "    time.sleep(600)\n")
        user = subprocess.Popen([sys.executable, "-c", program, str(pathlib.Path(net.__file__).parent)],
                                stdout=subprocess.PIPE, text=True)
        orphan = int(user.stdout.readline())
        with self.assertRaises(net.CannotRun):
            with net.Exclusive():
                pass
        user.send_signal(signal.SIGKILL)
        user.wait()
        user.stdout.close()
        self.assertTrue(net.namespaces())
        os.kill(orphan, 0)  # still there
        with net.Exclusive():
            self.assertEqual(net.namespaces(), [])
            try:
                while True:  # until whoever adopted it has waited for it
                    state = pathlib.Path(f"/proc/{orphan}/stat").read_text().rsplit(")")[1].split()[0]
                    self.assertIn(state, ("Z", "X"))
            except (FileNotFoundError, ProcessLookupError):  # the second if it goes while it is read
                pass

    def test_the_machine_s_own_namespace_is_left_alone(self):
        before = net.tool("ip", "-o", "link")
        with net.Exclusive(), net.Network("test", 2):
            self.assertEqual(net.tool("ip", "-o", "link"), before)
        self.assertEqual(net.namespaces(), [])


if __name__ == "__main__":
    try:
        net.check_possible()
        with net.Exclusive():
            pass
    except net.CannotRun as reason:
        print(f"[  SKIPPED ] network_test ({reason})")
        sys.exit(SKIPPED)
    unittest.main()
