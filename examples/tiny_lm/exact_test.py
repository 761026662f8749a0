#!/usr/bin/python3
"""Losses do not depend on how the job is laid out; an idle rank is small; errors name the thing.

Usage: exact_test.py LAUNCH TINY_LM CORPUS [--no-limits]   (--no-limits: a build with a sanitizer)
"""
import json
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import unittest

import runs

NO_LIMITS = '--no-limits' in sys.argv
if NO_LIMITS:
    sys.argv.remove('--no-limits')
LAUNCH, TINY_LM, CORPUS = sys.argv[1:4]
del sys.argv[1:4]
STEPS = 5
# Uneven in every way: samples over dp, micro-batches, layers over stages, heads, hidden units and
# vocabulary over tensor ranks; some ranks have no sample, no layer or no head.
MODEL = ('--layers', '3', '--batch', '7', '--bytes', '300K')
LAYOUTS = (
    (1, '--zero 0'), (1, '--zero 1 --micro-batch 1'), (1, '--zero 3'),
    (2, '--zero 0'), (3, '--zero 1 --micro-batch 1'), (5, '--zero 1'), (4, '--zero 2 --micro-batch 1'),
    (3, '--zero 3'), (8, '--zero 3 --micro-batch 2'),
    (2, '--tp 2'), (3, '--tp 3 --zero 0'), (4, '--tp 2 --zero 3'), (5, '--tp 5'),
    (2, '--pp 2 --micro-batch 1'), (3, '--pp 3 --pp-layers 2,0,1'), (3, '--pp 3 --pp-layers 0,2,1'),
    (4, '--pp 4 --micro-batch 2 --zero 0'), (4, '--pp 2 --zero 2 --micro-batch 1'),
    (6, '--pp 3 --zero 3 --micro-batch 1'), (6, '--pp 2 --zero 1 --pp-layers 1,2'),
    (4, '--pp 2 --tp 2 --micro-batch 2'), (6, '--pp 2 --tp 3 --zero 0'),
    (8, '--pp 2 --tp 2 --zero 3 --micro-batch 1'), (8, '--pp 2 --tp 2 --zero 2 --pp-layers 3,0'),
)


def train(world, *flags):
    return subprocess.run(
        ['/usr/bin/python3', LAUNCH, '--nproc', str(world), '--', TINY_LM, '--corpus', CORPUS,
         '--no-holdfast', *flags], capture_output=True, text=True, timeout=100)


def events(result, name):
    """Events of that name, by rank."""
    found = {}
    for line in result.stdout.splitlines():
        event = json.loads(line.split(' ', 1)[1])
        if event['event'] == name:
            found.setdefault(event['rank'], []).append(event)
    return found


def local_addresses(pid):
    """Of all TCP sockets of a process."""
    inodes = set()
    for descriptor in pathlib.Path('/proc/%d/fd' % pid).iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:  # closed since
            continue
        if target.startswith('socket:['):
            inodes.add(target[len('socket:['):-1])
    found = set()
    for line in pathlib.Path('/proc/%d/net/tcp' % pid).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[9] in inodes:
            found.add(socket.inet_ntoa(struct.pack('=I', int(fields[1].split(':')[0], 16))))
    return found


