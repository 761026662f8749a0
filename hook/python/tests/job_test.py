#!/usr/bin/python3
"""holdfast.Job against the real library and a real private agent.

Usage: job_test.py HOLDFASTD        ($HOLDFAST_LIBRARY: the library)
"""
import gc
import json
import os
import signal
import sys
import threading
import time
import unittest
import weakref

import numpy

import holdfast
from holdfast import (Blob, Buffer, CheckSource, Faults, Job, RestoreFrom, SaveState,
                      Scope)
from support import DEADLINE_SECONDS, Place

DAEMON = sys.argv.pop(1)

LAYOUT = {
    "holdfast_layout": 1, "mesh": [{"axis": "dp", "size": 1}],
    "tensors": [{"name": "w", "shape": [3, 5],
                 "states": [{"state": "param", "dtype": "float32"},
                            {"state": "exp_avg", "dtype": "float64"}]}]}
BLOBS = [Blob("rng", Scope.RANK, 16), Blob("args", Scope.GLOBAL, 100)]


def arrays(seed=0):
    rng = numpy.random.default_rng(seed)
    return rng.random((3, 5), numpy.float32), rng.random((3, 5))


def buffers(w, m):
    return [Buffer("param/w", w), Buffer("exp_avg/w", m, group=1)]


class JobTest(unittest.TestCase):
    def setUp(self):
        self.place = Place(self.addCleanup, DAEMON)
        self.place.use()

    def open(self, **options):
        options = {"job": "test", "rank": 0, "world_size": 1, **options}
        job = Job(**options)
        self.addCleanup(job.close)
        return job

    def open_registered(self, seed=0, **options):
        job = self.open(**options)
        w, m = arrays(seed)
        job.register(LAYOUT, buffers(w, m), BLOBS)
        return job, w, m

    def test_what_was_committed_is_restored_bit_for_bit(self):
        for from_storage in (False, True):
            with self.subTest(from_storage=from_storage):
                job, w, m = self.open_registered(seed=1, job=f"test-{from_storage}")
                job.save(7, {"rng": b"\0\1", "args": bytearray(b"x" * 100)}, wait=30)
                job.wait_captured(0)
                job.wait_captured()
                job.wait_committed(7, Faults.PROCESS | Faults.POWER)
                report = job.report()
                self.assertEqual(report, job.report(7))
                self.assertEqual((report.step, report.state, report.error),
                                 (7, SaveState.COMMITTED_POWER, None))
                self.assertEqual(report.blocks, report.blocks_flushed)
                self.assertGreater(report.commit_ns, report.capture_ns)
                info = job.info()
                self.assertEqual((info.attempt, info.committed_power_step, info.image_bytes),
                                 (1, 7, report.image_bytes))
                self.assertEqual((info.fenced, info.connected), (False, True))
                job.close()
                if from_storage:
                    self.place.kill_agent()
                job, w2, m2 = self.open_registered(seed=2, job=f"test-{from_storage}")
                restored = job.restore()
                self.assertEqual((restored.step, restored.attempt, restored.world_size), (7, 1, 1))
                self.assertEqual(restored.bytes, w.nbytes + m.nbytes)
                self.assertEqual(restored.bytes_from_memory, 0 if from_storage else restored.bytes)
                self.assertEqual((w2.tobytes(), m2.tobytes()), (w.tobytes(), m.tobytes()))
                self.assertEqual(job.restored_blob("rng"), b"\0\1")
                self.assertEqual(job.restored_blob("rng", 0), b"\0\1")
                self.assertEqual(job.restored_blob("args"), b"x" * 100)
                self.assertEqual(job.info().attempt, 2)
                job.close()

    def test_a_new_job_starts_from_another_jobs_checkpoint(self):
        job, w, m = self.open_registered(seed=1, job="pretraining")
        job.save(7, {"rng": b"7", "args": b"of 7"}, wait=30)
        job.wait_captured()
        job.wait_committed(7)
        job.close()
        newest = self.place.root / "pretraining"
        directory = newest / "s000000000007.a0001"
        # By name, by variable, and from where the program runs.
        os.environ["HOLDFAST_RESTORE_FROM"] = str(newest)
        here = os.getcwd()
        os.chdir(self.place.root)
        self.addCleanup(os.chdir, here)
        for name, options in (("a", {"restore_from": str(directory)}), ("b", {}),
                              ("c", {"restore_from": "pretraining"})):
            with self.subTest(options=options):
                job, w2, m2 = self.open_registered(seed=2, job=name, **options)
                restored = job.restore()
                self.assertEqual((restored.step, restored.attempt, restored.restore_from),
                                 (7, 1, RestoreFrom.USED))
                self.assertEqual((restored.tensor_states, restored.tensor_states_left_out), (2, 0))
                self.assertEqual((w2.tobytes(), m2.tobytes()), (w.tobytes(), m.tobytes()))
                self.assertEqual(job.restored_blob("args"), b"of 7")
                job.save(8, wait=30)
                job.wait_captured()
                job.wait_committed(8)
                job.close()
                manifest = self.place.root / name / "s000000000008.a0001" / "MANIFEST.json"
                self.assertIsNone(json.loads(manifest.read_text())["parent"])
                # From now on it has a restore point of its own.
                job, _, _ = self.open_registered(job=name, **options)
                restored = job.restore()
                self.assertEqual((restored.step, restored.restore_from), (8, RestoreFrom.IGNORED))
                job.close()
        job, _, _ = self.open_registered(job="d", restore_from="")
        with self.assertRaises(holdfast.NotFound):
            job.restore()
        job.close()

    def test_what_cannot_be_started_from_is_never_a_new_run(self):
        (self.place.root / "empty").mkdir()
        damaged = self.open_registered(job="damaged")[0]
        damaged.save(1, wait=30)
        damaged.wait_captured()
        damaged.wait_committed(1)
        damaged.close()
        manifest = self.place.root / "damaged" / "s000000000001.a0001" / "MANIFEST.json"
        text = bytearray(manifest.read_bytes())
        text[20] ^= 1
        manifest.chmod(0o600)
        manifest.write_bytes(text)
        for number, (path, error) in enumerate((
                ("nothing", holdfast.InvalidArgument), ("empty", holdfast.InvalidArgument),
                ("damaged", holdfast.DataLoss), (manifest.parent, holdfast.DataLoss))):
            with self.subTest(path=path):
                job, _, _ = self.open_registered(job=f"new-{number}",
                                                 restore_from=str(self.place.root / path))
                for _ in range(2):
                    with self.assertRaises(error) as caught:
                        job.restore()
                    self.assertIn(str(self.place.root / path), str(caught.exception))
                    self.assertNotIsInstance(caught.exception, holdfast.NotFound)
                job.close()
        with self.assertRaises(holdfast.InvalidArgument):
            self.open(restore_from="a\0b")

    def test_ranks_that_name_different_ones_are_told_so(self):
        first = self.open(world_size=2, restore_from="/a/job")
        with self.assertRaises(holdfast.InvalidArgument) as caught:
            self.open(rank=1, world_size=2, restore_from="/b/job")
        self.assertIn("/a/job", str(caught.exception))
        self.assertIn("/b/job", str(caught.exception))
        second = self.open(rank=1, world_size=2, restore_from="/a/job")
        self.assertEqual(first.info().attempt, second.info().attempt)

    def test_only_what_fits_the_patterns_is_restored(self):
        job, w, m = self.open_registered(seed=1)
        job.save(7, {"args": b"x"}, wait=30)
        job.wait_captured()
        job.wait_committed(7)
        job.close()
        job, w2, m2 = self.open_registered(seed=2)
        before = w2.tobytes()
        restored = job.restore(states=["exp_*"])
        self.assertEqual((restored.step, restored.bytes), (7, m.nbytes))
        self.assertEqual((restored.tensor_states, restored.tensor_states_left_out), (1, 1))
        self.assertEqual((w2.tobytes(), m2.tobytes()), (before, m.tobytes()))
        self.assertEqual(job.restored_blob("args"), b"x")
        restored = job.restore(tensors=["w"], states=["param"])
        self.assertEqual((w2.tobytes(), restored.bytes), (w.tobytes(), w.nbytes))
        for options, expected in (({"tensors": ["w", "q*"]}, '"q*"'),
                                  ({"states": ["params"]}, 'did you mean "param"'),
                                  ({"tensors": [""]}, "tensors[0]"),
                                  ({"tensors": "w"}, "list"), ({"tensors": ["a\0"]}, "NUL")):
            with self.subTest(options=options), \
                    self.assertRaises(holdfast.InvalidArgument) as caught:
                job.restore(**options)
            self.assertIn(expected, str(caught.exception))
        # A tensor that the checkpoint lacks is no error while it is left out.
        head = numpy.ones(4, numpy.float32)
        layout = dict(LAYOUT, tensors=LAYOUT["tensors"] + [
            {"name": "head", "shape": [4], "states": [{"state": "param", "dtype": "float32"}]}])
        job.register(layout, buffers(w2, m2) + [Buffer("param/head", head)], BLOBS)
        with self.assertRaises(holdfast.FailedPrecondition) as caught:
            job.restore()
        self.assertIn("head", str(caught.exception))
        w2[:] = 0
        restored = job.restore(tensors=["w"])
        self.assertEqual((restored.tensor_states, restored.tensor_states_left_out), (2, 1))
        self.assertEqual((w2.tobytes(), head.tolist()), (w.tobytes(), [1, 1, 1, 1]))

    def test_the_order_of_calls_is_checked(self):
        job = self.open()
        w, m = arrays()
        with self.assertRaises(holdfast.NotFound):
            job.report()
        with self.assertRaises(holdfast.FailedPrecondition):
            job.save(1)
        job.register(LAYOUT, buffers(w, m), BLOBS)
        with self.assertRaises(holdfast.NotFound):
            job.restore()
        job.wait_captured()  # nothing is being captured
        job.save(1, wait=30)
        with self.assertRaises(holdfast.FailedPrecondition):
            job.save(2)
        job.wait_captured()
        with self.assertRaises(holdfast.AlreadyExists):
            job.save(1, wait=30)
        with self.assertRaises(holdfast.NotFound):
            job.report(5)
        self.assertIs(job.due(2), False)
        job.heartbeat(2)
        with job.section("evaluation"), job.section("a name of more than thirty-one bytes, cut"):
            pass
        job.close()
        job.close()
        for call in (job.info, job.restore, job.report, job.section_end, lambda: job.save(3),
                     lambda: job.due(3), lambda: job.heartbeat(3)):
            with self.assertRaises(holdfast.FailedPrecondition) as caught:
                call()
            self.assertIn("closed", str(caught.exception))

    def test_wrong_values_are_refused_with_what_and_why(self):
        job = self.open()
        w, m = arrays()
        for layout, given, blobs, expected in (
                ("{", buffers(w, m), (), "JSON line 1"),
                ("{}\0", buffers(w, m), (), "NUL"),
                (LAYOUT, [("param/w", w)], (), "exp_avg/w"),
                (LAYOUT, buffers(w[:2].copy(), m), (), "param/w"),
                (LAYOUT, buffers(w.T, m), (), "param/w"),
                (LAYOUT, [("param/w", w, -1), ("exp_avg/w", m)], (), "group"),
                (LAYOUT, [("param/w", w, 64), ("exp_avg/w", m)], (), "group"),
                (LAYOUT, buffers(w, m), [("b", 0, -1)], "capacity_bytes"),
                (LAYOUT, buffers(w, m), [("b", 0, 1), ("b", 1, 1)], "'b'"),
                (LAYOUT, buffers(w, m), [("b\0c", 0, 1)], "NUL")):
            with self.subTest(expected=expected), \
                    self.assertRaises(holdfast.InvalidArgument) as caught:
                job.register(layout, given, blobs)
            self.assertIn(expected, str(caught.exception))
            self.assertIsInstance(caught.exception, ValueError)
        job.register(LAYOUT, buffers(w, m), BLOBS)
        for call, expected in (
                (lambda: job.save(1, {"other": b""}), "'other'"),
                (lambda: job.save(1, {"rng": b"x" * 17}), "at most 16 bytes, found 17"),
                (lambda: job.save(1, {"rng": 3}), "'rng'"),
                (lambda: job.save(-1), "step"), (lambda: job.save(2**64), "step"),
                (lambda: job.save(1, wait=-1), "wait"), (lambda: job.save(1.0), "step"),
                (lambda: job.save(1, arrays=[w]), "expected 2"),
                (lambda: job.save(1, arrays=[w, w]), "exp_avg/w"),
                (lambda: job.save(1, arrays=[w, m.astype("f4")]), "exp_avg/w"),
                (lambda: job.wait_captured(timeout=float("nan")), "timeout"),
                (lambda: job.wait_captured(64), "group"), (lambda: job.due(-1), "step")):
            with self.subTest(expected=expected), \
                    self.assertRaises(holdfast.InvalidArgument) as caught:
                call()
            self.assertIn(expected, str(caught.exception))
        with self.assertRaises(holdfast.Unimplemented):
            job.wait_committed(1, 4)
        for options, expected in (({"job": ".hidden"}, "job"), ({"rank": 1}, "rank"),
                                  ({"world_size": 0}, "world_size"),
                                  ({"copy_threads": 99}, "threads"), ({"timeout": -1}, "timeout"),
                                  ({"job": "a\0b"}, "NUL")):
            with self.subTest(options=options), \
                    self.assertRaises(holdfast.InvalidArgument) as caught:
                self.open(**options)
            self.assertIn(expected, str(caught.exception))

    def test_arrays_that_moved_are_saved_from_where_they_are(self):
        job, w, m = self.open_registered(seed=1)
        moved = arrays(seed=3)
        job.save(1, arrays=moved, wait=30)
        job.wait_captured()
        job.wait_committed(1)
        job.close()
        job, w, m = self.open_registered(seed=2)
        job.restore()
        self.assertEqual((w.tobytes(), m.tobytes()), (moved[0].tobytes(), moved[1].tobytes()))

    def test_arrays_live_as_long_as_somebody_may_read_or_fill_them(self):
        job, w, m = self.open_registered()
        registered = weakref.ref(w)
        del w, m
        gc.collect()
        self.assertIsNotNone(registered())
        moved = arrays()
        saved = weakref.ref(moved[0])
        job.save(1, arrays=moved, wait=30)
        del moved
        gc.collect()
        self.assertIsNotNone(saved())
        job.wait_captured()
        job.register(LAYOUT, buffers(*arrays()), BLOBS)
        self.assertIsNone(registered())
        self.assertIsNone(saved())
        job.close()

    def test_a_tensor_that_changes_under_capture_is_named(self):
        job, w, m = self.open_registered(check_source=CheckSource.ALL)
        job.save(1, wait=30)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while job.report().blocks_captured < job.report().blocks:
            self.assertLess(time.monotonic(), deadline)
        m[2, 2] += 1
        with self.assertRaises(holdfast.Aborted) as caught:
            job.wait_captured()
        self.assertIn("exp_avg/w", str(caught.exception))
        report = job.report()
        self.assertEqual(report.state, SaveState.FAILED)
        self.assertIsInstance(report.error, holdfast.Aborted)

    def test_a_deadline_is_a_timeout_and_other_threads_run_meanwhile(self):
        job = self.open(world_size=2)
        w, m = arrays()
        layout = dict(LAYOUT, mesh=[{"axis": "dp", "size": 2}])
        job.register(layout, buffers(w, m))
        job.save(1, wait=30)
        job.wait_captured()
        ticks, stop = [0], threading.Event()

        def tick():
            while not stop.is_set():
                ticks[0] += 1

        thread = threading.Thread(target=tick)
        thread.start()
        during, tries = 0, 0
        try:
            while during <= 1000 and tries < 100:  # the other thread may have to wait for a processor
                before = ticks[0]
                with self.assertRaises(TimeoutError) as caught:
                    job.wait_committed(1, timeout=0.2)  # rank 1 is not there
                during = ticks[0] - before
                tries += 1
        finally:
            stop.set()
            thread.join()
        self.assertIsInstance(caught.exception, holdfast.DeadlineExceeded)
        self.assertGreater(during, 1000)

    def test_without_an_agent_open_says_so(self):
        with self.assertRaises(holdfast.Unavailable) as caught:
            self.open(private_agent=False)
        self.assertIn("agent", str(caught.exception))
        self.assertEqual(caught.exception.code, holdfast.Code.UNAVAILABLE)

    def test_an_agent_that_is_ending_is_waited_for_and_followed_by_another(self):
        os.environ["HOLDFAST_DRAIN_DEADLINE"] = "1s"
        job = self.open_registered()[0]
        job.save(1, wait=30)  # and is not waited for: so the agent waits, until its deadline
        before = self.place.agent_pids()
        for pid in before:
            os.kill(pid, signal.SIGTERM)
        log = next(self.place.runtime.glob("*/agent.log"))
        deadline = time.monotonic() + DEADLINE_SECONDS
        while "signal 15: ending;" not in log.read_text():
            self.assertLess(time.monotonic(), deadline, log.read_text())
            time.sleep(0.01)
        again = self.open(attempt_key="the next run")
        self.assertTrue(again.info().connected)
        self.assertFalse(set(before) & set(self.place.agent_pids()))

    def test_in_a_forked_child_every_call_is_a_harmless_error(self):
        job, w, m = self.open_registered()
        child = os.fork()
        if child == 0:
            failures = 0
            for call in (job.info, job.restore, job.report, lambda: job.save(1), job.wait_captured):
                try:
                    call()
                    failures += 1
                except holdfast.FailedPrecondition:
                    pass
            job.close()
            os._exit(failures)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        job.save(1, wait=30)
        job.wait_captured()
        job.wait_committed(1)

    def test_wrong_stored_bytes_are_named(self):
        job, w, m = self.open_registered()
        job.save(1, wait=30)
        job.wait_captured()
        job.wait_committed(1)
        job.close()
        self.place.kill_agent()
        image = next(self.place.root.glob("test/s*.a*/rank-00000*.h5"))
        data = bytearray(image.read_bytes())
        at = data.index(m.tobytes())
        data[at + 8] ^= 1
        image.chmod(0o600)
        image.write_bytes(data)
        job, w, m = self.open_registered()
        with self.assertRaises(holdfast.DataLoss) as caught:
            job.restore()
        self.assertIn(image.name, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
