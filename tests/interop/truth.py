"""What the tests of this folder share: `holdfast` run, and its records compared with what a framework held."""

import hashlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import torch
import torch.distributed.checkpoint as dcp

ONE_CLASS = {"param", "buffer", "tensor", "other"}  # not every format tells them apart


def record(name, state, tensor):
    """As `holdfast inspect --tensors --sha256 --json` has it, of a plain tensor."""
    content = tensor.detach().contiguous().reshape(-1)
    content = content.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {"name": name, "state": state, "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape), "sha256": hashlib.sha256(content).hexdigest()}


def key(one):
    return one["name"], "a tensor" if one["state"] in ONE_CLASS else one["state"]


class Holdfast:
    def __init__(self, program):
        self.program = program

    def run(self, *arguments, codes=(0,)):
        """Standard output. An exit code that is not among these is an error."""
        done = subprocess.run([self.program, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode not in codes:
            raise AssertionError(f"holdfast {' '.join(map(str, arguments))}: exit {done.returncode}: "
                                 f"{done.stdout}{done.stderr}")
        return done.stdout

    def expect(self, checkpoint, truth, *options, aliases=()):
        """The checkpoint holds these records, no others, and perhaps `aliases` besides; it is good. The report."""
        report = json.loads(self.run("inspect", checkpoint, "--tensors", "--sha256", "--json", *options))
        found = {key(one): one for one in report["tensors"]}
        if len(found) != len(report["tensors"]):
            raise AssertionError("some record is there twice")
        for want in [*truth, *(alias for alias in aliases if key(alias) in found)]:
            have = found.pop(key(want), None)
            if have is None:
                raise AssertionError(f"missing: {key(want)}")
            for field in ("dtype", "shape", "sha256"):
                if have[field] != want[field]:
                    raise AssertionError(f"{key(want)}: {field}: {want[field]} expected, {have[field]} found")
        if found or report["losses"] or report["unreadable"]:
            raise AssertionError(f"not expected: {list(found)}, {report['losses']}, {report['unreadable']}")
        # A documented repair is told by its exit code.
        self.run("verify", checkpoint, *options, codes=(3,) if report["repairs"] else (0,))
        return report

    def expect_dcp(self, checkpoint, out, truth, *options):
        """What `convert --format dcp` makes of it is read by torch.distributed.checkpoint as the truth."""
        self.run("convert", checkpoint, out, "--format", "dcp", "--drop", "objects", *options)
        model, states = {}, {}
        for want in truth:
            empty = torch.empty(want["shape"], dtype=getattr(torch, want["dtype"]))
            if want["state"] in ONE_CLASS:
                model[want["name"]] = empty
            else:
                states.setdefault(want["name"], {})[want["state"]] = empty
        loaded = {"model": model, "optim": {"state": states}} if states else {"model": model}
        dcp.load(loaded, checkpoint_id=str(out), no_dist=True)
        for want in truth:
            tensor = model[want["name"]] if want["state"] in ONE_CLASS else states[want["name"]][want["state"]]
            if record(want["name"], want["state"], tensor)["sha256"] != want["sha256"]:
                raise AssertionError(f"torch loads another {want['name']}, {want['state']}")


def run_cases(cases, check):
    """For the command line HOLDFAST [SEED [COUNT]]: check(holdfast, *case, seed, folder) of so many of the cases, drawn
    from the seed, each in a folder of its own. A case is a tuple: what is made, what it becomes, perhaps more."""
    holdfast = Holdfast(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    count = int(sys.argv[3]) if len(sys.argv) > 3 else len(cases)
    print(f"seed {seed}, {count} of {len(cases)} cases", flush=True)
    torch.set_num_threads(1)
    for case in random.Random(seed).sample(cases, count):
        with tempfile.TemporaryDirectory() as scratch:
            check(holdfast, *case, seed, pathlib.Path(scratch))
        print(f"{case[0]} -> {case[1]}", flush=True)
