#!/usr/bin/python3
"""What one layout saves, every other goes on from, bit for bit.

A chain of runs: each goes on from what the one before has saved, in another layout, and saves in its
turn; and what each has saved is also the start of further runs that save nothing. Every pair is checked
twice: the digests of all restored tensors are those of what was saved, and the losses from there on are
those of a run that nobody interrupted.

Usage: matrix_test.py LAUNCH TINY_LM HOLDFASTD CORPUS
"""
import os
import sys
import tempfile
import unittest

import runs

LAUNCH, TINY_LM, HOLDFASTD, CORPUS = sys.argv[1:5]
del sys.argv[1:5]
PROGRAMS = LAUNCH, TINY_LM, HOLDFASTD, CORPUS
MODEL = ('--layers', '3', '--batch', '5', '--bytes', '200K')
STEPS_A_RUN = 2
LAYOUTS = (
    (4, '--zero 1'),
    (2, '--tp 2'),
    (3, '--pp 3 --pp-layers 1,0,2'),
    (3, '--zero 3'),
    (4, '--tp 2 --zero 3'),
    (1, '--zero 0'),
    (4, '--pp 2 --zero 2'),
    (3, '--tp 3 --zero 0'),
    (6, '--pp 3 --tp 2 --zero 1'),
    (5, '--zero 2'),
    (4, '--pp 2 --zero 3 --pp-layers 3,0'),
    (8, '--pp 2 --tp 2 --zero 3'),
)


class MatrixTest(unittest.TestCase):
    def run_ok(self, name, layout, steps, *flags):
        world, layout_flags = layout
        environment = {'HOLDFAST_LINGER': '60s'}  # until the next run has come
        if not self.from_memory:  # no run finds the agent of the one before
            environment = {'HOLDFAST_RUNTIME_DIR': os.path.join(self.place, 'agent-of-' + name),
                           'HOLDFAST_LINGER': '0s'}
        run = runs.Run(PROGRAMS, self.place, name, world, *MODEL, *self.model,
                       *layout_flags.split(), '--steps', str(steps), '--save-every', '1000', *flags,
                       **environment)
        status, errors = run.finish()
        self.assertEqual(status, 0, errors)
        self.assertEqual(run.events('holdfast_error'), {})
        return run

    def check(self, run, world, saved_step, saved):
        """`run` has gone on from `saved`, the digests of what was saved at `saved_step`."""
        self.assertEqual([event[0]['step'] for event in run.events('restored').values()],
                         [saved_step] * world)
        self.assertEqual(run.digests('restore_digest'), saved)
        expected = {step: self.reference[step]
                    for step in range(saved_step + 1, saved_step + STEPS_A_RUN + 1)}
        self.assertEqual(run.losses(), expected)
        for event in run.events('restored').values():
            self.assertGreater(event[0]['bytes'], 0)
            self.assertEqual(event[0]['bytes_from_memory'],
                             event[0]['bytes'] if self.from_memory else 0)

    def check_chain(self, layouts, reach, model, from_memory):
        """Each layout saves, and the `reach` after it in the (closed) chain go on. Returns pairs."""
        self.model, self.from_memory = model, from_memory
        pairs = 0
        directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(directory.cleanup)
        self.place = directory.name
        count = len(layouts)
        reference = runs.Run((LAUNCH, TINY_LM, None, CORPUS), self.place, 'reference', 1, *MODEL,
                             *model, '--steps', str(STEPS_A_RUN * (count + 2)))
        status, errors = reference.finish()
        self.assertEqual(status, 0, errors)
        self.reference = reference.losses()
        self.assertEqual(len(set(self.reference.values())), STEPS_A_RUN * (count + 2))

        saver = self.run_ok('save-0', layouts[0], STEPS_A_RUN)
        self.assertEqual(saver.events('restored'), {})
        for source in range(count):
            step = STEPS_A_RUN * (source + 1)
            saved = saver.digests('final_digest')
            for ahead in range(reach, 0, -1):
                target = layouts[(source + ahead) % count]
                with self.subTest(saved_by=layouts[source], restored_by=target):
                    last = ahead == 1
                    run = self.run_ok('%s-%d' % ('save' if last else 'read-%d' % ahead, source + 1),
                                      target, step + STEPS_A_RUN,
                                      *(() if last else ('--no-wait-committed-at-end',)))
                    self.check(run, target[0], step, saved)
                    pairs += 1
            saver = run
        return pairs

    def test_every_layout_goes_on_from_others_out_of_memory(self):
        self.assertEqual(self.check_chain(LAYOUTS, 2, (), from_memory=True), 24)

    def test_a_tied_embedding_on_one_stage_or_two_out_of_storage(self):
        self.assertEqual(self.check_chain(LAYOUTS[2:], 1, ('--tied',), from_memory=False), 10)


if __name__ == '__main__':
    unittest.main()
