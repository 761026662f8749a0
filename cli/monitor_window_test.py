#!/usr/bin/python3
"""holdfast monitor window, from a process that tells its events through the hook API, by a real agent, to the
lines that the command prints; also by a worker that did not see the board being offered.

    monitor_window_test.py HOLDFAST HOLDFASTD LIBHOLDFAST.so HOOK_PYTHON
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HOLDFAST, HOLDFASTD, LIBRARY, HOOK_PYTHON = sys.argv[1:5]

# Answers every line on standard input with `done`, after so many operations of one connection each.
PROGRAM = """
import sys
from holdfast import monitor
communicator = monitor.Communicator(id=0xabc, ranks=2, rank=0, name="world")
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        with communicator.operation(monitor.Kind.ALL_REDUCE, 4096) as operation:
            transfer = monitor.Transfer(communicator, operation, channel=3, peer=1, send=True, steps=1)
            step = transfer.begin_step(0)
            transfer.wait(step, monitor.Wait.SEND_WIRE, 1024)
            transfer.end_step(step)
            transfer.end()
    print("done", flush=True)
"""


class Place:
    """An agent, and a process of rank 3 of job `windowed`."""

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory(prefix="hf-window-")
        root = pathlib.Path(self.directory.name)
        self.socket = str(root / "agent.sock")
        self.agent = subprocess.Popen(
            [HOLDFASTD, "--socket", self.socket, "--root", root / "root", "--state-directory", root / "state",
             "--log-file", root / "agent.log", "--host-memory", "16MiB"])
        self.until(lambda: self.status() is not None)
        self.process = None

    def start_process(self, level):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=dict(os.environ, PYTHONPATH=HOOK_PYTHON, HOLDFAST_LIBRARY=LIBRARY, HOLDFAST_SOCKET=self.socket,
                     HOLDFAST_JOB="windowed", RANK="3", WORLD_SIZE="4", HOLDFAST_MONITOR=level))
        assert self.process.stdout.readline() == "ready\n"

    def operations(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def status(self):
        result = subprocess.run([HOLDFAST, "status", "--socket", self.socket], capture_output=True, text=True)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def window(self, *arguments):
        """Into a file: the lines may be more than a pipe holds."""
        output = open(pathlib.Path(self.directory.name) / "window.jsonl", "w+", encoding="utf-8")
        window = subprocess.Popen([HOLDFAST, "monitor", "window", "--socket", self.socket, *arguments],
                                  stdout=output, stderr=subprocess.PIPE, text=True)
        window.lines = output
        return window

    @staticmethod
    def until(condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise AssertionError("not in time")
            time.sleep(0.02)

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.agent.terminate()
        self.agent.wait()
        self.directory.cleanup()


class WindowTest(unittest.TestCase):
    def setUp(self):
        self.place = Place()
        self.addCleanup(self.place.close)

    def lines_of(self, window):
        _, err = window.communicate(timeout=120)
        self.assertEqual(window.returncode, 0, err)
        with window.lines as lines:
            lines.seek(0)
            return [json.loads(line) for line in lines], err

    def records_of_a_window(self):
        window = self.place.window("--job", "windowed", "--rank", "3", "--seconds", "1")
        while window.poll() is None:
            self.place.operations(1)
            time.sleep(0.005)  # not more than rings hold until the agent looks, however busy the machine is
        return self.lines_of(window)[0]

    def test_events_of_a_rank_at_level_light(self):
        self.place.start_process("light")
        self.place.operations(10)  # nobody asked: not recorded
        lines = self.records_of_a_window()
        end = lines.pop()
        self.assertEqual((end["kind"], end["opened"], end["boards"]), ("window", True, 1))
        self.assertEqual(end["records"], len(lines))
        kinds = {line["kind"] for line in lines}
        self.assertEqual(kinds, {"operation_enqueued", "operation_started", "operation_finished", "transfer_begun",
                                 "step_begun", "step_state", "step_done", "transfer_ended"})
        self.assertEqual([line["us"] for line in lines], sorted(line["us"] for line in lines))
        self.assertLess(lines[-1]["us"], 2e6)
        state = next(line for line in lines if line["kind"] == "step_state")
        self.assertEqual({key: state[key] for key in ("state", "bytes", "channel", "peer", "direction",
                                                      "communicator")},
                         {"state": "send_wire", "bytes": 1024, "channel": 3, "peer": 1, "direction": "send",
                          "communicator": "0000000000000abc"})
        enqueued = [line["operation"] for line in lines if line["kind"] == "operation_enqueued"]
        self.assertGreater(enqueued[0], 10)
        self.assertEqual(enqueued, list(range(enqueued[0], enqueued[0] + len(enqueued))))

    def test_the_board_survives_the_worker(self):
        self.place.start_process("light")
        self.place.operations(5)
        before = self.place.status()
        os.kill(before["agent"]["worker_pid"], signal.SIGKILL)

        def replaced():
            status = self.place.status()
            return status is not None and status["agent"]["worker_restarts"] == 1
        self.place.until(replaced)
        board, = self.place.status()["monitor"]
        self.assertEqual((board["job"], board["rank"], board["process_id"], board["alive"]),
                         ("windowed", 3, self.place.process.pid, True))
        self.assertEqual(board["communicators"][0]["finished"], 5)
        self.assertGreater(self.records_of_a_window()[-1]["records"], 0)

    def test_a_rank_that_does_nothing_and_one_that_is_not_there(self):
        self.place.start_process("light")
        lines, err = self.lines_of(self.place.window("--job", "windowed", "--rank", "3", "--seconds", "0.1"))
        self.assertEqual(len(lines), 1)
        self.assertFalse(lines[0]["opened"])
        self.assertIn("enqueued no operation", err)
        for job, rank, seconds, code, text in (
                ("windowed", "2", "1", 5, "job 'windowed', rank 2"), ("other", "3", "1", 5, "job 'other', rank 3"),
                ("windowed", "3", "61", 2, "--seconds")):
            window = self.place.window("--job", job, "--rank", rank, "--seconds", seconds)
            with window.lines:
                _, err = window.communicate(timeout=120)
            self.assertEqual(window.returncode, code, err)
            self.assertIn(text, err)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
