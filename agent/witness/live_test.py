#!/usr/bin/python3
"""Other witnesses all the way, with nothing simulated: a ring of tiny_lm ranks with the profiler plugin, a real
agent, one rank that is stopped where its stack shows it, and a line in the file that the agent was given as the
kernel's log. What the witnesses say is in the verdict's evidence, and a replay of the recording says the same.

    live_test.py HOLDFASTD HOLDFAST WITNESS LAUNCH TINY_LM PLUGIN CORPUS
"""
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / 'tests' / 'support'))
from live_job import DEADLINE, RANKS, LiveCase, Programs  # noqa: E402  (the path comes first)

HOLDFASTD, HOLDFAST, WITNESS, LAUNCH, TINY_LM, PLUGIN, CORPUS = sys.argv[1:8]
LiveCase.programs = Programs(HOLDFASTD, HOLDFAST, LAUNCH)


class LiveTest(LiveCase):
    def setUp(self):
        super().setUp()
        self.kernel_log = self.directory / 'kern.log'
        self.kernel_log.write_text('NVRM: Xid (PCI:0000:3b:00): 79, pid=1, name=x, of long ago\n')
        self.start_agent('--kernel-log', self.kernel_log)
        self.recorder = self.start_recorder(stdout=subprocess.DEVNULL)
        self.start_job(TINY_LM, '--corpus', CORPUS, '--steps', 1000000, '--device-ms', 100, '--all-reduce', '64K',
                       '--no-holdfast', launch=('--log-dir', self.directory / 'logs'), NCCL_PROFILER_PLUGIN=PLUGIN,
                       COLLECTIVES_LOST_PEER='hang')

    def main_stack(self, pid):
        text = subprocess.run([WITNESS, 'stacks', str(pid)], capture_output=True, text=True, check=True).stdout
        return text[text.index(' main\n'):].split('\nthread ')[0]

    def stop_outside_of_collectives(self, rank):
        """Most of a step is the device's time, on a machine that has nothing else to do; the stack says whether it was."""
        pid = self.pid_of(rank)
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            os.kill(pid, signal.SIGSTOP)
            if 'collectives::' not in self.main_stack(pid):
                return pid
            os.kill(pid, signal.SIGCONT)
            time.sleep(random.uniform(0, 0.1))  # at any moment of a step
        self.fail('the rank was always inside a collective')

    def verdict_with(self, fault, part):
        """Witnesses may speak behind the verdict: with this part in its evidence."""
        found = self.verdict(fault)
        return found if found and any(part in line for line in found['evidence']) else None

    def test_what_the_witnesses_say_is_evidence(self):
        self.until('operations of all ranks', self.is_watched)
        self.assertEqual(self.findings(), [])

        # One stands elsewhere than the others: its native stack says where.
        pid = self.stop_outside_of_collectives(2)
        found = self.until('a verdict with a stack', lambda: self.verdict_with('stopped', 'stacks: rank 2 stands in '))
        self.assertEqual(self.suspects_of(found), [2])
        stack, = [line for line in found['evidence'] if line.startswith('stacks: ')]
        self.assertIn(f'the {RANKS - 1} others in ', stack)
        # Who could not be heard is said, and why.
        found = self.until('who is absent', lambda: self.verdict_with('stopped', 'ras was not heard on '))
        evidence = '\n'.join(found['evidence'])
        self.assertIn('ras_address = off', evidence)
        self.assertRegex(evidence, r'flight-recorder was not heard on \S+: no process of the job waits')
        # Of a machine without GPUs; with some it is heard.
        witnesses = {one['source']: one for one in self.ask('status')['witnesses']}
        self.assertEqual(set(witnesses), {'flight-recorder', 'stacks', 'ras', 'kernel-log', 'nvml'})
        self.assertEqual('nvml was not heard' in evidence, not witnesses['nvml']['heard'])
        self.assertTrue(witnesses['kernel-log']['heard'])
        explained = self.text('monitor', 'explain', found['id'])
        self.assertIn('stacks: rank 2 stands in ', explained)
        self.assertIn('ras was not heard on ', explained)
        status = self.text('monitor', 'status')
        self.assertIn('ras was not heard on ', status)
        os.kill(pid, signal.SIGCONT)

        # The driver's word about a GPU: a verdict at once.
        with self.kernel_log.open('a') as log:
            log.write(f'kernel: NVRM: Xid (PCI:0000:3b:00): 79, pid={self.pid_of(1)}, name=tiny_lm, GPU has fallen '
                      'off the bus.\n')
        fault = self.until('a verdict on the GPU',
                           lambda: self.verdict_with('gpu-fault', 'kernel-log: the driver reported Xid 79'))
        self.assertEqual(self.suspects_of(fault), [1])
        self.assertIn('kernel log: job ring: the driver reported Xid 79', self.log.read_text())

        # The same on another day.
        self.recorder.send_signal(signal.SIGINT)
        self.assertEqual(self.recorder.wait(DEADLINE), 0)
        again = {one['id']: one for one in self.replay()['findings']}
        self.assertEqual(again[fault['id']]['suspects'], fault['suspects'])
        self.assertIn(stack, again[found['id']]['evidence'])
        self.assertIsNone(self.job.poll())


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
