"""The NCCL profiler plugin: nanoseconds per event, as NCCL's proxy would wait for them.

Hot: one event after the other, in processor time. Cold: the first two levels of cache are filled with
something else before every event, so that code and data come from the last level; a single call then
costs what it waits for memory, whatever it does. `bench_profiler PLUGIN.so MIX CACHES` measures any other
plugin in the same way (one that needs CUDA's symbols is loaded lazily)."""

import json
import subprocess

import pairs

GOAL_NS = 30


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
