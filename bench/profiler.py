"""The NCCL profiler plugin: nanoseconds per event, as NCCL's proxy would wait for them, and what it costs a job.

Hot: one event after the other, in processor time. Cold: the first two levels of cache are filled with
something else before every event, so that code and data come from the last level; a single call then
costs what it waits for memory, whatever it does. `bench_profiler PLUGIN.so MIX CACHES` measures any other
plugin in the same way (one that needs CUDA's symbols is loaded lazily).

The job is tiny_lm on examples/collectives, whose proxy calls the plugin as NCCL's does, with no time of a
device to hide behind; each rank has a processor of its own, so that what the proxy does costs the program.
Two comparisons, each of neighbours in time, with the interval of the median ratio (pairs.paired_ratio), which
must end below the goal for the goal to hold, and lie above it to be missed:

  inside one process: the plugin is asked for its events in every other block of 20 ms (gated_plugin.cc). A
    block counts with the median of its steps. Whatever differs from one process to the next, some 2%, is out
    of it, and there are thousands of pairs.
  of runs: with and without the plugin, in changing order. A run counts with the median of its steps, and with
    the processor time of a step, without that of starting. So that what costs something although nothing is
    asked for would be seen.
"""

import collections
import json
import os
import statistics
import subprocess

import pairs

GOAL_NS = 30
GOAL_RATIO = 1.005
RANKS = 2
BLOCK_MS = 20
BLOCKS_OF_START = 10
GATED_RUNS = 20
GATED_STEPS = 4000
STEPS = 400
FIRST_STEPS = 20  # of a run that does hardly more than to start
JOB_PAIRS = 120


def rows(place):
    plugin = plugin_of(place)

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



def plugin_of(place):
    return place.build / "hook" / "profiler" / "libnccl-profiler-holdfast.so"


def events_of_job(place, plugin, steps, **variables):
    """What rank 0 prints."""
    root = place.build.parent.parent
    cores = sorted(os.sched_getaffinity(0))
    environment = dict(os.environ, NCCL_PROFILER_PLUGIN=str(plugin), HOLDFAST_MONITOR="light", **variables)
    for name in ("HOLDFAST_SOCKET", "HOLDFAST_JOB"):  # no agent: it would not be on a node of its own
        environment.pop(name, None)
    # With fewer processors than ranks nothing is gained by holding them there.
    pinned = []
    if len(cores) >= RANKS:
        environment["CORES"] = " ".join(map(str, cores))
        pinned = ["/bin/sh", "-c", 'set -- $CORES -- "$@"; shift $LOCAL_RANK; core=$1; '
                  'while [ "$1" != -- ]; do shift; done; shift; exec taskset -c "$core" "$@"', "rank"]
    result = subprocess.run(
        [root / "examples" / "launch", "--nproc", str(RANKS), "--", *pinned,
         place.build / "examples" / "tiny_lm" / "tiny_lm", "--corpus", root / "docs", "--steps", str(steps),
         "--device-ms", "0", "--no-holdfast", "--zero", "0", "--batch", str(RANKS), "--micro-batch", "1"],
        check=True, capture_output=True, text=True, env=environment)
    events = [json.loads(line.partition("] ")[2]) for line in result.stdout.splitlines()]
    return [event for event in events if event["rank"] == 0]


def step_ms(event):
    return sum(event["ms"].values())


def blocks_of(events):
    """(on, milliseconds of its steps) of every block but those of the start."""
    blocks = []
    for event in events:
        if event["event"] == "gate":
            blocks.append((event["on"], []))
        elif event["event"] == "step" and blocks:
            blocks[-1][1].append(step_ms(event))
    return blocks[BLOCKS_OF_START:]


def pairs_of(blocks):
    """(median with, median without) of neighbours. The first step of a block began before it."""
    found = []
    at = 0
    while at + 1 < len(blocks):
        medians = {on: statistics.median(steps[1:]) for on, steps in blocks[at:at + 2] if len(steps) > 5}
        if len(medians) == 2:
            found.append((medians[True], medians[False]))
            at += 1
        at += 1
    return found


def run_job(place, plugin, steps=STEPS):
    """(milliseconds per step, processor milliseconds of the whole run) of rank 0."""
    by_event = collections.defaultdict(list)
    for event in events_of_job(place, plugin, steps):
        by_event[event["event"]].append(event)
    return (statistics.median(step_ms(event) for event in by_event["step"]), by_event["finished"][-1]["cpu_ms"])


def row(name, ours, baseline, goal, note):
    ratio, low, high = pairs.paired_ratio(ours, baseline)
    holds = None if goal is None or low <= goal < high else high <= goal
    return pairs.Row(
        name, statistics.median(ours), "ms", statistics.median(baseline), 1 / ratio,
        pairs.quartiles([b / a for a, b in zip(ours, baseline)]),
        "" if goal is None else f"<= {100 * (goal - 1):+.1f}% at 95%", holds,
        noisy=goal is not None and holds is None,
        note=f"{100 * (ratio - 1):+.2f}%, at 95% confidence {100 * (low - 1):+.2f}% to {100 * (high - 1):+.2f}%; "
             f"{len(ours)} pairs of {note}, {RANKS} ranks")


def job_in_turn(place):
    gated = next((place.build / "bench").glob("*bench_gated_plugin.so"))
    found = []
    for index in range(GATED_RUNS):
        found += pairs_of(blocks_of(events_of_job(
            place, gated, GATED_STEPS, GATED_PLUGIN=str(plugin_of(place)), GATED_MS=str(BLOCK_MS))))
        pairs.progress(f"tiny_lm, in turn: run {index + 1} of {GATED_RUNS}: {len(found)} pairs")
    ours, baseline = zip(*found)
    return row("tiny_lm step with the plugin, in turn inside one process", ours, baseline, GOAL_RATIO,
               f"blocks of {BLOCK_MS} ms")


def job_of_runs(place):
    plugin = plugin_of(place)
    start = {what: statistics.median(run_job(place, what, FIRST_STEPS)[1] for _ in range(9))
             for what in (plugin, "none")}
    found = {plugin: [], "none": []}
    for index in range(JOB_PAIRS):
        for what in (plugin, "none") if index % 2 == 0 else ("none", plugin):
            found[what].append(run_job(place, what))
        pairs.progress(f"tiny_lm: pair {index + 1} of {JOB_PAIRS}: {found[plugin][-1][0]:.4f} ms with the plugin, "
                       f"{found['none'][-1][0]:.4f} without")
    steps = {what: [run[0] for run in runs] for what, runs in found.items()}
    processor = {what: [(run[1] - start[what]) / (STEPS - FIRST_STEPS) for run in runs]
                 for what, runs in found.items()}
    note = f"runs of {STEPS} steps"
    return [row("tiny_lm step with the plugin, of runs", steps[plugin], steps["none"], GOAL_RATIO, note),
            row("tiny_lm processor time per step with the plugin, of runs", processor[plugin],
                processor["none"], None, note)]


def job(place):
    run_job(place, plugin_of(place))
    return [job_in_turn(place), *job_of_runs(place)]
