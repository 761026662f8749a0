"""Runs the benchmarks by name and prints their rows. See pairs.py for the protocol."""

import argparse
import pathlib
import shutil
import sys
import tempfile

import pairs
import side_by_side
import spine

BENCHMARKS = {
    "flush": spine.flush,
    "save": spine.save,
    "capture": spine.capture,
    "restore_storage": spine.restore_storage,
    "restore_memory": spine.restore_memory,
    "registration": spine.registration,
    "stamp_head": spine.stamp_head,
    "side_by_side": side_by_side.rows,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="one benchmark")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    parser.add_argument("--directory", metavar="DIR",
                        help="where to write (default: build/bench, so the disk of the checkout)")
    arguments = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    parent = pathlib.Path(arguments.directory or root / "build")
    parent.mkdir(parents=True, exist_ok=True)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    rows = []
    try:
        for name in [arguments.only] if arguments.only else BENCHMARKS:
            print(f"== {name}", file=sys.stderr, flush=True)
            place = directory / name
            place.mkdir()
            rows += BENCHMARKS[name](spine.Place(root / "build" / "release", place))
            shutil.rmtree(place)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    pairs.show(rows)
    if arguments.json:
        pairs.save(rows, arguments.json)


if __name__ == "__main__":
    main()
