#!/usr/bin/python3
"""Every fault that tiny_lm makes itself acts on the rank and at the step that its line says, for as long as
it says, and changes nothing of what is computed (but for `nan`, which is there for that).

Usage: self_faults_test.py LAUNCH TINY_LM CORPUS
"""
import functools
import pathlib
import sys
import tempfile
import unittest

import runs

LAUNCH, TINY_LM, CORPUS = sys.argv[1:4]
del sys.argv[1:4]
Run = functools.partial(runs.Run, (LAUNCH, TINY_LM, None, CORPUS))
WORLD = 3
# Of a stall of 750 ms others see at least this in their whole step: wherever in it they are late by themselves, it
# takes no less. Between two steps they may be late, too.
STALL_MS = 150


class SelfFaultsTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        self.place = self.directory.name

    def run_with(self, name, lines, *flags, **environment):
        file = pathlib.Path(self.place, name + '.faults')
        file.write_text('\n'.join(lines) + '\n')
        # Whoever failed first has told his peers before he could print why: nobody is stopped meanwhile.
        run = Run(self.place, name, WORLD, '--faults', str(file), *flags, on_failure='wait', **environment)
        return run, *run.finish()

    def test_each_acts_where_and_when_its_line_says(self):
        steps = 18
        lines = {
            3: 'slow-compute rank=1 factor=30 from_step=3 steps=1',
            5: 'slow-data rank=2 seconds=0.25 from_step=5 steps=1',
            7: 'pause rank=0 seconds=0.75 section=evaluation from_step=7 steps=1',
            9: 'gpu-hang rank=1 seconds=0.75 from_step=9',
            11: 'flush-stall rank=1 seconds=0.75 from_step=11',
            13: 'never-enter rank=2 seconds=0.75 from_step=13',
            15: 'endless-loop rank=0 seconds=0.75 from_step=15',
            17: 'nan rank=1 from_step=17',
        }
        run, status, errors = self.run_with(
            'each', lines.values(), '--steps', str(steps), '--device-ms', '10', '--all-reduce', '100K',
            '--all-to-all', '50K', COLLECTIVES_RINGS='2', COLLECTIVES_CHUNK_BYTES='4096')
        self.assertEqual(status, 0, errors)
        acted = {event['step']: (event['line'], rank)
                 for rank, events in run.events('fault').items() for event in events}
        self.assertEqual(acted, {step: (line, int(line.split('rank=')[1][0]))
                                 for step, line in lines.items()})
        step_events = {(rank, event['step']): event
                       for rank, events in run.events('step').items() for event in events}
        ms = {key: event['ms'] for key, event in step_events.items()}
        self.assertGreaterEqual(ms[1, 3]['forward_backward'], 300)
        self.assertGreaterEqual(ms[2, 5]['data'], 250)
        # The others wait for a rank that pauses, and for one that does not come or not go on.
        for step in (7, 9, 11, 13, 15):
            for rank in set(range(WORLD)) - {int(lines[step].split('rank=')[1][0])}:
                self.assertGreaterEqual(sum(ms[rank, step].values()), STALL_MS, (rank, step))
        undisturbed = runs.undisturbed_losses(LAUNCH, TINY_LM, CORPUS, steps)
        losses = run.losses()
        for step in range(1, 18):
            self.assertEqual(losses[step], undisturbed[step], step)
        self.assertGreater(step_events[0, 18]['overflows'], 0)
        self.assertEqual(step_events[0, 17]['overflows'], 0)

    def test_ranks_that_disagree_fail_or_hang(self):
        for kind in ('wrong-size', 'wrong-kind'):
            line = kind + ' rank=1 from_step=2'
            run, status, errors = self.run_with(kind, [line], '--steps', '4')
            self.assertNotEqual(status, 0)
            self.assertIn('ranks disagree', errors)
            self.assertEqual(list(run.events('fault')), [1])
            run, status, errors = self.run_with(kind + '-hang', [line], '--steps', '4',
                                                COLLECTIVES_LOST_PEER='hang:1')
            self.assertNotEqual(status, 0)
            self.assertIn('1s of silence', errors)

    def test_a_rank_leaves_with_the_status_it_is_told(self):
        _, status, errors = self.run_with('exit', ['exit rank=2 status=7 from_step=2'], '--steps', '4')
        self.assertNotEqual(status, 0)
        self.assertIn('rank 2 ended with status 7', errors)

    def test_a_file_that_is_not_understood_is_refused_by_all_and_harms_nobody(self):
        run, status, errors = self.run_with('bad', ['nan rank=all', 'what is this'], '--steps', '3')
        self.assertEqual(status, 0, errors)
        refused = run.events('faults_refused')
        self.assertEqual(sorted(refused), list(range(WORLD)))
        for events in refused.values():
            self.assertEqual(len(events), 1)
            self.assertIn("line 2: expected a kind of fault, found 'what'", events[0]['text'])
        self.assertEqual(run.events('fault'), {})


if __name__ == '__main__':
    unittest.main()
