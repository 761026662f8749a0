"""examples/torch_ddp.py, which is stock PyTorch but for its checkpoints, under torchrun and under `holdfast run`:
under both a rank that stands still and a killed one cost no bit. Under torchrun the agent is a sidecar, and ends the
hang through it.

A rank is stopped inside of an operation that the monitor sees (holdfast.torch.watch) under torchrun, and anywhere
under `holdfast run`.

Runs in the virtual environment of scripts/interop.
Usage: torch_launchers_test.py EXAMPLE HOLDFAST HOLDFASTD        ($HOLDFAST_LIBRARY, $PYTHONPATH: the package)
"""
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import unittest

from support import Place

EXAMPLE, HOLDFAST, DAEMON = sys.argv[1:4]
del sys.argv[1:4]

RANKS = 2
TIMEOUT_SECONDS = 500


def torchrun(*flags):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *flags]


def holdfast_run(place, *flags):
    return [HOLDFAST, "run", "--job", "torch_ddp", "--nproc-per-node", str(RANKS), "--log-dir", str(place.path / "logs"),
            *flags]


def losses(text):
    """(step, loss) of all. What two ranks print may share a line."""
    return {(int(step), loss) for step, loss in re.findall(r"step (\d+) loss (-?0x[0-9a-f.]+p[+-]\d+)", text)}


class Run:
    """The example under a launcher, writing to a file."""

    def __init__(self, place, launcher, steps=10 ** 9, **variables):
        self.place = place
        self.output = place.path / "output"
        configuration = place.path / "holdfast.toml"
        # Where nothing else finds a hang, the silence of heartbeats does.
        configuration.write_text('[recovery]\nhang_timeout = "2m"\n')
        environment = place.environment(
            OMP_NUM_THREADS="1", PYTHONPATH=os.environ["PYTHONPATH"], PYTHON_EXEC=sys.executable,
            XDG_STATE_HOME=str(place.path / "state"), HOLDFAST_CONFIG=str(configuration), **variables)
        environment["HOLDFAST_LINGER"] = "300s"  # longer than a restart takes
        # Else torchrun's restarted ranks may find the addresses of the attempt before: docs/RUN.md.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen([*launcher, EXAMPLE, str(steps)], env=environment, stdout=output,
                                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def text(self):
        """Everything that was printed; `holdfast run` keeps logs of each rank, too."""
        return self.output.read_text(errors="replace")

    def wait_until(self, condition, what):
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no {what}; status {self.process.poll()}\n{self.text()[-8000:]}\n"
                                     f"{self.agent_log()[-8000:]}")
            time.sleep(0.05)
        return value

    def agent_log(self):
        return "".join(path.read_text(errors="replace") for path in self.place.runtime.glob("*/agent.log"))

    def ask(self, *verb):
        """What a verb answers; nothing while no agent does."""
        socket = next(iter(self.place.runtime.glob("*/agent.sock")), None)
        if socket is None:
            return None
        result = subprocess.run([HOLDFAST, "--json", *verb, "--socket", socket], capture_output=True, text=True,
                                check=False, timeout=TIMEOUT_SECONDS)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def boards(self, attempt_key):
        """By rank those of the living processes of an attempt."""
        status = self.ask("status") or {"monitor": []}
        return {board["rank"]: board for board in status["monitor"]
                if board["alive"] and board["attempt_key"] == attempt_key}

    def board(self, attempt_key, rank):
        return self.wait_until(lambda: self.boards(attempt_key).get(rank), f"board of rank {rank}")

    def trained(self, besides=()):
        """The key of an attempt that is none of those, that the monitor has learned enough of, and of a job that has a
        checkpoint."""
        answer = self.ask("monitor", "status")
        job = next((one for one in (answer or {"jobs": []})["jobs"] if one["job"] == "torch_ddp"), None)
        if job is None or job["state"] != "running" or job["attempt_key"] in besides or not job["sight"]["whole"]:
            return None
        if min([one["finished"] for one in job["communicators"]] or [0]) < 40 or job["findings"]:
            return None
        committed = self.place.manifests("torch_ddp")
        return job["attempt_key"] if committed and len(self.boards(job["attempt_key"])) == RANKS else None

    def stop(self, attempt_key, rank):
        """Anywhere."""
        pid = self.board(attempt_key, rank)["process_id"]
        os.kill(pid, signal.SIGSTOP)
        stat = pathlib.Path(f"/proc/{pid}/stat")
        self.wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", "process that is stopped")

    def stop_inside(self, attempt_key, rank):
        """Inside of an operation: stopped, looked at, and let go again if it is outside of all."""
        def is_inside():
            self.stop(attempt_key, rank)
            board = self.board(attempt_key, rank)
            if any(one["started"] > one["finished"] for one in board["communicators"]):
                return True
            os.kill(board["process_id"], signal.SIGCONT)
            return False
        self.wait_until(is_inside, "rank inside of an operation")

    def kill(self, attempt_key, rank):
        os.kill(self.board(attempt_key, rank)["process_id"], signal.SIGKILL)

    def finish(self):
        return self.process.wait(TIMEOUT_SECONDS)


