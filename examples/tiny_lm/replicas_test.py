#!/usr/bin/python3
"""HOLDFAST_COPIES=all: in a training that is exact every replica is the same on all ranks and every save
is committed, in every layout; a flipped bit is refused with rank, tensor and element, and costs no more
than the steps since the checkpoint before.

Usage: replicas_test.py LAUNCH TINY_LM HOLDFASTD CORPUS
"""
import functools
import pathlib
import sys
import tempfile
import unittest

import runs

LAUNCH, TINY_LM, HOLDFASTD, CORPUS = sys.argv[1:5]
del sys.argv[1:5]
Run = functools.partial(runs.Run, (LAUNCH, TINY_LM, HOLDFASTD, CORPUS))
DATA_LOSS = 15
LAYOUTS = (
    (4, '--zero 0 --bytes 300K'),
    (4, '--zero 1 --bytes 300K'),
    (3, '--zero 2'),
    (3, '--zero 3'),
    (2, '--tp 2'),
    (6, '--tp 3 --zero 0'),
    (4, '--tp 2 --zero 1 --tied'),
    (3, '--pp 3 --pp-layers 1,0,2 --tied'),
    (6, '--pp 3 --tp 2'),
    (8, '--pp 2 --tp 2 --zero 1 --tied'),
    (8, '--pp 2 --tp 2 --zero 3'),
)
# tensor, its shape's last dimension, element
TENSOR, ROW, ELEMENT = 'layers.1.attention.out.weight', 32, 77


def flip(rank, step, state='param', element=ELEMENT):
    return ('--flip-bit', 'rank=%d,step=%d,tensor=%s,state=%s,element=%d,bit=3' % (
        rank, step, TENSOR, state, element))


class ReplicasTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.reference = runs.undisturbed_losses(LAUNCH, TINY_LM, CORPUS, 8)

    def setUp(self):
        directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(directory.cleanup)
        self.place = directory.name

    def start(self, name, world, *flags):
        return Run(self.place, name, world, *flags, HOLDFAST_COPIES='all')

    def finish(self, run):
        status, errors = run.finish()
        self.assertEqual(status, 0, errors)

    def test_every_layout_commits_what_is_equal(self):
        for world, flags in LAYOUTS:
            with self.subTest(world=world, flags=flags):
                self.place = tempfile.mkdtemp(dir=self.place)
                run = self.start('run', world, *flags.split(), '--layers', '3', '--batch', '5',
                                 '--steps', '3', '--save-every', '1')
                self.finish(run)
                self.assertEqual(run.events('holdfast_error'), {})
                saves = [save for rank in run.events('save_ended').values() for save in rank]
                self.assertEqual([save['state'] for save in saves],
                                 3 * world * ['committed_power'])
                # And extra copies there were, of all but what ZeRO-3 leaves nobody else to hold.
                copied = sum(save['blocks'] - save['blocks_flushed'] for save in saves)
                self.assertGreater(copied, 0)

    def refusals(self, run, world, step):
        """The text of the refused save of `step`, which all ranks were told."""
        texts = [save['error'] for events in run.events('save_ended').values() for save in events
                 if save['step'] == step and save['state'] == 'failed']
        self.assertEqual(len(texts), world)
        self.assertEqual(len(set(texts)), 1)
        return texts[0]

    def check_a_flip(self, world, zero, rank, named):
        run = self.start('flipped', world, '--zero', str(zero), '--steps', '4', '--save-every',
                         '2', *flip(rank, 4))
        self.finish(run)
        self.assertEqual([event[0]['step'] for event in run.events('bit_flipped').values()], [4])
        text = self.refusals(run, world, 4)
        for part in ('step 4 of attempt 1 was not committed', 'replicas differ', named,
                     'tensor "%s", state "param"' % TENSOR,
                     'element %d (at [%d, %d])' % (ELEMENT, ELEMENT // ROW, ELEMENT % ROW)):
            self.assertIn(part, text)
        # Whoever waits for that step is told the same, by every rank.
        errors = [event for events in run.events('holdfast_error').values() for event in events]
        self.assertEqual([(error['call'], error['code']) for error in errors],
                         world * [('hf_wait_committed', DATA_LOSS)])
        self.assertIn(named, errors[0]['text'])
        log = next(pathlib.Path(self.place, 'run').rglob('agent.log')).read_text()
        self.assertIn(named, log)

        # The checkpoint before is where the next run goes on, exactly.
        after = self.start('after', world, '--zero', str(zero), '--steps', '8', '--save-every',
                           '2')
        self.finish(after)
        self.assertEqual({event[0]['step'] for event in after.events('restored').values()}, {2})
        self.assertEqual(after.losses(), {step: self.reference[step] for step in range(3, 9)})
        self.assertEqual(after.events('holdfast_error'), {})
        self.assertEqual(len(after.events('committed')), world)

    def test_of_four_ranks_the_one_that_differs_is_named(self):
        self.check_a_flip(4, 1, 2, 'rank 2 differs from ranks 0, 1, 3')

    def test_of_two_ranks_nobody_is_blamed(self):
        self.check_a_flip(2, 0, 1, 'rank 0 and rank 1 differ from each other, without a majority')

    def test_a_rank_that_stays_different_is_refused_until_it_is_restored(self):
        run = self.start('flipped', 3, '--zero', '0', '--steps', '6', '--save-every', '2',
                         *flip(0, 4, 'exp_avg'))
        self.finish(run)
        for step in (4, 6):
            self.assertIn('rank 0 differs from ranks 1, 2', self.refusals(run, 3, step))
        after = self.start('after', 3, '--zero', '0', '--steps', '8')
        self.finish(after)
        self.assertEqual({event[0]['step'] for event in after.events('restored').values()}, {2})
        self.assertEqual(after.losses(), {step: self.reference[step] for step in range(3, 9)})
        self.assertEqual(after.events('holdfast_error'), {})

    def test_nobody_sees_it_where_copies_are_captured_once(self):
        run = Run(self.place, 'once', 3, '--zero', '0', '--steps', '2', '--save-every', '2',
                  *flip(1, 2))
        self.finish(run)
        self.assertEqual(run.events('holdfast_error'), {})
        self.assertEqual(len(run.events('committed')), 3)

    def test_an_element_that_is_not_there_is_refused_by_name(self):
        run = self.start('wrong', 2, '--steps', '2', *flip(1, 1, element=10 ** 9))
        status, errors = run.finish()
        self.assertEqual(status, 1)
        self.assertIn('rank 1 has no bit 3 of element 1000000000', errors)


if __name__ == '__main__':
    unittest.main()
