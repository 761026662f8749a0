#!/usr/bin/python3
"""tiny_lm with Holdfast: whatever dies, and in whatever layout it goes on, the losses are those of an
undisturbed run bit for bit, and the restored state is the one that was committed.

Usage: resume_test.py LAUNCH TINY_LM HOLDFASTD CORPUS [--no-limits]   (a build with a sanitizer)
"""
import functools
import os
import signal
import sys
import tempfile
import time
import unittest

import runs

NO_LIMITS = '--no-limits' in sys.argv
if NO_LIMITS:
    sys.argv.remove('--no-limits')
LAUNCH, TINY_LM, HOLDFASTD, CORPUS = sys.argv[1:5]
del sys.argv[1:5]
Run = functools.partial(runs.Run, (LAUNCH, TINY_LM, HOLDFASTD, CORPUS))


class ResumeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.reference = runs.undisturbed_losses(LAUNCH, TINY_LM, CORPUS, 20)

    def setUp(self):
        directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(directory.cleanup)
        self.place = directory.name

    def finish_ok(self, run, restart=0, errors_allowed=False):
        status, errors = run.finish()
        self.assertEqual(status, 0, errors)
        if not errors_allowed:
            self.assertEqual(run.events('holdfast_error', restart), {})

    def check_losses(self, run, first, last, restart=0):
        losses = run.losses(restart)
        self.assertEqual(sorted(losses), list(range(first, last + 1)))
        for step, loss in losses.items():
            self.assertEqual(loss, self.reference[step], 'step %d' % step)

    def test_a_job_goes_on_in_any_world_and_layout_bit_for_bit(self):
        before = None
        last = 0
        for i, (world, zero) in enumerate(((4, 1), (2, 1), (3, 1), (1, 0), (3, 0), (2, 1))):
            with self.subTest(world=world, zero=zero, after=last):
                steps = last + 3
                run = Run(self.place, 'run-%d' % i, world, '--zero', str(zero), '--steps',
                          str(steps), '--save-every', '2', '--bytes', '3M')
                self.finish_ok(run)
                self.check_losses(run, last + 1, steps)
                committed = run.events('committed')
                self.assertEqual(sorted(committed), list(range(world)))
                restored = run.events('restored')
                if before is None:
                    self.assertEqual(restored, {})
                else:
                    self.assertEqual({e[0]['step'] for e in restored.values()}, {last})
                    self.assertEqual(run.digests('restore_digest'), before)
                    self.assertEqual(len(run.events('ballast_verified')), world)
                after = run.digests('final_digest')
                self.assertNotEqual(after, before)
                before, last = after, steps

    def test_a_rank_that_waits_is_small_with_checkpoints_too(self):
        if NO_LIMITS:
            self.skipTest('a sanitizer takes memory and time of its own')
        # Rank 1 has no sample: it only waits, sums, updates and saves.
        run = Run(self.place, 'run', 2, '--steps', '12', '--batch', '1', '--device-ms', '200',
                  '--save-every', '4')
        self.finish_ok(run)
        self.assertEqual([e['state'] for e in run.events('save_ended')[1]], 3 * ['committed_power'])
        idle = run.events('finished')[1][0]
        self.assertGreater(idle['wall_ms'], 2400)
        self.assertGreater(idle['rss_max_bytes'], 1 << 20)
        self.assertLessEqual(idle['rss_max_bytes'], 64 << 20)
        self.assertLess(idle['cpu_ms'], 0.05 * idle['wall_ms'])

    def kill_and_go_on(self, kill, world, *flags):
        run = Run(self.place, 'run', world, '--steps', '20', '--save-every', '2', '--bytes', '3M',
                  '--device-ms', '100', *flags, restarts=1)
        deadline = time.monotonic() + runs.TIMEOUT_SECONDS
        while not any(event['state'] == 'committed_power'
                      for event in run.events('save_ended').get(0, ())):
            self.assertLess(time.monotonic(), deadline)
            self.assertIsNone(run.process.poll(), run.standard_errors())
            time.sleep(0.005)
        kill(run)
        return run

    def check_a_killed_rank(self, world, *flags):
        run = self.kill_and_go_on(lambda run: os.kill(run.pid(1), signal.SIGKILL), world, *flags)
        self.finish_ok(run, restart=1)
        self.assertEqual(len(run.starts()), 2 * world, 'the kill missed')
        restored = {event[0]['step'] for event in run.events('restored', restart=1).values()}
        self.assertEqual(len(restored), 1)
        step = restored.pop()
        self.assertGreater(step, 0)
        self.assertEqual(step % 2, 0)
        self.check_losses(run, step + 1, 20, restart=1)

    def test_a_killed_rank_costs_the_steps_since_the_last_commit_and_no_bit(self):
        self.check_a_killed_rank(3)

    def test_the_same_with_stages_tensor_ranks_and_cut_parameters(self):
        self.check_a_killed_rank(8, '--pp', '2', '--tp', '2', '--zero', '3')

    def test_another_seed_or_corpus_is_refused_by_name(self):
        self.finish_ok(Run(self.place, 'one', 2, '--steps', '2', '--bytes', '1M'))
        run = Run(self.place, 'two', 2, '--steps', '4', '--bytes', '1M', '--seed', '5')
        status, errors = run.finish()
        self.assertEqual(status, 1)
        self.assertIn('"seed":5', errors)
        self.assertIn('"seed":1', errors)

    def test_without_an_agent_training_goes_on_and_says_so(self):
        run = Run(self.place, 'alone', 2, '--steps', '4', '--save-every', '1',
                  HOLDFAST_PRIVATE='0')
        self.finish_ok(run, errors_allowed=True)
        self.check_losses(run, 1, 4)
        for rank in range(2):
            errors = run.events('holdfast_error')[rank]
            self.assertEqual([error['call'] for error in errors], ['hf_open'])


if __name__ == '__main__':
    unittest.main()
