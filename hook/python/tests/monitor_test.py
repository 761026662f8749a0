#!/usr/bin/python3
"""holdfast.monitor: what Python tells is what a reader of the board sees, by hook/abi/monitor.h's
offsets.

Usage: monitor_test.py HOLDFASTD HOLDFAST        ($HOLDFAST_LIBRARY: the library)
"""
import json
import os
import signal
import struct
import subprocess
import sys
import time
import unittest

from holdfast import monitor
from support import DEADLINE_SECONDS, Place, board, communicator

DAEMON, COMMAND = sys.argv[1:3]
del sys.argv[1:3]

SLOT_BYTES = 64


def wait_states(data, index):
    """(peer, direction): wait state, of the slots of a communicator."""
    keys, slots, count = struct.unpack_from("<III", data, 24)
    found = {}
    for slot in range(count):
        key, = struct.unpack_from("<Q", data, keys + 8 * slot)
        if key and key >> 16 & 0xff == index:
            head, = struct.unpack_from("<Q", data, slots + SLOT_BYTES * slot)
            found[(key >> 24 & 0xffffff, key >> 56)] = head >> 32 & 0xff
    return found


class MonitorTest(unittest.TestCase):
    def test_an_operation_runs_during_its_block(self):
        with monitor.Communicator(id=501, ranks=4, rank=1, name="tensor parallel") as group:
            with group.operation(monitor.Kind.ALL_REDUCE, 4096):
                self.assertEqual(communicator(board(), 501)[1], (1, 1, 0))
            self.assertEqual(communicator(board(), 501)[1], (1, 1, 1))
            with self.assertRaises(RuntimeError):
                with group.operation(monitor.Kind.BARRIER, 0):
                    raise RuntimeError("of the block")
            self.assertEqual(communicator(board(), 501)[1], (2, 2, 2))

    def test_every_wait_of_a_transfer_is_shown(self):
        with monitor.Communicator(id=502, ranks=4, rank=1) as group:
            operation = monitor.Operation(group, monitor.Kind.ALL_GATHER, 100)
            for send in (True, False):
                transfer = monitor.Transfer(group, operation, channel=0, peer=2, send=send, steps=1)
                step = transfer.begin_step(0)
                waits = [wait for wait in monitor.Wait if wait.name.startswith("SEND") == send]
                self.assertEqual(len(waits), 3)
                for wait in waits:
                    transfer.wait(step, wait, 100)
                    data = board()
                    index, _ = communicator(data, 502)
                    self.assertEqual(wait_states(data, index)[(2, 1 if send else 2)], wait)
                transfer.end_step(step)
                transfer.end()
            operation.end()
            self.assertEqual(communicator(board(), 502)[1], (1, 1, 1))

    def test_steps_and_sections_need_no_job(self):
        monitor.step_done(33)
        with monitor.section("forward"):
            data = board()
            self.assertIn(b"forward\0", data[:4096])
        # BoardHeader: drops at 1024, of 16 words; window, last call; then the step.
        self.assertEqual(struct.unpack_from("<Q", data, 1024 + 16 * 8 + 16)[0], 33)

    def test_off_is_nothing(self):
        code = ("from holdfast import monitor\n"
                "with monitor.Communicator(id=1, ranks=1, rank=0) as group:\n"
                "    with group.operation(monitor.Kind.BARRIER, 0) as operation:\n"
                "        print(group.id, operation.id)\n")
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                env={**os.environ, "HOLDFAST_MONITOR": "off"}, timeout=60)
        self.assertEqual((result.stdout, result.stderr), ("0 0\n", ""))

    def test_the_agent_keeps_the_board_after_the_process_was_killed(self):
        place = Place(self.addCleanup, DAEMON)
        socket = str(place.path / "agent.sock")
        variables = place.environment(HOLDFAST_SOCKET=socket, HOLDFAST_JOB="watched", RANK="3",
                                      HOLDFAST_NODE="n5")
        agent = subprocess.Popen([DAEMON, "--socket", socket, "--root", str(place.root)],
                                 env={**variables, "HOLDFAST_STATE_DIRECTORY": str(place.path)},
                                 stderr=subprocess.PIPE, text=True)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.stderr.close)
        self.addCleanup(agent.terminate)
        for line in agent.stderr:
            if "serving" in line:
                break
        code = ("from holdfast import monitor\n"
                "group = monitor.Communicator(id=9, ranks=8, rank=3)\n"
                "monitor.Operation(group, monitor.Kind.ALL_REDUCE, 64).start()\n"
                "print('entered', flush=True)\n"
                "input()\n")
        trainer = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**variables, "PYTHONPATH": os.environ["PYTHONPATH"]})
        self.addCleanup(trainer.stdin.close)
        self.addCleanup(trainer.stdout.close)
        self.assertEqual(trainer.stdout.readline(), "entered\n")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (boards := self.status(variables)):  # the process does not wait for a busy agent
            self.assertLess(time.monotonic(), deadline)
        board_, = boards
        self.assertEqual((board_["job"], board_["rank"], board_["node"], board_["alive"],
                          board_["process_id"]), ("watched", 3, "n5", True, trainer.pid))
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        while board_["alive"]:
            board_, = self.status(variables)
        communicator_, = board_["communicators"]
        self.assertEqual((communicator_["started"], communicator_["finished"]), (1, 0))

    def status(self, variables):
        result = subprocess.run([COMMAND, "status"], env=variables, capture_output=True, text=True,
                                check=True, timeout=60)
        return json.loads(result.stdout)["monitor"]


if __name__ == "__main__":
    unittest.main()
