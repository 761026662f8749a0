#!/usr/bin/python3
"""The series of bench/detection/run: runs what is still missing, keeps every result, prints the table.

Results are lines of JSON (--results), one per run, written as soon as it has ended; a run whose case
has been changed since counts as missing. With them the recordings of the runs, which can be replayed.

With --replay instead: what the analysis as it is now says of the recordings that are there.

With --smallest instead: of each case that has severities the mildest one that is found, by bisection; a
severity counts as found if all of its runs (3, if --runs does not say otherwise) are right.
"""
import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "faults"))

import campaign  # noqa: E402
import cases  # noqa: E402
import main as faults_main  # noqa: E402
import network  # noqa: E402
import score as scoring  # noqa: E402
from job import Programs, replay  # noqa: E402
from run import judge  # noqa: E402

CLEAN_MINUTES = 60
SMALLEST_RUNS = 3
# Behind our verdict: the baselines, which see the recordings, need more time to say something.
SETTLE_SECONDS = 25


def parse_arguments(table):
    parser = argparse.ArgumentParser(prog="bench/detection/run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print what is there and end")
    parser.add_argument("--replay", action="store_true",
                        help="print what the recordings that are there say now, and end")
    parser.add_argument("--smallest", action="store_true",
                        help="the smallest fault that is found, of each class")
    parser.add_argument("--only", action="append", metavar="CASE", help="may be repeated")
    parser.add_argument("--runs", type=int, metavar="N", help="of each case (default: its kind's)")
    parser.add_argument("--minutes", type=float, default=CLEAN_MINUTES, metavar="N",
                        help=f"of the long clean run (default {CLEAN_MINUTES})")
    parser.add_argument("--slots", type=int, default=2, metavar="N", help="jobs at once (default 2)")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "release")
    parser.add_argument("--results", type=pathlib.Path,
                        default=ROOT / "build" / "detection" / "results.jsonl")
    arguments = parser.parse_args()
    if arguments.replay and (arguments.report or arguments.smallest):
        parser.error("--replay: expected without --report and --smallest")
    try:
        arguments.cases = ([table.case(name) for name in arguments.only] if arguments.only else
                           with_long_clean(table.cases, arguments.minutes))
    except cases.WrongTable as error:
        parser.error(f"--only: {error}")
    if arguments.smallest:
        arguments.runs = arguments.runs or SMALLEST_RUNS
        for case in arguments.cases:
            if arguments.only and case.severity is None:
                parser.error(f"--only: case '{case.name}' has no severities")
        arguments.cases = [case for case in arguments.cases if case.severity is not None]
    return arguments


def with_long_clean(all_cases, minutes):
    """The case `clean` besides once for so long."""
    clean = next(case for case in all_cases if case.name == "clean")
    return [*all_cases, dataclasses.replace(
        clean, name=f"clean for {minutes:g} minutes", watch_seconds=60 * minutes,
        kind=dataclasses.replace(clean.kind, runs=1))]


def read_results(path):
    """By (case, run) the newest of the case as it is now written."""
    results = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            results[(result["case"], result["run"], result["digest"])] = result
    return results


def of_case(results, case):
    return [result for (name, _, digest), result in sorted(results.items())
            if (name, digest) == (case.name, case.digest)]


def revision():
    told = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    return told.stdout.strip() or "unknown"


def run_missing(table, arguments, results):
    """What is missing of `arguments.cases`."""
    programs = Programs(arguments.build)
    chosen = faults_main.without_torch(table, arguments.cases, programs)
    directory = arguments.results.parent
    recordings = directory / "recordings"
    recordings.mkdir(parents=True, exist_ok=True)
    tasks = [campaign.Task(case, run,
                           recordings / f"{faults_main.file_name(case)}-{run}.hfmr", SETTLE_SECONDS)
             for run in range(max(arguments.runs or case.kind.runs for case in chosen))
             for case in chosen
             if run < (arguments.runs or case.kind.runs) and
             (case.name, run, case.digest) not in results]
    print(f"{len(tasks)} runs are missing", flush=True)
    written_by = revision()
    done = 0

    def tell(task, result):
        nonlocal done
        done += 1
        print(f"[{done}/{len(tasks)}] {campaign.line(task, result)}", flush=True)
        if isinstance(result, BaseException):
            return  # it is missing still
        row = dataclasses.asdict(result) | {"revision": written_by,
                                            "recording": task.recording.name}
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        results[(row["case"], row["run"], row["digest"])] = row

    with network.Exclusive():
        campaign.run_all(table, tasks, programs, directory / "work", arguments.slots, tell)


@dataclasses.dataclass(frozen=True)
class Bisection:
    """How far the search for the mildest severity of a case has come."""

    undecided: object  # the severity whose runs are missing; None: done
    missed: object  # the hardest that is not found; None: none
    found: object  # the mildest that is found; None: none


def bisect(case, runs, results):
    """Assumes that what is harder is found, too."""
    values = case.severity.values
    missed, found = -1, len(values)
    undecided = None
    while found - missed > 1 and undecided is None:
        middle = (missed + found) // 2
        rows = of_case(results, case.at(values[middle]))[:runs]
        if not all(row["right"] for row in rows):
            missed = middle
        elif len(rows) < runs:
            undecided = values[middle]
        else:
            found = middle
    return Bisection(undecided, values[missed] if missed >= 0 else None,
                     values[found] if found < len(values) else None)


def find_smallest(table, arguments, results):
    before = None
    while True:
        undecided = [case.at(value) for case in arguments.cases
                     if (value := bisect(case, arguments.runs, results).undecided) is not None]
        # A run that could not be made is missing still; whoever wants it calls again.
        if not undecided or undecided == before:
            return
        before = undecided
        run_missing(table, argparse.Namespace(**(vars(arguments) | {"cases": undecided})), results)


