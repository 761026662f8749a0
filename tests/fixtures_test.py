#!/usr/bin/python3
"""Reads every real checkpoint of ../shared/fixtures with `holdfast inspect` and compares every record with
the truth beside it; then `holdfast verify`. Families whose names are not in their files, or are by conventions, are
compared by their readers' own tests (torch_fixtures_test, sharded_fixtures_test, deepspeed_test).

Usage: fixtures_test.py HOLDFAST [FAMILY ...]
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
# The format by which a family's checkpoints are recognized: what the table of readers lacks is counted.
FORMATS = {"safetensors": {"safetensors"}, "hf": {"hf"}, "dcp": {"dcp", "hf"}}
# Where the file does not tell which of these a tensor is, a reader cannot either.
ONE_CLASS = {"param", "buffer", "tensor", "other", "rng", "ema"}
# Names that are not in the files: sharded_fixtures_test gives them.
NAMES_NEEDED = {"dcp/integer_keys_w2"}


def run(holdfast, *arguments):
    done = subprocess.run([holdfast, *arguments], capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def record_of(record):
    state = "param" if record["state"] in ONE_CLASS else record["state"]
    return record["name"], state, record["dtype"], tuple(record["shape"]), record["sha256"]


def check_handwritten(holdfast, folder, expected):
    """Every verdict of the official library, and a reason wherever ours is stricter."""
    for case in expected["files"]:
        code, out, err = run(holdfast, "inspect", "--json", "--tensors", "--sha256", str(folder / case["file"]))
        twice = case["file"].startswith("duplicate_key")
        if case["expected"] == "reject" or twice:
            if code != 4 or (twice and "twice" not in err):
                yield f"{case['file']}: {case['what']}: expected exit code 4 with a reason, found {code}: {err.strip()}"
            continue
        if code != 0:
            yield f"{case['file']}: {case['what']}: expected it to be read, found {code}: {err.strip()}"
            continue
        found = json.loads(out)
        names = {record["name"] for record in found["tensors"]} | {each["name"] for each in found["unreadable"]}
        reads = case.get("reads", {"metadata": None, "tensors": {}})
        if names != set(reads["tensors"]) or found["scalars"].get("metadata") != reads["metadata"]:
            yield f"{case['file']}: expected {reads}, found {found}"


def check_case(holdfast, folder):
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    checkpoint = folder / "ckpt"
    if folder.name == "handwritten":
        return list(check_handwritten(holdfast, checkpoint, expected)), len(expected["files"])
    code, out, err = run(holdfast, "inspect", "--json", "--tensors", "--sha256", str(checkpoint))
    if code != 0:
        return [f"inspect: exit code {code}: {err.strip()}"], 0
    inspected = json.loads(out)
    if folder.parent.name == "safetensors":
        if inspected["format"] != "files":
            inspected = {"files": [dict(inspected, file=inspected["files"][0]["file"])]}
        found = {each["file"]: {record_of(r) for r in each["tensors"]} for each in inspected["files"]}
        wrong = []
        for record in expected["tensors"]:
            for name in record.get("file", found):
                if record_of(record) not in found[name]:
                    wrong.append(f"{name}: expected {record_of(record)}")
        return wrong, len(expected["tensors"])
    wrong = []
    if inspected["format"] not in FORMATS[folder.parent.name]:
        wrong.append(f"expected the format {FORMATS[folder.parent.name]}, found {inspected['format']}")
        return wrong, 0
    found = [record_of(record) for record in inspected["tensors"]]
    if len(set(found)) != len(found):
        wrong.append("some record is there twice")
    truth = {record_of(record) for record in expected["tensors"]}
    for record in sorted(truth - set(found)):
        wrong.append(f"expected {record}, found {[each for each in found if each[:2] == record[:2]]}")
    if inspected["step"] is not None and inspected["step"] != expected["step"]:
        wrong.append(f"expected step {expected['step']}, found {inspected['step']}")
    code, out, err = run(holdfast, "verify", "--json", str(checkpoint))
    verdicts = {0} if not inspected["repairs"] else {3}
    if inspected["losses"]:
        verdicts = {4}
    if code not in verdicts:
        wrong.append(f"verify: expected exit code {verdicts}, found {code}: {out} {err.strip()}")
    return wrong, len(truth)


def main():
    holdfast, families = sys.argv[1], sys.argv[2:]
    if not FIXTURES.is_dir():
        print(f"skipped: no {FIXTURES.name} beside this clone")
        return 77
    cases = []
    for family in sorted(FORMATS):
        for expected in sorted(FIXTURES.glob(f"{family}/*/expected.json")):
            name = f"{family}/{expected.parent.name}"
            if name not in NAMES_NEEDED and (not families or family in families):
                cases.append(expected.parent)
    failures = records = 0
    with ThreadPoolExecutor(2) as pool:
        for folder, (wrong, count) in zip(cases, pool.map(lambda case: check_case(holdfast, case), cases)):
            records += count
            for sentence in wrong[:20]:
                print(f"{folder.parent.name}/{folder.name}: {sentence[:1000]}")
            failures += bool(wrong)
    print(f"{len(cases)} cases, {records} records, {failures} failures")
    return 1 if failures or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