class TorchLaunchersTest(unittest.TestCase):
    def place(self):
        place = Place(self.addCleanup, DAEMON)

        def end_the_rest():
            for pid in self.left(place):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.addCleanup(end_the_rest)
        return place

    @staticmethod
    def left(place):
        """What still runs of that place: ranks, launchers."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if (entry.name.isdigit() and int(entry.name) != os.getpid() and
                        str(place.path).encode() in (entry / "environ").read_bytes()):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def trouble(self, run, stop):
        """Rank 0 stands still; in the attempt after that rank 1 is killed. Nobody restarts anything. Ends in the
        third attempt, which trains as well; returns all losses."""
        first = run.wait_until(run.trained, "first attempt that trains")
        stop(run, first, 0)
        stopped = time.monotonic()
        second = run.wait_until(lambda: run.trained([first]), "second attempt that trains")
        print(f"from the stop to 40 operations of the next attempt: {time.monotonic() - stopped:.1f} s")
        run.kill(second, 1)
        run.wait_until(lambda: run.trained([first, second]), "third attempt that trains")
        begun = [int(step) for step in re.findall(r"begins at step (\d+)", run.text())]
        self.assertEqual(len(begun), 3 * RANKS, begun)
        self.assertEqual(sorted(begun), begun)
        self.assertGreater(begun[RANKS], 0)
        run.process.terminate()
        run.finish()
        return losses(run.text())

    def incidents(self, run):
        kept = run.place.path / "state/holdfast/jobs/torch_ddp/incidents"
        return {path.name: (path / "summary.txt").read_text() for path in kept.iterdir()}

    def test_a_rank_that_stands_still_and_a_killed_one_cost_no_bit(self):
        beside = Run(self.place(), torchrun("--max-restarts", "2"), HOLDFAST_SIDECAR="act")
        found = self.trouble(beside, Run.stop_inside)
        incidents = self.incidents(beside)
        self.assertEqual(list(incidents), ["1"])
        self.assertIn("Suspect: rank 0", incidents["1"])
        self.assertIn("so that its launcher restarts the job", beside.agent_log())
        # The agent waits for the next attempt, and explains meanwhile.
        why = beside.ask("why")
        print("\n".join(why["downtime"]))
        self.assertEqual([(one["outcome"], [name for name, value in one["seconds"].items() if value is None])
                          for one in why["incidents"]], [("resumed", [])])

        alone = Run(place := self.place(), holdfast_run(place))
        found |= self.trouble(alone, Run.stop)
        incidents = self.incidents(alone)
        self.assertEqual(sorted(incidents), ["1", "2"])
        self.assertIn("Suspect: rank 1", incidents["2"])

        steps = max(step for step, _ in found)
        reference = Run(self.place(), torchrun(), steps)
        self.assertEqual(reference.finish(), 0, reference.text()[-8000:])
        undisturbed = losses(reference.text())
        self.assertEqual(len(undisturbed), RANKS * steps)  # each rank has its own data
        self.assertEqual(sorted(found - undisturbed)[:3], [])


if __name__ == "__main__":
    unittest.main()