class ExactTest(unittest.TestCase):
    def run_ok(self, world, *flags):
        result = train(world, *flags)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result

    def check_layouts(self, *model):
        reference = None
        for world, flags in LAYOUTS:
            with self.subTest(world=world, flags=flags):
                result = self.run_ok(world, '--steps', str(STEPS), *MODEL, *model, *flags.split(),
                                     '--check-restore')
                steps = events(result, 'step')
                self.assertEqual(sorted(steps), list(range(world)))
                losses = [[(e['step'], e['samples'], e['loss'], e['overflows'])
                           for e in steps[rank]] for rank in range(world)]
                whole = runs.whole_digests(
                    digest[0]['pieces'] for digest in events(result, 'final_digest').values())
                if reference is None:
                    reference = losses[0], whole
                for rank in range(world):
                    self.assertEqual(losses[rank], reference[0], rank)
                self.assertEqual(whole, reference[1])
        self.assertEqual([step for step, _, _, _ in reference[0]], list(range(1, STEPS + 1)))
        self.assertEqual(len({loss for _, _, loss, _ in reference[0]}), STEPS)
        self.assertEqual({overflows for _, _, _, overflows in reference[0]}, {0})
        return reference

    def test_losses_and_states_are_bit_equal_in_every_layout_and_world(self):
        untied, tied = self.check_layouts(), self.check_layouts('--tied')
        self.assertNotEqual(untied[0], tied[0])
        self.assertEqual({key for key in untied[1] if key not in tied[1]},
                         {(state, 'head.weight')
                          for state in ('param', 'master', 'exp_avg', 'exp_avg_sq')})

    def test_it_learns(self):
        losses = [float.fromhex(e['loss'])
                  for e in events(self.run_ok(2, '--steps', '40', '--batch', '8'), 'step')[0]]
        self.assertLess(losses[-1], losses[0] - 0.7)

    def test_another_seed_gives_another_run(self):
        a, b = (events(self.run_ok(1, '--steps', '2', '--seed', seed), 'step')[0][1]['loss']
                for seed in '12')
        self.assertNotEqual(a, b)

    def test_a_rank_that_waits_is_small(self):
        if NO_LIMITS:
            self.skipTest('a sanitizer takes memory and time of its own')
        # Rank 1 has no sample: it only waits, sums and updates. Then it has no layer, and passes on.
        for world, flags in ((2, ()), (3, ('--pp', '3', '--pp-layers', '1,0,1'))):
            with self.subTest(flags=flags):
                result = self.run_ok(world, '--steps', '10', '--batch', '1', '--device-ms', '200',
                                     *flags)
                self.check_small(events(result, 'finished')[1][0])

    def check_small(self, idle):
        self.assertGreater(idle['rss_max_bytes'], 1 << 20)
        self.assertLessEqual(idle['rss_max_bytes'], 64 << 20)
        self.assertGreater(idle['wall_ms'], 2000)
        self.assertLess(idle['cpu_ms'], 0.05 * idle['wall_ms'])

    def test_each_rank_uses_the_address_that_it_was_given(self):
        with tempfile.TemporaryDirectory() as place:
            own_events = pathlib.Path(place, 'events')
            launch = subprocess.Popen(
                ['/usr/bin/python3', LAUNCH, '--nproc', '2', '--events', own_events, '--', '/bin/sh', '-c',
                 'COLLECTIVES_BIND_ADDR=127.0.0.$((RANK + 2)) exec "$@"', 'sh', TINY_LM, '--corpus',
                 CORPUS, '--no-holdfast', '--steps', '1000', '--device-ms', '100'],
                stdout=subprocess.PIPE, text=True)
            try:
                for line in launch.stdout:
                    if '"event":"step"' in line:
                        break
                starts = [json.loads(line) for line in own_events.read_text().splitlines()]
                addresses = {start['rank']: local_addresses(start['pid']) for start in starts}
            finally:
                launch.terminate()
                launch.communicate(timeout=60)
        # Rank 0 is met at MASTER_ADDR besides.
        self.assertEqual(addresses[0] - {'127.0.0.1'}, {'127.0.0.2'})
        self.assertEqual(addresses[1], {'127.0.0.3'})

    def test_errors_name_the_thing(self):
        result = train(1, '--corpus', '/nowhere/text.md')
        self.assertEqual(result.returncode, 1)
        self.assertIn('/nowhere/text.md', result.stderr)
        result = train(3, '--tp', '2')
        self.assertEqual(result.returncode, 1)
        self.assertIn('--pp 1 --tp 2: expected a multiple of 2 ranks, found 3', result.stderr)
        result = subprocess.run([TINY_LM, '--corpus', CORPUS, '--no-holdfast'], env={},
                                capture_output=True, text=True, timeout=100)
        self.assertEqual(result.returncode, 1)
        self.assertIn('WORLD_SIZE', result.stderr)


if __name__ == '__main__':
    unittest.main()
