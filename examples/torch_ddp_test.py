"""examples/torch_ddp.py: killed with everything in it, it goes on to the same bits as undisturbed; and a rank
that is killed under torchrun, which tells nobody and ends the others, is named when the job is gone.

Runs in the virtual environment of scripts/interop.
Usage: torch_ddp_test.py EXAMPLE LAUNCH HOLDFASTD HOLDFAST        ($HOLDFAST_LIBRARY, $PYTHONPATH: the
package)
"""
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import unittest

import h5py
import numpy

import holdfast
from support import Place

EXAMPLE, LAUNCH, DAEMON, HOLDFAST = sys.argv[1:5]
del sys.argv[1:5]

STEPS = 240
TIMEOUT_SECONDS = 240


class Run:
    """The example, started; what it prints is read line by line."""

    def __init__(self, place, steps, launcher, **variables):
        environment = place.environment(OMP_NUM_THREADS="1", PYTHONPATH=os.environ["PYTHONPATH"]) | variables
        with place.path.joinpath("err").open("a") as errors:
            self.process = subprocess.Popen([*launcher, EXAMPLE, str(steps)], env=environment,
                                            text=True, stdout=subprocess.PIPE, stderr=errors)
        self.lines = []

    def lines_of_rank_0(self):
        """As they come; "[0] " is examples/launch's, torchrun prints both ranks alike."""
        for line in self.process.stdout:
            if line.startswith("[1] "):
                continue
            self.lines.append(line.removeprefix("[0] ").strip())
            yield self.lines[-1]

    def finish(self):
        for _ in self.lines_of_rank_0():
            pass
        return self.process.wait(TIMEOUT_SECONDS)

    def kill(self):
        """The launcher takes its ranks along."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.read()  # ends when the last rank has


def launch(ranks):
    return ["/usr/bin/python3", LAUNCH, "--nproc", str(ranks), "--", sys.executable]


def torchrun(ranks):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks)]


def losses(lines):
    """(step, loss) of all. What two ranks print under torchrun may share a line."""
    return {(int(step), loss) for line in lines
            for step, loss in re.findall(r"step (\d+) loss (-?0x[0-9a-f.]+p[+-]\d+)", line)}


def text(value):
    return value.decode() if isinstance(value, bytes) else value


def stored(place, step):
    """What the newest checkpoint of `step` holds, read with h5py alone: (state, tensor) to the
    whole tensor, out of the pieces in all images, and (rank, blob) to bytes."""
    directory = max(place.root.glob(f"torch_ddp/s{step:012}.a*"))
    assert (directory / "MANIFEST.json").exists()
    tensors, covered, blobs = {}, {}, {}
    for path in sorted(directory.glob("rank-*.h5")):
        with h5py.File(path) as image:
            for group in image["tensors"].values():
                for piece in group.values():
                    assert "box_lo" not in piece.attrs  # replicated: pieces of the whole
                    key = text(group.attrs["name"]), text(piece.attrs["name"])
                    shape = tuple(int(size) for size in piece.attrs["shape"])
                    count = int(numpy.prod(shape, dtype=int))
                    first, last = piece.attrs["range"] if "range" in piece.attrs else (0, count)
                    whole = tensors.setdefault(key, numpy.zeros(count, piece.dtype))
                    whole[first:last] = piece[()].reshape(-1)
                    covered[key] = covered.get(key, 0) + int(last - first)
                    assert covered[key] <= count
            for scope in image["blobs"].values():
                for name, blob in scope.items():
                    size = int(blob.attrs["bytes"])
                    if size <= blob.shape[0]:  # else: not given
                        blobs[(path.name[:10], name)] = bytes(blob[:size])
    assert all(covered[key] == whole.size for key, whole in tensors.items())
    return {key: whole.tobytes() for key, whole in tensors.items()}, blobs


class TorchDdpTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.reference = Place(cls.addClassCleanup, DAEMON)
        run = Run(cls.reference, STEPS, torchrun(2))
        status = run.finish()
        assert status == 0, cls.reference.path.joinpath("err").read_text()
        cls.losses = losses(run.lines)
        assert len(cls.losses) == 2 * STEPS  # each rank has its own data
        cls.tensors, cls.blobs = stored(cls.reference, STEPS)

    def killed(self, place):
        run = Run(place, STEPS, launch(2))
        for line in run.lines_of_rank_0():
            if line.startswith("step") and place.manifests("torch_ddp"):
                break
        self.assertLess(int(line.split()[1]), STEPS, "the kill missed")
        run.kill()
        self.assertIn("begins at step 0", run.lines)

    def go_on(self, place):
        run = Run(place, STEPS, launch(2))
        self.assertEqual(run.finish(), 0, place.path.joinpath("err").read_text())
        begun = int(run.lines[0].removeprefix("begins at step "))
        self.assertGreater(begun, 0)
        self.assertLess(begun, STEPS)
        after = losses(run.lines)
        self.assertEqual(sorted(step for step, _ in after), list(range(begun + 1, STEPS + 1)))
        self.assertEqual(sorted(after - self.losses)[:3], [])
        tensors, blobs = stored(place, STEPS)
        self.assertEqual(sorted(tensors), sorted(self.tensors))
        # Six parameters with exp_avg, exp_avg_sq and step, and the batch statistics.
        self.assertEqual(len(tensors), 6 * 4 + 3)
        for key, whole in tensors.items():
            self.assertEqual(whole, self.tensors[key], key)
        self.assertEqual(blobs, self.blobs)
        self.assertEqual(sorted(name for _, name in blobs),
                         ["arrays", "rank_state", "rank_state", "state"])

    def test_a_job_killed_whole_goes_on_from_memory_to_the_same_bits(self):
        place = Place(self.addCleanup, DAEMON)
        self.killed(place)
        self.go_on(place)

    def test_a_job_killed_with_its_agent_goes_on_from_storage_to_the_same_bits(self):
        place = Place(self.addCleanup, DAEMON)
        self.killed(place)
        place.kill_agent()
        self.go_on(place)

    def test_one_rank_goes_on_with_the_state_of_two(self):
        place = Place(self.addCleanup, DAEMON)
        self.assertEqual(Run(place, 20, launch(2)).finish(), 0)
        tensors, _ = stored(place, 20)
        # What one rank restores is what two have stored.
        arrays = {}

        def prepare(saved):
            arrays.update((name, numpy.zeros(shape, dtype))
                          for name, (dtype, shape) in saved.items())

        place.use()
        one_rank = holdfast.Checkpointer(lambda: arrays, prepare=prepare, job="torch_ddp")
        with one_rank:
            resumed = one_rank.restore()
        self.assertEqual((resumed.step, resumed.world_size, resumed.rank_state), (20, 2, None))
        self.assertEqual(len(arrays), len(tensors))
        for name, array in arrays.items():
            state, tensor = name.split("/")
            stored_name = f"{tensor}.step" if state == "step" else tensor
            self.assertEqual(array.tobytes(), tensors[(state, stored_name)], name)
        run = Run(place, 40, launch(1))
        self.assertEqual(run.finish(), 0, place.path.joinpath("err").read_text())
        self.assertEqual(run.lines[0], "begins at step 20")
        self.assertTrue(run.lines[-1].startswith("step 40 "))

    def test_a_rank_killed_under_torchrun_is_named_when_the_job_is_gone(self):
        place = Place(self.addCleanup, DAEMON)
        run = Run(place, 10 ** 9, torchrun(2), HOLDFAST_LINGER="300s")  # the agent stays for our questions
        self.addCleanup(run.kill)
        for line in run.lines_of_rank_0():
            if line.startswith("step 30 "):
                break
        socket, = place.runtime.glob("*/agent.sock")

        def ask(*words):
            result = subprocess.run([HOLDFAST, *words, "--socket", socket], capture_output=True, text=True,
                                    check=True, timeout=TIMEOUT_SECONDS)
            return json.loads(result.stdout)

        victim, = [board["process_id"] for board in ask("status")["monitor"]
                   if board["rank"] == 1 and board["alive"]]
        os.kill(victim, signal.SIGKILL)
        self.assertNotEqual(run.finish(), 0)  # torchrun has ended the other one, too
        # Before Linux 6.15 nobody tells how it ended once torchrun has waited for it.
        is_told = tuple(int(number) for number in platform.release().split(".")[:2]) >= (6, 15)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (verdicts := [finding for finding in ask("--json", "monitor", "verdicts")["findings"]
                                if finding["grade"] == "verdict" or not is_told]):
            self.assertLess(time.monotonic(), deadline, "no verdict")
            time.sleep(0.1)
        verdict, = verdicts
        self.assertEqual((verdict["fault"], [suspect["rank"] for suspect in verdict["suspects"]]),
                         ("dead", [1]), verdict)
        if is_told:
            self.assertIn("was ended by signal 9", verdict["evidence"][0])


if __name__ == "__main__":
    unittest.main()
