"""The protocol of all speed claims: interleaved pairs, their ratios, and a control that can say 'noisy'.

A claim compares two measurements A (ours) and B (the baseline), each a function that runs once and
returns a rate (more is better) or a duration (less is better). They run A, B, A, B, ... so that a slow
minute of the machine hits both. The figure is the median of the ratios of neighbours, with quartiles.
The control is the same statistic over neighbouring runs of B alone: if it leaves 0.9 to 1.1 the machine
was too uneven for a claim; the series is repeated at most three times, then reported as noisy.
"""

import dataclasses
import json
import math
import statistics
import sys

PAIRS = 9
CONTROL = (0.9, 1.1)
TRIES = 3


@dataclasses.dataclass
class Row:
    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None      # ours / baseline, more is better
    quartiles: tuple | None = None  # of the ratio, or of the value where there is no baseline
    goal: str = ""
    holds: bool | None = None       # None: no goal was set
    noisy: bool = False
    note: str = ""


def quartiles(values):
    if len(values) < 2:
        return (values[0], values[0])
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return (cuts[0], cuts[2])


def compare(name, unit, ours, baseline, goal_ratio, pairs=PAIRS, note="", rate=True):
    """One row for A against B. `rate`: both return rates; else durations, whose ratio is inverted."""
    for attempt in range(1, TRIES + 1):
        a, b = [], []
        for index in range(pairs):
            a.append(ours())
            b.append(baseline())
            progress(f"{name}: pair {index + 1} of {pairs}: {a[-1]:.4g} against {b[-1]:.4g} {unit}")
        ratios = [x / y if rate else y / x for x, y in zip(a, b)]
        control = statistics.median(y / x for x, y in zip(b, b[1:]))
        steady = CONTROL[0] <= control <= CONTROL[1]
        if steady:
            break
        progress(f"{name}: control {control:.3f}, series {attempt} of {TRIES} is noisy")
    ratio = statistics.median(ratios)
    return Row(name, statistics.median(a), unit, statistics.median(b), ratio, quartiles(ratios),
               f"ratio >= {goal_ratio}" if goal_ratio else "",
               (ratio >= goal_ratio) if goal_ratio else None, not steady,
               f"control {control:.3f}; {note}".rstrip("; "))


def measure(name, unit, once, goal_max=None, repeats=PAIRS, note=""):
    """One row without a baseline: the median of `repeats` runs against an absolute limit."""
    values = []
    for index in range(repeats):
        values.append(once())
        progress(f"{name}: run {index + 1} of {repeats}: {values[-1]:.4g} {unit}")
    value = statistics.median(values)
    return Row(name, value, unit, quartiles=quartiles(values),
               goal=f"<= {goal_max} {unit}" if goal_max is not None else "",
               holds=(value <= goal_max) if goal_max is not None else None, note=note)


def paired_ratio(ours, baseline):
    """The median of the ratios ours / baseline of pairs that were run side by side, and its interval at 95%
    confidence: order statistics of the ratios, which hold whatever their distribution (sign test). Below
    six pairs there is none, and the extremes are returned."""
    ratios = sorted(x / y for x, y in zip(ours, baseline))
    count = len(ratios)
    # The greatest rank below which the median lies with a probability of at most 2.5%: the sum of binomial
    # coefficients up to it, over 2^count, in whole numbers, which thousands of pairs do not overflow.
    term, tail, rank = 1, 1, 0
    while 40 * tail <= 2 ** count:
        rank += 1
        term = term * (count - rank + 1) // rank
        tail += term
    low = max(rank - 1, 0)
    return statistics.median(ratios), ratios[low], ratios[count - 1 - low]


def progress(text):
    print(f"   {text}", file=sys.stderr, flush=True)


def show(rows):
    header = ("name", "value", "unit", "baseline", "ratio", "quartiles", "goal", "holds", "note")
    table = [header]
    for row in rows:
        holds = "" if row.holds is None else ("yes" if row.holds else "NO")
        table.append((
            row.name, f"{row.value:.4g}", row.unit,
            "" if row.baseline is None else f"{row.baseline:.4g}",
            "" if row.ratio is None else f"{row.ratio:.3f}",
            "" if row.quartiles is None else f"{row.quartiles[0]:.4g} to {row.quartiles[1]:.4g}",
            row.goal, holds + (" (noisy)" if row.noisy else ""), row.note))
    widths = [max(len(line[column]) for line in table) for column in range(len(header) - 1)]
    for line in table:
        print("  ".join([cell.ljust(width) for cell, width in zip(line, widths)] + [line[-1]]).rstrip())


def finite(value):
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple):
        return [finite(item) for item in value]
    return value


def save(rows, path):
    found = [{key: finite(value) for key, value in dataclasses.asdict(row).items()} for row in rows]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"schema_version": 1, "rows": found}, file, indent=1, allow_nan=False)
        file.write("\n")
