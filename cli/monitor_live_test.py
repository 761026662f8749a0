#!/usr/bin/python3
"""What `holdfast monitor` shows of a real job: ranks that tell their all-reduces to the hook API, a real agent, and one
rank that is stopped, then killed. Every verb, on_verdict, a restart of the worker, a recording and its replay.

    monitor_live_test.py HOLDFAST HOLDFASTD LAUNCH RING_TRAINER
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import checkpoint_files

HOLDFASTD, LAUNCH, TRAINER = sys.argv[2:5]
run = checkpoint_files.Command(sys.argv[1])
RANKS = 4
DEADLINE = 60
# What the analysis needs to have learned before it gives verdicts about standing still.
OPERATIONS = 30


class Live(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="hf-monitor-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.socket = self.directory / "agent.sock"
        self.events = self.directory / "events"
        self.agent = self.start(HOLDFASTD, "--socket", self.socket, "--root", self.directory / "root",
                                "--state-directory", self.directory / "state", "--log-file", self.directory / "log",
                                "--host-memory", "16MiB", "--on-verdict",
                                f'echo "$HOLDFAST_EVENT $HOLDFAST_FAULT $HOLDFAST_RANKS" >> {self.events}')
        self.until("an agent", lambda: self.ask("status") is not None)

    def start(self, *command, **options):
        process = subprocess.Popen([*map(str, command)], **options)

        def end():
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=DEADLINE)

        self.addCleanup(end)
        return process

    def start_job(self):
        # Every rank is a node by itself.
        self.start(sys.executable, LAUNCH, "--nproc", RANKS, "--run-id", "live", "--on-failure", "wait", "--", "sh", "-c",
                   'HOLDFAST_NODE=n$RANK exec "$0" "$1"', TRAINER, self.directory,
                   env={**os.environ, "HOLDFAST_SOCKET": str(self.socket), "HOLDFAST_JOB": "ring"})
        self.until("operations", lambda: min(
            [one["finished"] for one in self.jobs()["communicators"]] or [0]) >= OPERATIONS and
            self.jobs()["sight"]["whole"])

    def monitor(self, *arguments):
        return run("monitor", *arguments, "--socket", self.socket)

    def ask(self, *arguments):
        code, text, _ = self.monitor(*arguments, "--json")
        return json.loads(text) if code == 0 else None

    def jobs(self):
        answer = self.ask("status")
        return answer["jobs"][0] if answer and answer["jobs"] else {"communicators": [], "sight": {"whole": False}}

    def text(self, *arguments):
        code, text, error = self.monitor(*arguments)
        self.assertEqual(code, 0, error)
        return text

    def until(self, what, holds):
        end = time.monotonic() + DEADLINE
        while not (value := holds()):
            if time.monotonic() > end:
                self.fail(f"{what}: not within {DEADLINE} s\n{(self.directory / 'log').read_text()}\n{self.ask('status')}")
            time.sleep(0.05)
        return value

    def pid_of(self, rank):
        boards = json.loads(run("status", "--socket", self.socket)[1])["monitor"]
        return next(board["process_id"] for board in boards if board["rank"] == rank and board["alive"])

    def verdict(self, fault):
        return next((one for one in self.ask("verdicts")["findings"]
                     if one["grade"] == "verdict" and one["fault"] == fault), None)

    def test_every_verb_shows_a_stopped_rank_and_what_became_of_it(self):
        recording = self.directory / "run.hfmr"
        recorder = self.start(run.path, "monitor", "record", recording, "--socket", self.socket, "--job", "ring",
                              stderr=subprocess.PIPE)
        self.until("a recording", recording.exists)
        follower = self.start(run.path, "monitor", "verdicts", "--follow", "--json", "--socket", self.socket,
                              stdout=subprocess.PIPE, text=True)
        self.assertEqual(json.loads(follower.stdout.readline()), {"schema_version": 1, "findings": []})
        self.start_job()

        self.assertEqual(self.jobs()["light"], "green")
        text = self.text("status")
        self.assertIn("ring (attempt live:0, 4 ranks)  green", text)
        self.assertIn("4 of 4 ranks report, 4 of them with plugin or hook events", text)
        self.assertIn("no layout with stages", text)
        self.assertIn("Nothing has been found", self.text("verdicts"))
        # Its sends never wait, so no cell of the matrix is judged.
        self.assertEqual([job["job"] for job in self.ask("matrix")["jobs"]], ["ring"])
        self.assertIn("No connection between nodes has been measured", self.text("matrix"))

        os.kill(self.pid_of(2), signal.SIGSTOP)
        found = self.until("a verdict on the stopped rank", lambda: self.verdict("stopped"))
        self.assertEqual((found["suspects"], found["scope"], found["state"]), ([{"rank": 2}], "process", "open"))
        self.assertEqual(self.jobs()["light"], "red")
        text = self.text("status")
        self.assertIn("RED", text)
        self.assertIn(f"verdict {found['id']}: ", text)
        sinks = self.ask("top")["jobs"][0]["sinks"]
        self.assertEqual((sinks[0]["kind"], sinks[0]["rank"], sinks[0]["waiters"]), ("rank", 2, RANKS - 1))
        text = self.text("top")
        self.assertIn("at the end of the chain: rank 2 (3 ranks wait for it)", text)
        self.assertIn("rank 3", text)
        text = self.text("explain", found["id"])
        for part in ("rank 2 (node n2)", "the process of the rank, not its machine", "wrong if", "suspicion", "verdict"):
            self.assertIn(part, text)
        self.assertEqual(self.ask("explain", found["id"])["finding"]["id"], found["id"])

        # A worker that is restarted in the middle goes on with the same finding.
        worker = json.loads(run("status", "--socket", self.socket)[1])["agent"]["worker_pid"]
        os.kill(worker, signal.SIGKILL)
        self.until("a new worker", lambda: (lambda answer: answer and answer["findings"])(self.ask("verdicts")))
        self.assertEqual([one["id"] for one in self.ask("verdicts")["findings"]], [found["id"]])

        changes = []
        while True:
            line = follower.stdout.readline()
            if not line:
                break
            changes.append(json.loads(line))
        self.assertEqual([(one["change"], one["finding"]["id"]) for one in changes],
                         [("suspicion", found["id"]), ("verdict", found["id"])])
        self.until("on_verdict", lambda: self.events.exists() and self.events.read_text().startswith("verdict stopped 2\n"))

        recorder.send_signal(signal.SIGINT)
        _, error = recorder.communicate(timeout=DEADLINE)
        self.assertEqual(recorder.returncode, 0, error)
        code, text, error = run("monitor", "replay", recording, "--json")
        self.assertEqual(code, 0, error)
        replayed = json.loads(text)
        self.assertTrue(replayed["recording"]["ended_on_purpose"])
        [again] = replayed["findings"]
        for member in ("id", "grade", "fault", "scope", "suspects", "job", "attempt_key"):
            self.assertEqual(again[member], found[member], member)
        self.assertEqual(run("monitor", "record", recording, "--socket", self.socket)[0], 1)  # never overwritten


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