def report_smallest(arguments, results):
    print("| fault | smallest that is found | step ms | right | load | not found |\n|---|---|---|---|---|---|")
    for case in arguments.cases:
        state = bisect(case, arguments.runs, results)
        name = case.severity.argument
        found, step, right, load = "", "", "", ""
        if state.found is not None:
            rows = of_case(results, case.at(state.found))
            found = f"{name} {state.found:g}"
            step, load = step_ms(rows), load_of(rows)
            right = f"{sum(row['right'] for row in rows)} of {len(rows)}"
        missed = "" if state.missed is None else f"{name} {state.missed:g}"
        print(f"| {case.name} | {found} | {step} | {right} | {load} | {missed} |"
              f"{'' if state.undecided is None else ' not finished'}")
    print("\n\"Not found\" is the next milder one: not all of its runs were right.")


def step_ms(rows):
    """Medians before and after the onset."""
    steps = [statistics.median(values) * 1000 if values else None for values in (
        [row[key] for row in rows if row[key]] for key in ("step_seconds_before", "step_seconds_after"))]
    return " -> ".join("-" if ms is None else f"{ms:.0f}" for ms in steps)


def load_of(rows):
    loads = [row["load"] for row in rows if "load" in row]
    return f"{min(loads):.0f} to {max(loads):.0f}" if loads else ""


def baselines(arguments, case, rows):
    """Of each baseline (bench/monitor_baselines.h) on the recordings of these runs: in how many its
    first alarm behind the onset names the right one first, and in how many somebody else. Of a
    connection either end is right; where nothing is wrong every alarm is wrong."""
    program = arguments.build / "bench" / "bench_monitor_recordings"
    recordings = arguments.results.parent / "recordings"
    told = [(row, recordings / row["recording"]) for row in rows]
    told = [(row, path) for row, path in told if path.exists()]
    if not told or not program.exists():
        return {}
    run = subprocess.run([program, *(text for row, path in told for text in (path, str(row["onset"])))],
                         capture_output=True, text=True, check=True)
    counts = {}
    for (row, _), line in zip(told, run.stdout.splitlines(), strict=True):
        expected = case.expected and case.expected.filled_in(row["victim"], row["peer"])
        right_ones = {rank for pair in expected.suspects for rank in pair} if expected else set()
        for alarm in json.loads(line)["alarms"]:
            count = counts.setdefault(alarm["name"], [0, 0, 0])  # right, wrong, names nobody
            if "seconds" not in alarm:
                continue
            if not alarm["suspects"]:
                count[2] += 1
            else:
                count[0 if alarm["suspects"][0] in right_ones else 1] += 1
    return counts


def replayed(case, row, recording, programs):
    """The row of a run, judged anew by a replay of its recording."""
    document = replay(programs, recording)
    expected = case.expected and case.expected.filled_in(row["victim"], row["peer"])
    score = judge(case, expected, scoring.seen_in_replay(document, row["onset"]),
                  document["findings"])
    return row | dataclasses.asdict(score)


def replay_all(arguments, results):
    """Of the cases that are asked for: the results whose recordings are there, judged anew."""
    programs = Programs(arguments.build)
    recordings = arguments.results.parent / "recordings"
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {key: pool.submit(replayed, case, results[key], recording, programs)
                   for case in arguments.cases for key in sorted(results)
                   if (key[0], key[2]) == (case.name, case.digest) and
                   (recording := recordings / results[key]["recording"]).exists()}
    return {key: future.result() for key, future in running.items()}


def report(arguments, results):
    names = ("watchdog 600 s", "counts (RAS)", "largest z", "C4 rules")
    print("| fault | right | at least (95%) | suspicion s | verdict s | step ms | load | " +
          " | ".join(names) + " |")
    print("|---|---|---|---|---|---|---|" + "---|" * len(names))
    wrong = []
    for case in arguments.cases:
        rows = of_case(results, case)
        if not rows:
            continue
        right = sum(row["right"] for row in rows)
        low, _ = scoring.interval(right, len(rows))
        times = [campaign.span([row[key] for row in rows if row[key] is not None])
                 for key in ("suspicion_seconds", "verdict_seconds")]
        counts = baselines(arguments, case, rows)
        print(f"| {case.name} | {right} of {len(rows)} | {100 * low:.0f}% | {times[0]} | {times[1]} | "
              f"{step_ms(rows)} | {load_of(rows)} | " +
              " | ".join(alarms(counts.get(name)) for name in names) + " |")
        wrong += [f"- {row['case']}, run {row['run']} ({row['revision']}): {row['reason']}"
                  for row in rows if not row["right"]]
    print("\nSeconds from onset: median, 90th percentile. Baselines (our re-implementations, on the "
          "recordings of these runs): right / wrong first suspects, + alarms that name nobody.")
    if wrong:
        print("\nNot right:\n" + "\n".join(wrong))


def alarms(count):
    if count is None:
        return ""
    return f"{count[0]} / {count[1]}" + (f" + {count[2]}" if count[2] else "")


def main():
    table = cases.read()
    arguments = parse_arguments(table)
    arguments.results = arguments.results.resolve()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(arguments.results)
    run, tell = (find_smallest, report_smallest) if arguments.smallest else (run_missing, report)
    if arguments.report or arguments.replay:
        tell(arguments, replay_all(arguments, results) if arguments.replay else results)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        network.check_possible()
        run(table, arguments, results)
    except network.CannotRun as reason:
        print(f"bench/detection: {reason}", file=sys.stderr)
        return 1
    tell(arguments, results)
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
