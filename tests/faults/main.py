#!/usr/bin/python3
"""Real jobs with real faults, and whether the monitor says of each what cases.toml expects.

Eight ranks on nodes of their own (network namespaces) train; something is done to one of them, or to
its network, or nothing; `holdfast monitor verdicts` must name class, scope and suspects.

Exit status: 0 if all were right, or if it cannot run here (said, with the number of cases skipped);
1 if one was wrong; 2 for wrong arguments.
"""
import argparse
import dataclasses
import json
import pathlib
import re
import signal
import sys
import tempfile
import time

import campaign
import cases
import network
from job import ROOT, Programs


def parse_arguments(table):
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="CASE", help="may be repeated")
    parser.add_argument("--all", action="store_true", help="those that CI leaves out, too")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--slots", type=int, default=4, metavar="N", help="jobs at once (default 4)")
    parser.add_argument("--run", type=int, default=0, metavar="N",
                        help="the number of the run, which decides the victims (default 0)")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "release")
    parser.add_argument("--directory", type=pathlib.Path,
                        help="keep recordings, results and the last logs there (default: a temporary "
                             "one)")
    arguments = parser.parse_args()
    if arguments.slots < 1:
        parser.error(f"--slots: expected at least 1, found {arguments.slots}")
    try:
        arguments.cases = [table.case(name) for name in arguments.only or ()]
    except cases.WrongTable as error:
        parser.error(f"--only: {error}")
    if not arguments.cases:
        arguments.cases = [case for case in table.cases if case.in_ci or arguments.all]
    return arguments


def file_name(case):
    return re.sub("[^a-zA-Z0-9.]+", "-", case.name)


def without_torch(table, chosen, programs):
    """Those that can run here; says which cannot."""
    if programs.python.exists():
        return chosen
    skipped = [case for case in chosen if table.jobs[case.job].program != "tiny_lm"]
    for case in skipped:
        print(f"[  SKIPPED ] faults: {case.name} (no {programs.venv}: scripts/interop makes it)")
    return [case for case in chosen if case not in skipped]


def run(table, arguments, directory):
    programs = Programs(arguments.build)
    chosen = without_torch(table, arguments.cases, programs)
    tasks = [campaign.Task(case, arguments.run,
                           directory / f"{file_name(case)}.hfmr")
             for case in chosen]
    wrong = []

    def tell(task, result):
        print(campaign.line(task, result), flush=True)
        if not getattr(result, "right", False):
            wrong.append(task.case.name)
        if not isinstance(result, BaseException):
            task.recording.with_suffix(".json").write_text(
                json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")

    began = time.monotonic()
    with network.Exclusive():
        campaign.run_all(table, tasks, programs, directory, arguments.slots, tell)
    print(f"{len(tasks)} cases, {len(arguments.cases) - len(tasks)} skipped, {len(wrong)} wrong, "
          f"{time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


def main():
    table = cases.read()
    arguments = parse_arguments(table)
    if arguments.list:
        for case in table.cases:
            print(f"{'ci' if case.in_ci else '  '}  {case.kind.name:6} {case.job:12} {case.name}")
        return 0
    # So that namespaces and processes go whatever ends us; SIGKILL excepted, see network.py.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        network.check_possible()
        if arguments.directory is not None:
            arguments.directory = arguments.directory.resolve()
            arguments.directory.mkdir(parents=True, exist_ok=True)
            return run(table, arguments, arguments.directory)
        with tempfile.TemporaryDirectory(prefix="holdfast-faults-") as directory:
            return run(table, arguments, pathlib.Path(directory))
    except network.CannotRun as reason:
        print(f"[  SKIPPED ] faults ({reason})")
        print(f"skipped: {len(arguments.cases)}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
