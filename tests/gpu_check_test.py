#!/usr/bin/python3
"""scripts/gpu_check.py where there is no GPU says so and ends with 77; and the interval that its figures and
those of bench/profiler.py stand on holds the median as often as it claims."""

import os
import pathlib
import random
import subprocess
import sys
import unittest

from tree import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import pairs  # noqa: E402  (the path comes first)


class GpuCheckTest(unittest.TestCase):
    def test_without_a_gpu_it_says_so(self):
        if pathlib.Path("/dev/nvidiactl").exists():
            self.skipTest("there is an NVIDIA GPU here: 1 skipped")
        result = subprocess.run([sys.executable, ROOT / "scripts" / "gpu_check.py"], capture_output=True, text=True,
                                env=dict(os.environ, PATH="/nowhere"), timeout=60)
        self.assertEqual(result.returncode, 77, result.stderr)
        self.assertIn("no NVIDIA GPU here", result.stderr)
        self.assertIn("nothing was checked", result.stderr)
        self.assertEqual(result.stdout, "")

    def test_the_interval_holds_the_median_in_95_of_100_series(self):
        seed = int(os.environ.get("HOLDFAST_TEST_SEED", "1"))
        print(f"seed {seed}")
        generator = random.Random(seed)
        for count in (6, 9, 20, 40):
            held = 0
            for _ in range(2000):
                # Skewed, as times are; the median of exp(x) with x around 0 is 1.
                ours = [generator.lognormvariate(0, 0.3) for _ in range(count)]
                _, low, high = pairs.paired_ratio(ours, [1.0] * count)
                held += low <= 1.0 <= high
            self.assertGreaterEqual(held / 2000, 0.94, count)
            self.assertLessEqual(held / 2000, 0.99, count)

    def test_a_ratio_is_of_pairs_and_few_pairs_give_the_extremes(self):
        ratio, low, high = pairs.paired_ratio([2.0, 40.0, 600.0], [1.0, 10.0, 100.0])
        self.assertEqual((ratio, low, high), (4.0, 2.0, 6.0))


if __name__ == "__main__":
    unittest.main()
