"""Runs the benchmarks by name and prints their rows as they come. See pairs.py for the protocol.

A benchmark that fails is named at the end, and the others still run. Exit status: 0 if all ran, else 1.
"""

import argparse
import importlib
import pathlib
import shutil
import sys
import tempfile
import traceback

import pairs

# Name: module and function. Imported when it runs, as torch is not everybody's.
BENCHMARKS = {
    "flush": ("spine", "flush"),
    "save": ("spine", "save"),
    "capture": ("spine", "capture"),
    "restore_storage": ("spine", "restore_storage"),
    "restore_memory": ("spine", "restore_memory"),
    "registration": ("spine", "registration"),
    "stamp_head": ("spine", "stamp_head"),
    "device_overhead": ("device_overhead", "rows"),
    "planner": ("spine", "planner"),
    "view": ("view", "rows"),
    "monitor_detection": ("monitor", "detection"),
    "monitor_scale": ("monitor", "scale"),
    "monitor_node": ("monitor", "node"),
    "fingerprint": ("fingerprint", "rows"),
    "diff": ("diff", "rows"),
    "reshard": ("reshard", "rows"),
    "converter": ("converter", "rows"),
    "universal": ("universal", "rows"),
    "profiler": ("profiler", "rows"),
    "profiler_job": ("profiler", "job"),
    "idle": ("idle", "rows"),
    "side_by_side": ("side_by_side", "rows"),
}


def run(name, build, directory):
    """The rows of one benchmark. Its agent is gone afterwards, whatever happened."""
    import spine
    module, function = BENCHMARKS[name]
    directory.mkdir()
    place = spine.Place(build, directory)
    try:
        return getattr(importlib.import_module(module), function)(place)
    finally:
        place.kill_agent()
        shutil.rmtree(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="one benchmark")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here, after each benchmark")
    parser.add_argument("--directory", metavar="DIR",
                        help="where to write (default: build/bench, so the disk of the checkout)")
    arguments = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    parent = pathlib.Path(arguments.directory or root / "build")
    parent.mkdir(parents=True, exist_ok=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    rows, failed = [], []
    try:
        for name in [arguments.only] if arguments.only else BENCHMARKS:
            print(f"== {name}", file=sys.stderr, flush=True)
            try:
                found = run(name, root / "build" / "release", directory / name)
            except Exception:  # whatever it is, the other figures are worth having
                traceback.print_exc()
                failed.append(name)
                continue
            pairs.show(found)
            rows += found
            if arguments.json:
                pairs.save(rows, arguments.json)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
