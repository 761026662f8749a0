"""What a rank finds in its environment under torchrun and under `holdfast run` differs as docs/RUN.md says, and in
nothing else.

Runs in the virtual environment of scripts/interop.
Usage: torch_environment_test.py HOLDFAST HOLDFASTD DOCUMENT        ($HOLDFAST_LIBRARY, $PYTHONPATH: the package)
"""
import json
import pathlib
import re
import subprocess
import sys
import unittest

from support import Place

HOLDFAST, DAEMON, DOCUMENT = sys.argv[1:4]
del sys.argv[1:4]

TIMEOUT_SECONDS = 600
SHOW = """
import json, os
with open(os.environ["SHOWN"] + os.environ["RANK"], "w") as file:
    json.dump(dict(os.environ), file)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


class TorchEnvironmentTest(unittest.TestCase):
    def shown(self, launcher):
        """What rank 1 of two finds."""
        place = Place(self.addCleanup, DAEMON)
        program = place.path / "show.py"
        program.write_text(SHOW)
        environment = place.environment(SHOWN=str(place.path / "rank-"), PYTHON_EXEC=sys.executable,
                                        XDG_STATE_HOME=str(place.path / "state"))
        subprocess.run([*launcher, "--nproc-per-node", "2", str(program)], env=environment, check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS)
        found = json.loads((place.path / "rank-1").read_text())
        # Each has a place of its own.
        return {name: value.replace(str(place.path), "PLACE") for name, value in found.items()}

    def test_the_difference_is_what_the_document_says(self):
        theirs, ours = self.shown(TORCHRUN), self.shown([HOLDFAST, "run"])
        differing = {name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)}
        document = pathlib.Path(DOCUMENT).read_text(encoding="utf-8")
        section = document[document.index("## What a rank finds"):document.index("## Stopping")]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        said = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
        # Of a job with GPUs.
        said.discard("CUDA_VISIBLE_DEVICES")
        self.assertEqual(sorted(differing), sorted(said), {name: (theirs.get(name), ours.get(name))
                                                           for name in differing ^ said})


if __name__ == "__main__":
    unittest.main()
