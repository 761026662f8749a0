#!/usr/bin/python3
"""holdfast.Checkpointer against the real library and a real private agent, on one rank and on
several.

Usage: checkpointer_test.py HOLDFASTD LAUNCH        ($HOLDFAST_LIBRARY: the library)
"""
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import unittest

import numpy

import holdfast
from holdfast import Checkpointer
from support import Place

DAEMON, LAUNCH = sys.argv[1:3]
del sys.argv[1:3]

# One rank of several: arguments are steps and options; prints one JSON object.
RANK = textwrap.dedent("""
    import json, os, sys
    import numpy, holdfast
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    steps, kind = int(sys.argv[1]), sys.argv[2]
    w = numpy.arange(1000, dtype=numpy.float32)
    own = numpy.full(3, rank, numpy.int64)
    options = {}
    if kind == "rank_0":
        arrays = {"param": {"w": w}, "buffer": {"own": own}}
        options = {"rank_0_states": ("buffer",)}
    else:
        # ZeRO-1: the moments are cut over the ranks.
        first, last = [1000 * r // world for r in (rank, rank + 1)]
        moments = -w[first:last].copy()
        arrays = {"param/w": w, "exp_avg/w": moments}
        options = {"layout": {
            "holdfast_layout": 1, "mesh": [{"axis": "dp", "size": world}],
            "tensors": [{"name": "w", "shape": [1000], "states": [
                {"state": "param", "dtype": "float32"},
                {"state": "exp_avg", "dtype": "float32", "place": [
                    {"op": "shard", "dim": 0, "axis": "dp", "rule": "sizes",
                     "sizes": [1000 * (r + 1) // world - 1000 * r // world for r in range(world)]}
                ]}]}]}}
    with holdfast.Checkpointer(arrays, every=2, job="ranks", save_wait=30, on_error="raise",
                               **options) as checkpointer:
        resumed = checkpointer.restore()
        result = {"resumed": None}
        if resumed:
            result = {"resumed": resumed.step, "state": resumed.state,
                      "rank_state": resumed.rank_state, "w": w.tolist(), "own": own.tolist(),
                      "olds": [checkpointer.rank_state_of(r) for r in range(resumed.world_size)]}
            if kind != "rank_0":
                result["moments"] = moments.tolist()
        step = resumed.step if resumed else 0
        for step in range(step + 1, step + 1 + steps):
            checkpointer.before_update()
            w += 1
            if kind != "rank_0":
                moments -= 1
            checkpointer.after_step(step, {"step": step}, lambda: rank * 100 + step)
    os.write(1, (json.dumps(result) + "\\n").encode())
""")



