"""The NCCL profiler plugin: nanoseconds per event, as NCCL's proxy would wait for them, and what it costs a job.

Hot: one event after the other, in processor time. Cold: the first two levels of cache are filled with
something else before every event, so that code and data come from the last level; a single call then
costs what it waits for memory, whatever it does. `bench_profiler PLUGIN.so MIX CACHES` measures any other
plugin in the same way (one that needs CUDA's symbols is loaded lazily).

The job is tiny_lm on examples/collectives, whose proxy calls the plugin as NCCL's does, with no time of a
device to hide behind. Runs with and without the plugin alternate, in changing order. A run counts with the
median of its steps, a pair with the ratio of its runs; the interval of the median ratio (pairs.paired_ratio)
must end below the goal for the goal to hold, and lie above it to be missed.
"""

import json
import os
import statistics
import subprocess

import pairs

GOAL_NS = 30
GOAL_RATIO = 1.005
RANKS = 2
STEPS = 1000
JOB_PAIRS = 60


def rows(place):
    plugin = place.build / "hook" / "profiler" / "libnccl-profiler-holdfast.so"

    def once(mix, caches):
        result = subprocess.run([place.build / "bench" / "bench_profiler", plugin, mix, caches], check=True,
                                capture_output=True, text=True)
        return json.loads(result.stdout)["nanoseconds_per_event"]

    return [
        pairs.measure("profiler event, hot", "ns", lambda: once("pipeline", "hot"), GOAL_NS,
                      note="8 steps open; clock included"),
        pairs.measure("profiler event, hot, each one news", "ns", lambda: once("serial", "hot"), GOAL_NS,
                      note="1 step open: nearly every event reads the clock and changes the board"),
        pairs.measure("profiler poll without credit, hot", "ns", lambda: once("polls", "hot"), GOAL_NS),
        pairs.measure("profiler event, caches evicted", "ns", lambda: once("pipeline", "cold"),
                      note="L1 and L2 refilled before every event"),
        pairs.measure("profiler poll without credit, caches evicted", "ns", lambda: once("polls", "cold"),
                      note="L1 and L2 refilled before every event"),
    ]


def run_job(place, plugin):
    """(milliseconds per step, processor milliseconds per step) of rank 0."""
    root = place.build.parent.parent
    environment = dict(os.environ, NCCL_PROFILER_PLUGIN=str(plugin), HOLDFAST_MONITOR="light")
    for name in ("HOLDFAST_SOCKET", "HOLDFAST_JOB"):  # no agent: it would not be on a node of its own
        environment.pop(name, None)
    result = subprocess.run(
        [root / "examples" / "launch", "--nproc", str(RANKS), "--", place.build / "examples" / "tiny_lm" / "tiny_lm",
         "--corpus", root / "docs", "--steps", str(STEPS), "--device-ms", "0", "--no-holdfast", "--zero", "0",
         "--batch", str(RANKS), "--micro-batch", "1"],
        check=True, capture_output=True, text=True, env=environment)
    steps, processor = [], None
    for line in result.stdout.splitlines():
        event = json.loads(line.partition("] ")[2])
        if event["rank"] == 0 and event["event"] == "step":
            steps.append(sum(event["ms"].values()))
        elif event["rank"] == 0 and event["event"] == "finished":
            processor = event["cpu_ms"] / STEPS
    return statistics.median(steps), processor


def job(place):
    plugin = place.build / "hook" / "profiler" / "libnccl-profiler-holdfast.so"
    run_job(place, plugin)
    with_plugin, without = [], []
    for index in range(JOB_PAIRS):
        arms = [(plugin, with_plugin), ("none", without)]
        for what, runs in arms if index % 2 == 0 else reversed(arms):
            runs.append(run_job(place, what))
        pairs.progress(f"tiny_lm: pair {index + 1} of {JOB_PAIRS}: {with_plugin[-1][0]:.4f} ms with the plugin, "
                       f"{without[-1][0]:.4f} without")

    def row(name, index, goal):
        ours, baseline = [run[index] for run in with_plugin], [run[index] for run in without]
        ratio, low, high = pairs.paired_ratio(ours, baseline)
        holds = None if goal is None or low <= goal < high else high <= goal
        return pairs.Row(
            name, statistics.median(ours), "ms", statistics.median(baseline), 1 / ratio,
            pairs.quartiles([b / a for a, b in zip(ours, baseline)]),
            "" if goal is None else f"<= {100 * (goal - 1):+.1f}% at 95%", holds,
            noisy=goal is not None and holds is None,
            note=f"{100 * (ratio - 1):+.2f}%, at 95% confidence {100 * (low - 1):+.2f}% to {100 * (high - 1):+.2f}%; "
                 f"{JOB_PAIRS} pairs of {STEPS} steps, {RANKS} ranks")

    return [row("tiny_lm step with the plugin", 0, GOAL_RATIO),
            row("tiny_lm processor time per step with the plugin", 1, None)]
