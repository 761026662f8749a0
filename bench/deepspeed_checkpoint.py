"""A checkpoint of 254 million parameters, trained for one step by DeepSpeed (ZeRO, bfloat16, AdamW) on 4 ranks of CPU.

    deepspeed_checkpoint.py OUT STAGE
"""

import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "interop"))
import deepspeed_make as maker  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

HIDDEN, LAYERS, WORDS, RANKS = 1024, 20, 84000, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """An embedding, and blocks of two matrices: the sizes count, not what it learns."""

    def __init__(self, _):
        super().__init__()
        self.embed = nn.Embedding(WORDS, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, ids):
        return self.blocks(self.embed(ids)).float().square().mean()


def save(rank, case, scratch):
    maker.enter(rank, case, scratch)
    maker.Net = Model
    engine = maker.make_engine(case, seed=1)
    maker.train(engine, case, seed=1, steps=1)
    engine.save_checkpoint(f"{scratch}/ckpt")
    maker.leave()


def main():
    out, stage = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    scratch = maker.run_world(save, dict(stage=stage, world=RANKS))
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(scratch / "ckpt", out)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    os.environ.setdefault("TMPDIR", str(pathlib.Path(sys.argv[1]).resolve().parent))
    main()
