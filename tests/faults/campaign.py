"""Many runs, several at once, and what is printed of them. Shared by scripts/faults and
bench/detection/run."""
import concurrent.futures
import dataclasses
import pathlib
import queue
import traceback

import score as scoring
from job import Failed
from network import remove_leftovers
from run import SETTLE_SECONDS, run_case


@dataclasses.dataclass(frozen=True)
class Task:
    case: object
    run: int
    recording: pathlib.Path
    settle_seconds: float = SETTLE_SECONDS


def run_all(table, tasks, programs, directory, slots, tell):
    """Runs all, the longest first, `slots` at once. `tell(task, result)` is called for each, in this
    thread, as they end; `result` is a Result, or an exception if the harness went wrong."""
    free = queue.SimpleQueue()
    for slot in range(slots):
        free.put(f"slot{slot}")

    def one(task):
        slot = free.get()
        try:
            return run_case(table, task.case, task.run, programs, directory / slot, slot,
                            task.recording, task.settle_seconds)
        finally:
            free.put(slot)

    def length(task):
        return task.case.warm_seconds + task.case.watch_seconds * (
            1 if task.case.expected is None else 0.5)

    with concurrent.futures.ThreadPoolExecutor(slots) as pool:
        running = {pool.submit(one, task): task
                   for task in sorted(tasks, key=length, reverse=True)}
        try:
            for future in concurrent.futures.as_completed(running):
                error = future.exception()
                if error is not None and not isinstance(error, Failed):
                    traceback.print_exception(error)
                tell(running[future], error or future.result())
        except BaseException:
            for future in running:
                future.cancel()
            # Those that run end with their processes, not after minutes.
            remove_leftovers()
            raise


def line(task, result):
    """One line of text of a result."""
    if isinstance(result, BaseException):
        return f"{task.case.name} (run {task.run}): the harness failed: {result}"
    times = "".join(f", {what} {seconds:.1f} s" for what, seconds in (
        ("suspicion", result.suspicion_seconds), ("verdict", result.verdict_seconds))
        if seconds is not None)
    steps = (f"{1000 * result.step_seconds_before:.0f}" if result.step_seconds_before else "-",
             f"{1000 * result.step_seconds_after:.0f}" if result.step_seconds_after else "-")
    return (f"{'right' if result.right else 'WRONG'}  {task.case.name} (run {task.run}, rank "
            f"{result.victim}, step {steps[0]} -> {steps[1]} ms{times}, {result.seconds:.0f} s, load {result.load:.0f})"
            f"{'' if result.right else ': ' + result.reason}")


def span(values):
    """Median and 90th percentile, as text."""
    if not values:
        return ""
    return f"{scoring.percentile(values, 0.5):.1f}, {scoring.percentile(values, 0.9):.1f}"
