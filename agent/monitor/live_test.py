#!/usr/bin/python3
"""The monitor all the way, with nothing simulated: ranks that tell their all-reduces to the hook API, started by
examples/launch, a real agent, and what `holdfast monitor` says when one of them stops, and when one is killed.

    live_test.py HOLDFASTD HOLDFAST LAUNCH RING_TRAINER
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HOLDFASTD, HOLDFAST, LAUNCH, TRAINER = sys.argv[1:5]
RANKS = 4
DEADLINE = 60
# What the analysis needs to have learned before it gives verdicts.
OPERATIONS = 30


class LiveTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix='hf-live-')
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.socket = os.path.join(self.directory, 'agent.sock')
        self.log = os.path.join(self.directory, 'agent.log')
        self.agent = subprocess.Popen(
            [HOLDFASTD, '--socket', self.socket, '--root', self.path('root'), '--state-directory',
             self.path('state'), '--log-file', self.log, '--host-memory', '16MiB'])
        self.addCleanup(self.end, self.agent)
        self.until('an agent', lambda: self.ask('status') is not None)
        # Every rank is a node by itself, as in a network namespace of its own.
        self.job = subprocess.Popen(
            [sys.executable, LAUNCH, '--nproc', str(RANKS), '--run-id', 'live', '--on-failure', 'wait', '--',
             'sh', '-c', 'HOLDFAST_NODE=n$RANK exec "$0" "$1"', TRAINER, self.directory],
            env={**os.environ, 'HOLDFAST_SOCKET': self.socket, 'HOLDFAST_JOB': 'ring'})
        self.addCleanup(self.end, self.job)

    def path(self, name):
        return os.path.join(self.directory, name)

    @staticmethod
    def end(process):
        process.terminate()
        process.wait(DEADLINE)

    def until(self, what, holds):
        end = time.monotonic() + DEADLINE
        while True:
            value = holds()
            if value:
                return value
            if time.monotonic() > end:
                log = open(self.log).read() if os.path.exists(self.log) else ''
                self.fail('%s: not within %d s\n%s\n%s' % (what, DEADLINE, log, self.ask('monitor', 'status')))
            time.sleep(0.05)

    def ask(self, *words):
        result = subprocess.run([HOLDFAST, '--json', *words, '--socket', self.socket], capture_output=True, text=True,
                                timeout=DEADLINE)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def boards(self):
        return {board['rank']: board for board in self.ask('status')['monitor']}

    def finished(self):
        return [board['communicators'][0]['finished'] if board['communicators'] else 0
                for board in self.boards().values()]

    def findings(self):
        return self.ask('monitor', 'verdicts')['findings']

    def verdict(self, fault):
        for finding in self.findings():
            if finding['grade'] == 'verdict' and finding['fault'] == fault:
                return finding
        return None

    @staticmethod
    def suspects(findings):
        return {(finding['fault'], tuple(suspect['rank'] for suspect in finding['suspects'])) for finding in findings}

    def test_a_stopped_rank_and_a_killed_one_are_named(self):
        self.until('operations', lambda: len(self.finished()) == RANKS and min(self.finished()) >= OPERATIONS)
        groups = self.until('reports of all nodes', lambda: (
            lambda found: len(found) == RANKS and found)(self.ask('status')['monitor_reports']['groups']))
        self.assertEqual({(group['job'], group['attempt_key'], group['world_size'], group['ranks'])
                          for group in groups}, {('ring', 'live:0', RANKS, 1)})
        self.assertEqual({group['node'] for group in groups}, {'n0', 'n1', 'n2', 'n3'})
        self.assertEqual(self.findings(), [])
        pids = {rank: board['process_id'] for rank, board in self.boards().items()}

        stopped_at = time.monotonic()
        os.kill(pids[2], signal.SIGSTOP)
        found = self.until('a verdict on the stopped rank', lambda: self.verdict('stopped'))
        print('stopped: verdict after %.1f s' % (time.monotonic() - stopped_at))
        self.assertEqual(self.suspects(self.findings()), {('stopped', (2,))})
        self.assertEqual(found['scope'], 'process')
        os.kill(pids[2], signal.SIGCONT)

        killed_at = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        found = self.until('a verdict on the killed rank', lambda: self.verdict('dead'))
        print('killed: verdict after %.1f s' % (time.monotonic() - killed_at))
        self.assertEqual(self.suspects(self.findings()), {('stopped', (2,)), ('dead', (1,))})
        # Only the launcher can have said that.
        self.assertIn('signal 9', ' '.join([found['sentence'], *found['evidence']]))
        self.assertIsNone(self.job.poll())


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
