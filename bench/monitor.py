"""Figures of the monitor's analysis: what it finds in simulated jobs beside baselines, and what it costs."""

import json
import subprocess

import pairs
import plot

RUNS = 20
HOURS = 5
EXPONENT_MAX = 1.2  # n log n of 500 to 20,000 ranks has 1.13; the caches' share grows, too


def detection(place):
    """A row per class of fault: the share of runs that end in a right verdict; the table itself goes to
    standard error, with what the baselines (our re-implementations) say of the same telemetry."""
    result = subprocess.run([place.build / "bench" / "bench_monitor_detection", str(RUNS), str(HOURS)],
                            check=True, capture_output=True, text=True)
    *table, last = result.stdout.rstrip("\n").split("\n")
    pairs.progress("\n   ".join(table))
    found = json.loads(last)
    rows = []
    for row in found["rows"]:
        if row["method"] != "verdict":
            continue
        right = 100 * row["right"] / row["runs"]
        rows.append(pairs.Row(
            f"{row['class']}: right verdicts", right, "%",
            quartiles=(row["right_percent_low"], row["right_percent_high"]),
            goal="100 %, none wrong", holds=row["right"] == row["runs"] and row["wrong"] == 0,
            note=f"{row['runs']} runs, interval of 95%; after {row['p50_s']:.0f} s, p90 "
                 f"{row['p90_s']:.0f} s"))
    rows.append(pairs.Row("verdicts where nothing is wrong", found["false_verdicts"], "",
                          goal="0", holds=found["false_verdicts"] == 0,
                          note=f"{found['clean_hours']:.0f} simulated hours; suspicions: "
                               f"{found['false_suspicions']}"))
    return rows


def scale(place):
    """CPU time of one core per second of job, against the number of ranks; the plot goes to standard
    error."""
    result = subprocess.run([place.build / "bench" / "bench_monitor_scale"], check=True,
                            capture_output=True, text=True)
    rows = []
    found = json.loads(result.stdout)["rows"]
    series = {name: [(row["ranks"], row[key]) for row in found]
              for name, key in (("all move", "cpu_s_per_s"),
                                ("one hangs, all wait", "cpu_s_per_s_hanging"),
                                ("step of the agent, the worst", "agent_step_max"))}
    pairs.progress("CPU seconds of one core per second of job, against ranks (both logarithmic):\n   " +
                   plot.log_log(series).replace("\n", "\n   ") +
                   "".join(f"\n   {name[0]}: {name}" for name in series))
    for name, points in series.items():
        growth = plot.exponent(points)
        rows.append(pairs.Row(f"cost against ranks, {name}: exponent", growth, "",
                              goal=f"<= {EXPONENT_MAX} (1 is linear)", holds=growth <= EXPONENT_MAX,
                              note=f"{points[0][0]:,} to {points[-1][0]:,} ranks"))
    for row in found:
        goal = row["ranks"] == 10_000
        worst = max(row["cpu_s_per_s"], row["hanging_max"])
        rows.append(pairs.Row(f"analysis of {row['ranks']:,} ranks", worst, "s/s",
                              goal="<= 1 s/s, rank named" if goal else "",
                              holds=(worst <= 1 and row["named"]) if goal else None,
                              note=f"moving {row['cpu_s_per_s']:.4f}, one hangs "
                                   f"{row['cpu_s_per_s_hanging']:.4f}; the worst second is shown"))
    return rows


def node(place):
    """The agent's part on a node of 8 ranks in 10 communicators; with 2 and with 16 channels."""
    rows = []
    for channels in (2, 16):
        def once(channels=channels):
            return json.loads(subprocess.run(
                [place.build / "bench" / "bench_node_aggregation", str(channels)], check=True,
                capture_output=True, text=True).stdout)
        runs = [once() for _ in range(3)]
        found = {key: max(run[key] for run in runs) for key in runs[0]}
        note = f"{channels} channels; the worst of {len(runs)} runs"
        memory = found["board_bytes"] + found["agent_bytes_per_rank"]
        rows += [
            pairs.Row("node report, bytes a second", found["report_bytes"], "B", goal="<= 20,000 B",
                      holds=found["report_bytes"] <= 20_000, note=note),
            pairs.Row("node aggregation, CPU of one core", 100 * found["cpu_s_per_s"], "%",
                      note=f"{note}; caches filled before every look"),
            pairs.Row("monitor, host memory per GPU", memory / 1e6, "MB", goal="<= 1 MB",
                      holds=memory <= 1_000_000,
                      note=f"{note}; its board {found['board_bytes']:,} B, in the agent "
                           f"{found['agent_bytes_per_rank']:,} B"),
        ]
    return rows
