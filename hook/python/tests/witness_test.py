#!/usr/bin/python3
"""holdfast.witness against a real agent: processes wait to be asked, answer with their stacks and, with
torch, their Flight Recorders; what cannot be told is said; and the agent's end harms nothing.

Usage: witness_test.py HOLDFASTD HOLDFAST [torch]        ($HOLDFAST_LIBRARY: the library)
With `torch`: real process groups (gloo), one rank of which does not come to an all-reduce.
"""
import json
import os
import signal
import subprocess
import sys
import time
import unittest

from support import Place

DAEMON, COMMAND = sys.argv[1:3]
TORCH = sys.argv[3:] == ["torch"]
del sys.argv[1:]

RANKS = 3
DEADLINE_SECONDS = 60

# Each prints "here" when it stands where it will stand.
PLAIN = """
import sys, threading
from holdfast import witness
witness._RETRY_SECONDS = 0.1
assert witness.start() and witness.start()
assert [thread.name for thread in threading.enumerate()].count("holdfast-witness") == 1

def waits_for_data():
    sys.stdin.readline()

def waits_for_the_others():
    sys.stdin.readline()

print("here", flush=True)
(waits_for_data if RANK == 1 else waits_for_the_others)()
"""

FORKED = """
import os, signal, sys
from holdfast import witness
assert witness.start()
print("here", flush=True)
sys.stdin.readline()
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
sys.stdin.readline()
"""

# Another user, who listens where the process looks for its agent.
STRANGER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
os.setuid(65534)
listener.listen()
print("here", flush=True)
connection, _ = listener.accept()
print(len(connection.recv(4096)), flush=True)
"""

GLOO = """
import sys
import torch
import torch.distributed as dist
from holdfast import witness
dist.init_process_group("gloo", init_method=INIT, rank=RANK, world_size=3)
assert witness.start()
data = torch.ones(4)
for _ in range(25):
    dist.all_reduce(data)
print("here", flush=True)
if RANK == 1:
    sys.stdin.readline()
