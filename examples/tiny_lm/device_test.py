#!/usr/bin/python3
"""tiny_lm with its tensors in the memory of a CUDA device, by a driver without a GPU (tests/support/fake_cuda):
the losses are those of host memory bit for bit, what is captured from a device is restored to devices and to
host memory and the other way round, and a machine without a driver says so.

Usage: device_test.py LAUNCH TINY_LM HOLDFASTD CORPUS FAKE_CUDA_DIRECTORY
"""
import ctypes
import sys
import tempfile
import unittest

import runs

LAUNCH, TINY_LM, HOLDFASTD, CORPUS, FAKE_CUDA = sys.argv[1:6]
del sys.argv[1:6]
PROGRAMS = LAUNCH, TINY_LM, HOLDFASTD, CORPUS
STEPS_A_RUN = 3
# (ranks, layout, on a device)
CHAIN = ((2, '--zero 1', True), (2, '--tp 2 --zero 0', True), (3, '--zero 3', False), (2, '--pp 2 --zero 1', True),
         (1, '--zero 0', False))


class DeviceTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(directory.cleanup)
        self.place = directory.name

    def test_either_goes_on_from_the_other_bit_for_bit(self):
        reference = runs.undisturbed_losses(LAUNCH, TINY_LM, CORPUS, STEPS_A_RUN * len(CHAIN))
        before = None
        for i, (world, layout, on_device) in enumerate(CHAIN):
            with self.subTest(run=i, layout=layout, on_device=on_device):
                first, last = STEPS_A_RUN * i + 1, STEPS_A_RUN * (i + 1)
                run = runs.Run(PROGRAMS, self.place, 'run-%d' % i, world, *layout.split(), '--steps', str(last),
                               '--save-every', '2', '--bytes', '1M', *(['--device'] if on_device else []),
                               LD_LIBRARY_PATH=FAKE_CUDA)
                status, errors = run.finish()
                self.assertEqual(status, 0, errors)
                self.assertEqual(run.events('holdfast_error'), {})
                self.assertEqual(run.losses(), {step: reference[step] for step in range(first, last + 1)})
                restored = run.events('restored')
                self.assertEqual({events[0]['step'] for events in restored.values()},
                                 {first - 1} if i > 0 else set())
                if i > 0:
                    self.assertEqual(run.digests('restore_digest'), before)
                before = run.digests('final_digest')
                self.check_saves(run, world, on_device)

    def check_saves(self, run, world, on_device):
        saves = [event for events in run.events('save_ended').values() for event in events]
        self.assertEqual(len({event['rank'] for event in saves}), world)
        for event in saves:
            self.assertEqual(event['state'], 'committed_power', event)
            # All tensors, and nothing else of the image.
            if on_device:
                self.assertGreater(event['device_bytes'], 0)
                self.assertLess(event['device_bytes'], event['image_bytes'])
            else:
                self.assertEqual(event['device_bytes'], 0)

    def refused(self, **environment):
        run = runs.Run((LAUNCH, TINY_LM, None, CORPUS), self.place, 'refused', 1, '--device', '--steps', '1',
                       **environment)
        status, errors = run.finish()
        self.assertEqual(status, 1)
        return errors

    def test_a_driver_without_a_device_is_named(self):
        errors = self.refused(LD_LIBRARY_PATH=FAKE_CUDA, HOLDFAST_FAKE_CUDA='absent')
        self.assertIn('cuInit: CUDA_ERROR_NO_DEVICE (100)', errors)

    def test_no_driver_is_named(self):
        try:
            ctypes.CDLL('libcuda.so.1')
            self.skipTest('there is an NVIDIA driver here: 1 skipped')
        except OSError:
            pass
        self.assertIn('no CUDA driver: libcuda.so.1: cannot open', self.refused(LD_LIBRARY_PATH=''))


if __name__ == '__main__':
    unittest.main()
