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
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "support"))
from live_job import DEADLINE, RANKS, LiveCase, Programs  # noqa: E402  (the path comes first)

HOLDFAST, HOLDFASTD, LAUNCH, TRAINER = sys.argv[1:5]
LiveCase.programs = Programs(HOLDFASTD, HOLDFAST, LAUNCH)


class Live(LiveCase):
    def test_every_verb_shows_a_stopped_rank_and_what_became_of_it(self):
        events = self.directory / "events"
        topology = self.directory / "topology.json"
        topology.write_text(json.dumps({
            "schema_version": 1,
            "node_kinds": {"box": {"gpus": [{"nic": f"mlx5_{i}", "rail": i} for i in range(RANKS)]}},
            "nodes": {f"n{rank}": {"kind": "box", "switch": "leaf-1"} for rank in range(RANKS)}}))
        self.start_agent("--topology", topology, "--on-verdict", f'echo "$HOLDFAST_EVENT $HOLDFAST_FAULT $HOLDFAST_RANKS" >> {events}')
        recorder = self.start_recorder("--job", "ring", stderr=subprocess.PIPE)
        follower = self.start(HOLDFAST, "monitor", "verdicts", "--follow", "--json", "--socket", self.socket,
                              stdout=subprocess.PIPE, text=True)
        self.assertEqual(json.loads(follower.stdout.readline()), {"schema_version": 1, "findings": []})
        self.start_job(TRAINER, self.directory)
        self.until("operations", self.is_watched)

        self.assertEqual(self.job_status()["light"], "green")
        text = self.text("monitor", "status")
        self.assertIn("ring (attempt live:0, 4 ranks)  green", text)
        self.assertIn("4 of 4 ranks report, 4 of them with plugin or hook events", text)
        self.assertIn("no layout with stages", text)
        self.assertIn("the topology file has the NICs of all ranks", text)
        # It was read when the agent started; no later worker needs it.
        topology.unlink()
        self.assertIn("Nothing has been found", self.text("monitor", "verdicts"))
        # Its sends never wait, so no cell of the matrix is judged.
        self.assertEqual([job["job"] for job in self.ask("monitor", "matrix")["jobs"]], ["ring"])
        self.assertIn("No connection between nodes has been measured", self.text("monitor", "matrix"))

        os.kill(self.pid_of(2), signal.SIGSTOP)
        found = self.until("a verdict on the stopped rank", lambda: self.verdict("stopped"))
        self.assertEqual((found["suspects"], found["scope"], found["state"]), ([{"rank": 2}], "process", "open"))
        self.assertEqual(self.job_status()["light"], "red")
        text = self.text("monitor", "status")
        self.assertIn("RED", text)
        self.assertIn(f"verdict {found['id']}: ", text)
        sinks = self.ask("monitor", "top")["jobs"][0]["sinks"]
        self.assertEqual((sinks[0]["kind"], sinks[0]["rank"], sinks[0]["waiters"]), ("rank", 2, RANKS - 1))
        text = self.text("monitor", "top")
        self.assertIn("at the end of the chain: rank 2 (3 ranks wait for it)", text)
        self.assertIn("rank 3", text)
        text = self.text("monitor", "explain", found["id"])
        for part in ("rank 2 (node n2)", "the process of the rank, not its machine", "wrong if", "suspicion", "verdict"):
            self.assertIn(part, text)
        self.assertEqual(self.ask("monitor", "explain", found["id"])["finding"]["id"], found["id"])

        # A worker that is restarted in the middle goes on with the same finding.
        worker = self.ask("status")["agent"]["worker_pid"]
        os.kill(worker, signal.SIGKILL)
        self.until("a new worker", lambda: (lambda answer: answer and answer["findings"])(self.ask("monitor", "verdicts")))
        self.assertEqual([one["id"] for one in self.ask("monitor", "verdicts")["findings"]], [found["id"]])
        self.until("the same topology", lambda: (job := self.job_status()) and
                   job["topology"] == {"given": True, "ranks_placed": RANKS, "first_left_out": None})

        changes = []
        while True:
            line = follower.stdout.readline()
            if not line:
                break
            changes.append(json.loads(line))
        self.assertEqual([(one["change"], one["finding"]["id"]) for one in changes],
                         [("suspicion", found["id"]), ("verdict", found["id"])])
        self.until("on_verdict", lambda: events.exists() and events.read_text().startswith("verdict stopped 2\n"))

        recorder.send_signal(signal.SIGINT)
        _, error = recorder.communicate(timeout=DEADLINE)
        self.assertEqual(recorder.returncode, 0, error)
        replayed = self.replay()
        self.assertTrue(replayed["recording"]["ended_on_purpose"])
        [again] = replayed["findings"]
        for member in ("id", "grade", "fault", "scope", "suspects", "job", "attempt_key"):
            self.assertEqual(again[member], found[member], member)
        self.assertEqual(self.run_holdfast("monitor", "record", self.recording)[0], 1)  # never overwritten


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
