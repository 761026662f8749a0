#!/usr/bin/python3
"""scripts/gpu_check.py where there is no GPU says so and ends with 77, and where nothing works it tries everything all
the same and keeps what it has found; and the interval that its figures and those of bench/profiler.py stand on holds
the median as often as it claims. (Whether its checks work is for `scripts/gpu-check --rehearse` to show.)"""

import contextlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import unittest

from tree import ROOT

sys.dont_write_bytecode = True
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "scripts")]
import gpu_check  # noqa: E402  (the paths come first)
import pairs  # noqa: E402
import profiler  # noqa: E402


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

    def run_it(self, *arguments):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        out = pathlib.Path(directory.name)
        result = subprocess.run(
            [sys.executable, ROOT / "scripts" / "gpu_check.py", "--rehearse", "--out", out, *arguments],
            capture_output=True, text=True, timeout=60)
        return result, json.loads((out / "report.json").read_text()), out

    def test_where_everything_fails_everything_is_tried_and_kept(self):
        # Beside this program there is none of those that the folder of a bundle has.
        result, report, out = self.run_it()
        self.assertEqual(result.returncode, 1, result.stderr)
        outcomes = {line["name"]: line["outcome"] for line in report["checks"]}
        for name in ("the programs start here", "holdfast doctor", "device_capture_test", "tiny_lm --device",
                     "arrays of numpy", "capture and restore, measured", "the agent"):
            self.assertEqual(outcomes.get(name), "FAILED", name)
            self.assertIn(name, result.stdout)
        self.assertIn("libc", report["about"])
        with tarfile.open(out / "recordings.tar.gz") as archive:
            self.assertIn("gpu-check/agent.log", archive.getnames())

    def test_without_time_nothing_is_begun_and_that_is_no_success(self):
        result, report, _ = self.run_it("--seconds", "0")
        self.assertEqual(result.returncode, 1)
        self.assertIn("nothing was checked", result.stdout)
        self.assertEqual({line["outcome"] for line in report["checks"]}, {"skipped"})

    def report(self, seconds=60):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        return gpu_check.Report(pathlib.Path(directory.name), seconds)

    def test_what_a_check_raises_is_said_and_on_disk_before_the_next_begins(self):
        report = self.report()
        for raised in (gpu_check.Failure("f"), KeyError("k"), ZeroDivisionError("z"), AssertionError("a")):
            def body(raised=raised):
                raise raised
            with contextlib.redirect_stdout(io.StringIO()):
                self.assertFalse(report.step("one", body))
            kept = json.loads((report.out / "report.json").read_text())
            self.assertEqual(kept["checks"][-1]["outcome"], "FAILED")
            self.assertIn(type(raised).__name__, kept["checks"][-1]["detail"])

    def test_a_signal_ends_a_check_that_would_not_end(self):
        report = self.report()
        before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)}
        gpu_check.stop_in_time(60)
        try:
            with self.assertRaisesRegex(gpu_check.OutOfTime, "SIGTERM"):
                report.step("endless", lambda: os.kill(os.getpid(), signal.SIGTERM) or signal.pause())
        finally:
            signal.alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def test_what_is_too_large_is_not_kept_and_named(self):
        with tempfile.TemporaryDirectory() as directory:
            files = pathlib.Path(directory, "files")
            files.mkdir()
            (files / "small").write_bytes(b"s")
            with open(files / "large", "wb") as large:
                large.truncate(gpu_check.KEPT_BYTES_MAX + 1)
            archive = pathlib.Path(directory, "archive")
            self.assertEqual(gpu_check.pack(files, archive), ["large"])
            with tarfile.open(archive) as kept:
                self.assertEqual(kept.getnames(), ["gpu-check/small"])

    def test_the_interval_holds_the_median_in_95_of_100_series(self):
        seed = int(os.environ.get("HOLDFAST_TEST_SEED", "1"))
        print(f"seed {seed}")
        generator = random.Random(seed)
        for count, series in ((6, 2000), (9, 2000), (20, 2000), (40, 2000), (2500, 60)):
            held = 0
            for _ in range(series):
                # Skewed, as times are; the median of exp(x) with x around 0 is 1.
                ours = [generator.lognormvariate(0, 0.3) for _ in range(count)]
                _, low, high = pairs.paired_ratio(ours, [1.0] * count)
                held += low <= 1.0 <= high
            # Of few series some less, or all, hold by chance.
            self.assertGreaterEqual(held / series, 0.94 if series >= 2000 else 0.85, count)
            if series >= 2000:
                self.assertLessEqual(held / series, 0.99, count)

    def test_a_ratio_is_of_pairs_and_few_pairs_give_the_extremes(self):
        ratio, low, high = pairs.paired_ratio([2.0, 40.0, 600.0], [1.0, 10.0, 100.0])
        self.assertEqual((ratio, low, high), (4.0, 2.0, 6.0))

    def test_neighbouring_blocks_are_compared_and_steps_across_a_change_are_not(self):
        def block(on, *steps):
            return [{"event": "gate", "on": on}, *({"event": "step", "ms": {"a": ms, "b": 0.5}} for ms in steps)]

        # The first step of a block began before it; a block with hardly a step says nothing; where a change
        # was lost, two of one kind are neighbours.
        events = [{"event": "step", "ms": {"a": 99}}]
        for _ in range(profiler.BLOCKS_OF_START):
            events += block(True, *[50] * 8)
        for on, ms in ((True, 2), (False, 1), (False, 3), (True, 4), (True, 7), (False, 5)):
            events += block(on, 1000, *[ms] * 6)
        events += block(True, 1, 2, 3) + block(False, 1000, *[9] * 6) + block(True, 1000, *[8] * 6)
        self.assertEqual(profiler.pairs_of(profiler.blocks_of(events)),
                         [(2.5, 1.5), (4.5, 3.5), (7.5, 5.5), (8.5, 9.5)])


if __name__ == "__main__":
    unittest.main()
