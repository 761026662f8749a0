"""A real agent, and a job of real ranks under examples/launch, for tests of what is seen of them.

A test file sets LiveCase.programs, and its tests start what they need.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest

RANKS = 4
DEADLINE = 150  # seconds; of everything that is waited for
# What the analysis needs to have learned before it gives verdicts about what stands
# (docs/MONITOR_ANALYSIS.md).
OPERATIONS = 30


@dataclasses.dataclass
class Programs:
    holdfastd: str
    holdfast: str
    launch: str


class LiveCase(unittest.TestCase):
    programs = None
    job_name = "ring"

    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="hf-live-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.socket = self.directory / "agent.sock"
        self.log = self.directory / "agent.log"
        self.job = None
        # Nothing of whoever runs the tests.
        self.variables = {name: value for name, value in os.environ.items()
                          if not name.startswith(("HOLDFAST", "NCCL", "COLLECTIVES", "TORCHELASTIC"))}

    def start(self, *command, **options):
        process = subprocess.Popen([*map(str, command)], **{"env": self.variables, **options})

        def end():
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=DEADLINE)

        self.addCleanup(end)
        return process

    def start_agent(self, *flags):
        agent = self.start(self.programs.holdfastd, "--socket", self.socket, "--root", self.directory / "root",
                           "--state-directory", self.directory / "state", "--log-file", self.log,
                           "--host-memory", "64MiB", "--ras-address", "off", *flags)
        self.until("an agent", lambda: self.ask("status") is not None)
        return agent

    def start_job(self, *command, launch=(), **variables):
        """Every rank is a node by itself, as in a network namespace of its own."""
        self.job = self.start(
            sys.executable, self.programs.launch, "--nproc", RANKS, "--run-id", "live", "--on-failure", "wait",
            *launch, "--", "sh", "-c", 'HOLDFAST_NODE=n$RANK exec "$0" "$@"', *command,
            env={**self.variables, "HOLDFAST_SOCKET": str(self.socket), "HOLDFAST_JOB": self.job_name,
                 **variables})

    def start_recorder(self, *flags, **options):
        """Returns when nothing is missed any more."""
        self.recording = self.directory / "run.hfmr"
        recorder = self.start(self.programs.holdfast, "monitor", "record", self.recording, "--socket",
                              self.socket, *flags, **options)
        self.until("a recording", self.recording.exists)
        return recorder

    def until(self, what, holds):
        end = time.monotonic() + DEADLINE
        while not (value := holds()):
            if time.monotonic() > end:
                logs = "".join(path.read_text(errors="replace")[-2000:]
                               for path in [self.log, *self.directory.rglob("*.err")] if path.exists())
                self.fail(f"{what}: not within {DEADLINE} s\n{logs}\n{self.ask('monitor', 'status')}")
            time.sleep(0.05)
        return value

    def run_holdfast(self, *words):
        """A verb, to the agent: (exit code, standard output, standard error)."""
        result = subprocess.run([self.programs.holdfast, *map(str, words), "--socket", self.socket],
                                capture_output=True, text=True, timeout=DEADLINE, check=False, env=self.variables)
        return result.returncode, result.stdout, result.stderr

    def ask(self, *words):
        """What it answers as JSON; None if it fails."""
        code, text, _ = self.run_holdfast("--json", *words)
        return json.loads(text) if code == 0 else None

    def text(self, *words):
        code, text, error = self.run_holdfast(*words)
        self.assertEqual(code, 0, error)
        return text

    def replay(self):
        """Anywhere: without the agent."""
        result = subprocess.run([self.programs.holdfast, "--json", "monitor", "replay", self.recording],
                                capture_output=True, text=True, timeout=DEADLINE, check=False, env=self.variables)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)

    # ---- What the agent knows

    def job_status(self):
        """Of the job, once it is known."""
        answer = self.ask("monitor", "status")
        return answer["jobs"][0] if answer and answer["jobs"] else None

    def is_watched(self):
        """All ranks are seen, and the analysis has learned enough."""
        job = self.job_status()
        return (job and job["sight"]["whole"] and job["world_size"] == RANKS and
                min([one["finished"] for one in job["communicators"]] or [0]) >= OPERATIONS)

    def pid_of(self, rank):
        return next(board["process_id"] for board in self.ask("status")["monitor"]
                    if board["rank"] == rank and board["alive"])

    def findings(self):
        return self.ask("monitor", "verdicts")["findings"]

    def verdict(self, fault):
        return next((one for one in self.findings() if one["grade"] == "verdict" and one["fault"] == fault), None)

    @staticmethod
    def suspects_of(finding):
        return [suspect["rank"] for suspect in finding["suspects"]]