class CheckpointerTest(unittest.TestCase):
    def setUp(self):
        self.place = Place(self.addCleanup, DAEMON)
        self.place.use()

    def open(self, arrays, **options):
        options = {"job": "test", "every": 2, "save_wait": 30, **options}
        checkpointer = Checkpointer(arrays, **options)
        self.addCleanup(checkpointer.close)
        return checkpointer

    def test_a_killed_loop_goes_on_from_the_newest_committed_step(self):
        w, m = numpy.zeros((4, 4)), numpy.zeros(4, numpy.int32)
        states = iter(range(100))
        with self.open({"param": {"w": w}, "count/m": m}, on_error="raise") as checkpointer:
            self.assertIsNone(checkpointer.restore())
            for step in range(1, 6):
                checkpointer.before_update()
                w += step
                m[:] = step
                saved = checkpointer.after_step(step, lambda: {"drawn": next(states)})
                self.assertEqual(saved, step % 2 == 0)
        self.assertEqual(next(states), 2, "state is asked for only when a save is due")
        w2, m2 = numpy.ones((4, 4)), numpy.ones(4, numpy.int32)
        with self.open({"param": {"w": w2}, "count/m": m2}) as checkpointer:
            resumed = checkpointer.restore()
            self.assertEqual((resumed.step, resumed.state, resumed.rank_state),
                             (4, {"drawn": 1}, None))
            self.assertEqual((w2.tolist(), m2.tolist()), ([[10.0] * 4] * 4, [4] * 4))
            with self.assertRaises(holdfast.FailedPrecondition):
                checkpointer.restore()

    def test_commit_saves_once_and_returns_when_it_is_durable(self):
        w = numpy.arange(10.0)
        checkpointer = self.open({"param/w": w})
        checkpointer.commit(3, state="three")
        checkpointer.commit(3)
        self.assertEqual(len(self.place.manifests("test")), 1)
        checkpointer.save(4)
        checkpointer.commit(4)
        self.assertEqual(len(self.place.manifests("test")), 2)
        self.assertEqual(checkpointer.failure_count, 0)

    def test_arrays_that_come_later_or_move_are_saved_as_they_are(self):
        state = {"param": {"w": numpy.zeros(5)}}
        checkpointer = self.open(lambda: state)
        self.assertIsNone(checkpointer.restore())
        checkpointer.commit(1)
        state["exp_avg"] = {"w": numpy.full(5, 2.0)}  # as an optimizer's first step does
        checkpointer.commit(2)
        state["param"]["w"] = numpy.full(5, 3.0)  # as load_state_dict may do
        checkpointer.commit(3)
        checkpointer.close()
        w, m = numpy.ones(5), numpy.ones(5)
        resumed = self.open({"param/w": w, "exp_avg/w": m}).restore()
        self.assertEqual((resumed.step, w.tolist(), m.tolist()), (3, [3.0] * 5, [2.0] * 5))

    def test_prepare_is_told_what_the_checkpoint_holds_before_the_arrays_are_asked_for(self):
        def arrays():
            return {"param/w": w, **({"step/w": numpy_step} if numpy_step is not None else {})}

        w, numpy_step = numpy.zeros((2, 3), numpy.float32), numpy.array(7, numpy.int64)
        checkpointer = self.open(arrays, prepare=lambda saved: self.fail("there is no checkpoint"))
        self.assertIsNone(checkpointer.restore())
        checkpointer.commit(1)
        checkpointer.close()

        def prepare(saved):
            nonlocal numpy_step
            self.assertEqual(saved, {"param/w": ("float32", (2, 3)), "step/w": ("int64", ())})
            numpy_step = numpy.zeros((), numpy.int64)

        numpy_step = None
        self.open(arrays, prepare=prepare).restore()
        self.assertEqual(numpy_step, 7)

    def test_an_array_that_the_checkpoint_lacks_is_named_and_no_reason_to_begin_anew(self):
        with self.open({"param/w": numpy.zeros(5)}) as checkpointer:
            checkpointer.commit(1)
        v = numpy.zeros(5)
        layout = holdfast.replicated({"param/v": holdfast.memory_of(v)}, 1)
        for options in ({}, {"layout": layout}):
            checkpointer = self.open({"param/v": v}, **options)
            with self.assertRaises(holdfast.Error) as caught:
                checkpointer.restore()
            self.assertIn('"v"', str(caught.exception))
            checkpointer.close()

    def test_a_restore_that_failed_can_be_tried_again_and_one_that_did_not_cannot(self):
        w = numpy.arange(10).astype(numpy.complex64) * 1j
        with self.open({"param/w": w}) as checkpointer:
            checkpointer.commit(1)
        w2, head = numpy.zeros(10, numpy.complex64), numpy.full(3, 7.0)
        with self.open({"param/w": w2, "param/head": head}) as checkpointer:
            for patterns in (["v"], ["w{"], ()):  # nothing, no pattern, what is not there
                with self.assertRaises((holdfast.InvalidArgument, holdfast.FailedPrecondition)):
                    checkpointer.restore(tensors=patterns)
            resumed = checkpointer.restore(tensors=["w"])
            self.assertEqual((resumed.step, resumed.tensor_states_left_out), (1, 1))
            self.assertEqual((w2.tolist(), head.tolist()), (w.tolist(), [7.0] * 3))
            with self.assertRaises(holdfast.FailedPrecondition):
                checkpointer.restore(tensors=["w"])
            checkpointer.commit(2)

    def test_a_failed_save_is_logged_and_training_goes_on(self):
        w = numpy.zeros(5)
        checkpointer = self.open({"param/w": w}, state_bytes_max=10)
        with self.assertLogs("holdfast", "ERROR") as logs:
            self.assertFalse(checkpointer.save(2, "more than ten bytes"))
        self.assertIn("'state': expected at most 10 bytes", logs.output[0])
        self.assertEqual(checkpointer.failure_count, 1)
        self.assertTrue(checkpointer.after_step(4, "short"))
        checkpointer.commit(4)
        checkpointer.close()

    def test_a_failed_save_is_raised_once_if_so_asked(self):
        checkpointer = self.open({"param/w": numpy.zeros(5)}, state_bytes_max=10, on_error="raise")
        with self.assertRaises(holdfast.InvalidArgument):
            checkpointer.save(2, "more than ten bytes")
        with self.assertRaises(holdfast.InvalidArgument):
            checkpointer.save(2, object())
        self.assertEqual(checkpointer.failure_count, 2)

    def test_a_tensor_that_changes_under_capture_costs_that_save_alone(self):
        w = numpy.zeros(1 << 20)
        checkpointer = self.open({"param/w": w}, check_source=holdfast.CheckSource.ALL)
        self.assertTrue(checkpointer.save(2))
        while checkpointer.job.report().blocks_captured < checkpointer.job.report().blocks:
            pass
        w[0] = 1
        with self.assertLogs("holdfast", "ERROR") as logs:
            checkpointer.before_update()
            checkpointer.commit(4)
        self.assertIn("param/w", logs.output[0])

    def test_after_the_agents_death_training_goes_on_and_every_failure_is_logged(self):
        w = numpy.zeros(5)
        checkpointer = self.open({"param/w": w})
        checkpointer.commit(2)
        self.place.kill_agent()
        with self.assertLogs("holdfast", "ERROR"):
            for step in range(3, 7):
                checkpointer.before_update()
                w += 1
                checkpointer.after_step(step)
        self.assertGreater(checkpointer.failure_count, 0)

    def test_wrong_options_are_refused(self):
        w = numpy.zeros(5)
        for arrays, options, expected in (
                ({"param/w": w}, {"every": 0}, "every"),
                ({"param/w": w}, {"on_error": "x"}, "on_error"),
                ({"param/w": w}, {"layout": "{}", "rank_0_states": ("param",)}, "rank_0_states"),
                ({"w": w}, {}, "'w'"), ({"param": {"w": w[::2]}}, {}, "'param/w'"),
                ({"param/w": w, "param/w.step": numpy.array(1), "step/w": numpy.array(1)}, {},
                 "'w.step'")):
            with self.subTest(expected=expected), \
                    self.assertRaises(holdfast.InvalidArgument) as caught:
                self.open(arrays, **options).restore()
            self.assertIn(expected, str(caught.exception))

    def test_a_state_of_another_shape_is_a_tensor_of_its_own(self):
        memory = {name: holdfast.memory_of(array) for name, array in (
            ("param/w", numpy.zeros((2, 3))), ("exp_avg/w", numpy.zeros((2, 3))),
            ("step/w", numpy.zeros(())))}
        self.assertEqual(holdfast.replicated(memory, 4), {
            "holdfast_layout": 1, "mesh": [{"axis": "dp", "size": 4}], "tensors": [
                {"name": "w", "shape": [2, 3],
                 "states": [{"state": "param", "dtype": "float64"},
                            {"state": "exp_avg", "dtype": "float64"}]},
                {"name": "w.step", "shape": [],
                 "states": [{"state": "step", "dtype": "float64", "buffer": "step/w"}]}]})

    # ---- Several ranks

    def run_ranks(self, world, steps, kind):
        script = self.place.path / "rank.py"
        script.write_text(RANK)
        result = subprocess.run(
            [sys.executable, LAUNCH, "--nproc", str(world), "--", sys.executable, str(script),
             str(steps), kind],
            env=self.place.environment(PYTHONPATH=os.environ["PYTHONPATH"]), capture_output=True,
            text=True, timeout=100)
        self.assertEqual(result.returncode, 0, result.stderr)
        lines = [line.partition(" ") for line in result.stdout.splitlines()]
        return [json.loads(text) for _, _, text in sorted(lines)]

    def test_any_number_of_ranks_goes_on_in_a_layout_of_ones_own(self):
        last, before = 0, None
        for world in (3, 2, 4, 1):
            with self.subTest(world=world):
                results = self.run_ranks(world, 2, "zero")
                self.assertEqual(len(results), world)
                for rank, result in enumerate(results):
                    if before is None:
                        self.assertIsNone(result["resumed"])
                        continue
                    self.assertEqual(result["resumed"], last)
                    self.assertEqual(result["state"], {"step": last})
                    self.assertIsNone(result["rank_state"])  # another number of ranks
                    self.assertEqual(result["olds"], [100 * r + last for r in range(before)])
                    self.assertEqual(result["w"], [float(i + last) for i in range(1000)])
                if before is not None:
                    moments = [value for result in results for value in result["moments"]]
                    self.assertEqual(moments, [-float(i + last) for i in range(1000)])
                last, before = last + 2, world

    def test_states_of_rank_0_alone_are_restored_on_every_rank(self):
        self.run_ranks(3, 2, "rank_0")
        for rank, result in enumerate(self.run_ranks(3, 2, "rank_0")):
            self.assertEqual(result["resumed"], 2)
            self.assertEqual(result["own"], [0, 0, 0])
            self.assertEqual(result["rank_state"], 100 * rank + 2)
        for result in self.run_ranks(1, 2, "rank_0"):
            self.assertEqual((result["resumed"], result["own"]), (4, [0, 0, 0]))


if __name__ == "__main__":
    unittest.main()
