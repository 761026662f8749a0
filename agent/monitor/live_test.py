#!/usr/bin/python3
"""The monitor all the way, with nothing simulated: ranks that tell their all-reduces to the hook API, started by
examples/launch, a real agent, and what `holdfast monitor` says when one of them stops, and when one is killed.

    live_test.py HOLDFASTD HOLDFAST LAUNCH RING_TRAINER
"""
import os
import pathlib
import signal
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / 'tests' / 'support'))
from live_job import RANKS, LiveCase, Programs  # noqa: E402  (the path comes first)

TRAINER = sys.argv[4]
LiveCase.programs = Programs(*sys.argv[1:4])


class LiveTest(LiveCase):
    def all_suspects(self):
        return {(finding['fault'], *self.suspects_of(finding)) for finding in self.findings()}

    def test_a_stopped_rank_and_a_killed_one_are_named(self):
        self.start_agent()
        self.start_job(TRAINER, self.directory)
        self.until('operations', self.is_watched)
        groups = self.until('reports of all nodes', lambda: (
            lambda found: len(found) == RANKS and found)(self.ask('status')['monitor_reports']['groups']))
        self.assertEqual({(group['job'], group['attempt_key'], group['world_size'], group['ranks'])
                          for group in groups}, {('ring', 'live:0', RANKS, 1)})
        self.assertEqual({group['node'] for group in groups}, {'n0', 'n1', 'n2', 'n3'})
        self.assertEqual(self.findings(), [])
        stopped, killed = self.pid_of(2), self.pid_of(1)

        stopped_at = time.monotonic()
        os.kill(stopped, signal.SIGSTOP)
        found = self.until('a verdict on the stopped rank', lambda: self.verdict('stopped'))
        print('stopped: verdict after %.1f s' % (time.monotonic() - stopped_at))
        self.assertEqual(self.all_suspects(), {('stopped', 2)})
        self.assertEqual(found['scope'], 'process')
        os.kill(stopped, signal.SIGCONT)

        killed_at = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        found = self.until('a verdict on the killed rank', lambda: self.verdict('dead'))
        print('killed: verdict after %.1f s' % (time.monotonic() - killed_at))
        self.assertEqual(self.all_suspects(), {('stopped', 2), ('dead', 1)})
        # Only the launcher can have said that.
        self.assertIn('signal 9', ' '.join([found['sentence'], *found['evidence']]))
        self.assertIsNone(self.job.poll())


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1])
