"""One run of one case: a network, an agent, a job; a fault; what the monitor says; the score."""
import dataclasses
import os
import pathlib
import shutil
import statistics
import time

import faults
import score as scoring
from job import LOOK_SECONDS, Agent, Failed, Programs, Training, replay, wait_until
from network import Network

FIRST_STEPS = 20  # before the warm-up counts
# So little that the network, and not the few processors, decides how long traffic takes.
NIC_BITS = 100_000_000
SETTLE_SECONDS = 4  # behind a verdict: is it taken back?


@dataclasses.dataclass
class Result:
    """What is kept of a run. `seen` is all that was said, so that it can be judged again."""

    case: str
    run: int
    digest: str
    victim: int
    peer: int
    right: bool
    reason: str
    suspicion_seconds: float | None
    verdict_seconds: float | None
    seen: list
    # Of rank 0, medians: the proof that a slow fault slows, and what "clean" means.
    step_seconds_before: float | None
    step_seconds_after: float | None
    onset: float  # on the agent's monotonic clock, which is the recording's
    seconds: float  # of the whole run
    load: float  # of the machine, runnable threads, the mean over the run: how loaded it was


def run_case(table, case, run, programs: Programs, directory: pathlib.Path, slot: str,
             recording: pathlib.Path, settle_seconds: float = SETTLE_SECONDS) -> Result:
    """Runs it in the network `slot`; nothing of it stays but `recording` and what is below
    `directory`. Right is what the agent said only if a replay of the recording says it, too. Raises
    Failed if the harness, not the monitor, went wrong."""
    began = time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    job = table.jobs[case.job]
    victim, peer = case.roles(run, job.ranks)
    watch = scoring.Watch()
    steps = Steps()
    with Network(slot, job.ranks, NIC_BITS) as network, Agent(programs, network, directory) as agent:
        agent.record(recording)
        with Training(programs, network, agent, job, directory / "job", victim) as training:
            scene = faults.Scene(network, agent, training, victim, peer)
            training.wait_for_step(FIRST_STEPS)
            wait_until(lambda: agent.sees(job.ranks), "the monitor to see all ranks")
            look(agent, training, watch, steps, time.monotonic() + case.warm_seconds)
            steps.split()
            begun = faults.begin(case.fault, scene, case.arguments)
            try:
                look(agent, training, watch, steps, begun.onset + case.watch_seconds,
                     settle_seconds if case.expected is not None else None)
                agent.stop_recording()
            finally:
                begun.end()
    seen = [dataclasses.replace(one, seconds=round(one.seconds - begun.onset, 2))
            for one in watch.seen]
    expected = case.expected and case.expected.filled_in(victim, peer)
    score = judge(case, expected, seen, watch.findings)
    if score.right:
        document = replay(programs, recording)
        replayed = judge(case, expected, scoring.seen_in_replay(document, begun.onset),
                         document["findings"])
        if not replayed.right:
            score = dataclasses.replace(score, right=False,
                                        reason=f"the replay differs: {replayed.reason}")
    return Result(case.name, run, case.digest, victim, peer, score.right, score.reason,
                  score.suspicion_seconds, score.verdict_seconds,
                  [dataclasses.asdict(one) for one in seen], steps.before(), steps.after(),
                  begun.onset, round(time.monotonic() - began, 1), steps.load())


def judge(case, expected, seen, findings):
    """`findings`: as they were in the end."""
    score = scoring.judge(expected, seen, case.kind.verdict_seconds,
                          case.kind.verdict_not_before_seconds)
    missing = scoring.missing_evidence(case.evidence, findings)
    if score.right and missing is not None:
        return dataclasses.replace(score, right=False, reason=f"no evidence has '{missing}'")
    return score


def look(agent, training, watch, steps, deadline, settle_seconds=None):
    """Notes what the monitor says until `deadline`, or, if that is given, until `settle_seconds` behind
    a verdict."""
    settled = None
    answered = time.monotonic()
    while (now := time.monotonic()) < min(deadline, settled or deadline):
        findings = agent.findings()
        if findings is not None:
            answered = time.monotonic()
            watch.add(answered, findings)
        elif now - answered > 30:
            raise Failed("the agent has not answered for 30 s")
        steps.add(now, training.step())
        if settle_seconds is not None and settled is None and watch.has_verdict():
            settled = time.monotonic() + settle_seconds
        time.sleep(LOOK_SECONDS)


class Steps:
    """How long a step takes, before and after the onset; and the machine's load."""

    def __init__(self):
        self._seen = []  # (monotonic, step)
        self._loads = []
        self._split = None

    def add(self, now, step):
        self._seen.append((now, step))
        self._loads.append(os.getloadavg()[0])

    def split(self):
        self._split = len(self._seen)

    def load(self):
        return round(statistics.mean(self._loads), 1)

    def before(self):
        return self._rate(self._seen[:self._split])

    def after(self):
        return self._rate(self._seen[self._split:])

    @staticmethod
    def _rate(seen):
        """Seconds per step; None if there was none."""
        if len(seen) < 2 or seen[-1][1] == seen[0][1]:
            return None
        return round((seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1]), 4)