dist.all_reduce(data)
"""


class WitnessTest(unittest.TestCase):
    def setUp(self):
        self.place = Place(self.addCleanup, DAEMON)
        self.socket = str(self.place.path / "agent.sock")
        self.variables = self.place.environment(
            HOLDFAST_SOCKET=self.socket, HOLDFAST_JOB="asked", WORLD_SIZE=str(RANKS))
        self.start_agent()
        self.ranks = []

    def start_agent(self):
        self.agent = subprocess.Popen(
            [DAEMON, "--socket", self.socket, "--root", str(self.place.root), "--ras-address", "off"],
            env={**self.variables, "HOLDFAST_STATE_DIRECTORY": str(self.place.path)},
            stderr=subprocess.PIPE, text=True)
        self.addCleanup(self.agent.wait)
        self.addCleanup(self.agent.stderr.close)
        self.addCleanup(self.agent.terminate)
        for line in self.agent.stderr:
            if "serving" in line:
                break

    def start_ranks(self, code):
        """Returns when all of them stand still and wait to be asked."""
        for rank in range(RANKS):
            process = subprocess.Popen(
                [sys.executable, "-c", f"RANK = {rank}\nINIT = 'file://{self.place.path}/init'\n{code}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**self.variables, "RANK": str(rank), "OMP_NUM_THREADS": "1",
                     "PYTHONPATH": os.environ["PYTHONPATH"]})
            self.ranks.append(process)
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            self.addCleanup(process.stdin.close)
            self.addCleanup(process.stdout.close)
        for process in self.ranks:
            self.assertEqual(process.stdout.readline(), "here\n")
        self.until_waiting(RANKS)

    def run_command(self, *words):
        return subprocess.run([COMMAND, *words], env=self.variables, capture_output=True, text=True,
                              timeout=DEADLINE_SECONDS)

    def status(self):
        result = self.run_command("status")
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)

    def until_waiting(self, count):
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (waiting := self.status()["agent"]["waiting_processes"]) != count:
            self.assertLess(time.monotonic(), deadline, f"{waiting} wait, expected {count}")
            time.sleep(0.02)

    def ask(self):
        """What each source says, by its name, and all testimonies."""
        result = self.run_command("monitor", "witnesses", "--json")
        self.assertEqual(result.returncode, 0, result.stderr)
        job, = json.loads(result.stdout)["jobs"]
        self.assertEqual(job["job"], "asked")
        return {witness["source"]: witness for witness in job["witnesses"]}, job["testimonies"]

    def ask_until(self, words):
        """Until the stacks' witness says so: whoever waits for a processor answers too late, and is asked again."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while words not in (answer := self.ask())[0]["stacks"]["why"]:
            self.assertLess(time.monotonic(), deadline, answer)
            time.sleep(6)  # nobody is asked twice within 5 s
        return answer

    def of(self, testimonies, claim):
        return [testimony for testimony in testimonies if testimony["claim"] == claim]

    @unittest.skipIf(TORCH, "the part with torch")
    def test_stacks_name_the_odd_one_and_who_is_absent_is_said(self):
        self.start_ranks(PLAIN)
        witnesses, testimonies = self.ask_until(f"Python's of {RANKS}")
        odd, = self.of(testimonies, "odd-stack")
        self.assertEqual(odd["ranks"], [1])
        self.assertIn("waits_for_data", odd["sentence"])
        self.assertIn("waits_for_the_others", odd["sentence"])
        self.assertFalse(witnesses["flight-recorder"]["heard"])
        self.assertIn("torch.distributed is not in use", witnesses["flight-recorder"]["why"])
        self.assertEqual(witnesses["ras"]["why"], "ras_address = off")
        self.assertTrue(witnesses["nvml"]["why"])
        self.assertEqual({"flight-recorder", "stacks", "ras", "nvml", "kernel-log"},
                         {witness["source"] for witness in self.status()["witnesses"]})
        # At once again: not asked, and said so.
        result = self.run_command("monitor", "witnesses", "--job", "asked")
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("asked less than 5s ago", result.stdout)
        self.assertEqual(self.run_command("monitor", "witnesses", "--job", "nobody's").returncode, 5)

    @unittest.skipIf(TORCH, "the part with torch")
    def test_a_rank_that_cannot_answer_is_named(self):
        self.start_ranks(PLAIN)
        self.ranks[2].send_signal(signal.SIGSTOP)
        witnesses, _ = self.ask_until(f"native stacks of {RANKS} ranks, Python's of {RANKS - 1}")
        self.assertIn("rank 2: no answer within 2s", witnesses["flight-recorder"]["why"])
        self.ranks[2].send_signal(signal.SIGCONT)

    @unittest.skipIf(TORCH, "the part with torch")
    def test_the_agents_end_harms_nothing_and_a_new_one_is_found(self):
        self.start_ranks(PLAIN)
        self.agent.terminate()
        self.agent.wait()
        for process in self.ranks:
            self.assertIsNone(process.poll())
        self.start_agent()
        self.until_waiting(RANKS)

    @unittest.skipIf(TORCH, "the part with torch")
    def test_a_forked_child_does_not_wait_in_its_parents_place(self):
        self.start_ranks(FORKED)
        children = []
        for process in self.ranks:
            process.stdin.write("fork\n")
            process.stdin.flush()
            children.append(int(process.stdout.readline()))
            self.addCleanup(os.kill, children[-1], signal.SIGKILL)
        self.until_waiting(RANKS)
        for process in self.ranks:
            process.kill()
        self.until_waiting(0)
        for child in children:
            os.kill(child, 0)  # they are there

    @unittest.skipIf(TORCH, "the part with torch")
    def test_off_and_nameless_start_nothing(self):
        code = ("import threading\nfrom holdfast import witness\n"
                "print(witness.start(), len(threading.enumerate()))")
        for changed in ({"HOLDFAST_MONITOR": "off"}, {"HOLDFAST_SOCKET": "", "HOLDFAST_JOB": ""},
                        {"RANK": ""}):
            result = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                env={**self.variables, "RANK": "0", "PYTHONPATH": os.environ["PYTHONPATH"], **changed})
            self.assertEqual((result.stdout, result.stderr), ("False 1\n", ""))

    @unittest.skipIf(TORCH, "the part with torch")
    @unittest.skipIf(os.geteuid() != 0, "only root can have another user listen")
    def test_another_users_socket_is_told_nothing(self):
        path = str(self.place.path / "stranger.sock")
        stranger = subprocess.Popen([sys.executable, "-c", STRANGER, path], stdout=subprocess.PIPE, text=True)
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        self.addCleanup(stranger.stdout.close)
        self.assertEqual(stranger.stdout.readline(), "here\n")
        self.variables["HOLDFAST_SOCKET"] = path
        rank = subprocess.Popen(
            [sys.executable, "-c", f"RANK = 0\n{PLAIN}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env={**self.variables, "RANK": "0", "PYTHONPATH": os.environ["PYTHONPATH"]})
        self.addCleanup(rank.wait)
        self.addCleanup(rank.kill)
        self.addCleanup(rank.stdin.close)
        self.assertEqual(stranger.stdout.readline(), "0\n")

    @unittest.skipUnless(TORCH, "needs torch")
    def test_the_flight_recorder_names_who_never_entered(self):
        self.start_ranks(GLOO)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:  # until the others have enqueued theirs; asked again after 5 s
            result = self.run_command("monitor", "witnesses", "--json")
            job, = json.loads(result.stdout)["jobs"]
            outside = self.of(job["testimonies"], "never-entered")
            if outside:
                break
            self.assertLess(time.monotonic(), deadline, job)
            time.sleep(0.5)
        self.assertEqual((outside[0]["ranks"], outside[0]["operation"], outside[0]["source"]),
                         ([1], 26, "flight-recorder"))
        self.assertIn("all_reduce of [4] Float", outside[0]["sentence"])
        odd, = self.of(job["testimonies"], "odd-stack")
        self.assertEqual(odd["ranks"], [1])
        self.assertIn("(in a collective)", odd["sentence"])


if __name__ == "__main__":
    unittest.main()
