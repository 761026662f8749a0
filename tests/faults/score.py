"""Whether what the monitor said of one run is what was written down before it.

Pure: a case (cases.py) and what was seen, with the seconds since the onset of the fault, in; a
`Score` out. Sees the findings as `holdfast monitor verdicts --json` prints them.
"""
import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Seen:
    """One state of one finding, when it was first seen so."""

    seconds: float  # since the onset; negative: before it
    id: str
    grade: str  # "suspicion", "verdict"
    fault: str
    scope: str
    suspects: tuple  # of (rank, peer); peer is rank where no connection is meant

    @staticmethod
    def of(seconds, finding):
        suspects = tuple((one["rank"], one.get("peer", one["rank"]))
                         for one in finding["suspects"])
        return Seen(seconds, finding["id"], finding["grade"], finding["fault"], finding["scope"],
                    suspects)

    def says(self):
        """Everything but when."""
        return (self.id, self.grade, self.fault, self.scope, self.suspects)


@dataclasses.dataclass
class Score:
    right: bool
    reason: str  # why it is not right; empty if it is
    suspicion_seconds: float | None = None  # onset to the first word about the right ones
    verdict_seconds: float | None = None  # onset to the right verdict


def seen_in_replay(document, onset):
    """The same of `holdfast --json monitor replay`: what was told of each finding, with what it said
    in the end. `onset` on the clock of the recording, which is the agent's monotonic one."""
    grades = {"suspicion": "suspicion", "verdict": "verdict"}
    seen = []
    for finding in document["findings"]:
        for event in finding["history"]:
            if event["change"] in grades:
                told = finding | {"grade": grades[event["change"]]}
                seen.append(Seen.of(round(event["at_seconds"] - onset, 2), told))
    return sorted(seen, key=lambda one: one.seconds)


def missing_evidence(parts, findings):
    """The first of `parts` that no line of evidence of a verdict has; None if all are there."""
    lines = [line for finding in findings if finding["grade"] == "verdict"
             for line in finding["evidence"]]
    return next((part for part in parts if not any(part in line for line in lines)), None)


class Watch:
    """Collects what is said over time, each change once."""

    def __init__(self):
        self.seen = []
        self.findings = []  # as they were last
        self._last = {}

    def add(self, seconds, findings):
        self.findings = findings
        for finding in findings:
            now = Seen.of(seconds, finding)
            if self._last.get(now.id) != now.says():
                self._last[now.id] = now.says()
                self.seen.append(now)

    def has_verdict(self):
        return any(one.grade == "verdict" and one.seconds >= 0 for one in self.seen)


def describe(one):
    suspects = ", ".join(str(rank) if rank == peer else f"{rank}>{peer}"
                         for rank, peer in one.suspects) or "nobody"
    return f"{one.grade} {one.fault} ({one.scope}) of {suspects} at {one.seconds:.1f} s"


def judge(expected, seen, seconds_max=math.inf, seconds_min=0):
    """`expected`: None (nothing may be said), or an `Expected` of cases.py with its suspects filled
    in. Right is: nothing before the onset; the first verdict has the class, the scope and none but
    the suspects, comes not before `seconds_min` and within `seconds_max`, and is not taken back for
    another; in the end the verdicts name all suspects; nobody else is named in any grade."""
    early = [one for one in seen if one.seconds < 0]
    if early:
        return Score(False, f"before the onset: {describe(early[0])}")
    if expected is None:
        if seen:
            return Score(False, f"expected nothing: {describe(seen[0])}")
        return Score(True, "")
    allowed = set(expected.suspects) | set(expected.also)
    score = Score(True, "")
    named = set()
    for one in seen:
        if not set(one.suspects) <= allowed:
            return dataclasses.replace(score, right=False, reason=f"names others: {describe(one)}")
        if score.suspicion_seconds is None and one.suspects:
            score.suspicion_seconds = one.seconds
        if one.grade != "verdict":
            continue
        if (one.fault not in expected.classes or one.scope not in expected.scopes or
                not one.suspects or not set(one.suspects) <= set(expected.suspects)):
            return dataclasses.replace(score, right=False, reason=f"not as expected: {describe(one)}")
        named |= set(one.suspects)
        if one.seconds < seconds_min:
            return dataclasses.replace(
                score, right=False, reason=f"earlier than {seconds_min:.0f} s: {describe(one)}")
        if score.verdict_seconds is None:
            score.verdict_seconds = one.seconds
    if score.verdict_seconds is None:
        last = f"; last {describe(seen[-1])}" if seen else ""
        return dataclasses.replace(score, right=False, reason=f"no verdict{last}")
    if named != set(expected.suspects):
        missing = ", ".join(map(str, sorted(set(expected.suspects) - named)))
        return dataclasses.replace(score, right=False, reason=f"no verdict names {missing}")
    if score.verdict_seconds > seconds_max:
        return dataclasses.replace(
            score, right=False,
            reason=f"verdict after {score.verdict_seconds:.1f} s, expected within {seconds_max:.0f} s")
    return score


def interval(right, runs, confidence=0.95):
    """Clopper and Pearson's exact interval of a share of which `right` of `runs` were seen."""
    if not 0 <= right <= runs or runs < 1:
        raise ValueError(f"expected 0 <= right <= runs, found {right} of {runs}")
    tail = (1 - confidence) / 2

    def at_least(share):  # the probability of `right` or more
        return sum(math.comb(runs, k) * share**k * (1 - share)**(runs - k)
                   for k in range(right, runs + 1))

    def at_most(share):
        return sum(math.comb(runs, k) * share**k * (1 - share)**(runs - k)
                   for k in range(0, right + 1))

    low = 0.0 if right == 0 else _where(lambda share: at_least(share) >= tail)
    high = 1.0 if right == runs else _where(lambda share: at_most(share) <= tail)
    return low, high


def _where(holds):
    """The least share of which `holds` is true, where it is false below and true above."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def percentile(values, share):
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
