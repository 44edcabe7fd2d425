"""Trunks of several stages, among them timm's, which know nothing of engines, train sharded as in one process."""

import pytest
import ranks
import torch
from small_trunks import FAMILIES
from torch import nn
from toys import NAMED, three_steps

from halfseen.distributed import World
from halfseen.models import trunks
from halfseen.models.hierarchical import TimmConfig
from halfseen.models.pyramid import PyramidConfig

PYRAMID = PyramidConfig(depths=[1, 2], widths=[8, 16], heads=[1, 2], mlp_ratios=[2, 2], reductions=[2, 1], patch=16)
TRIED = {name: TimmConfig(FAMILIES[name][0], 0.0, dict(FAMILIES[name][2])) for name in ("swin", "nest", "tnt")}
TRIED["pyramid"] = PYRAMID


class Student(nn.Module):
    """A trunk in which mask tokens stand in for hidden places, and a linear head over all of its tokens."""

    def __init__(self, name):
        super().__init__()
        self.encoder = trunks.build(TRIED[name], 64)
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.encoder.stem_width))
        self.head = nn.Linear(self.encoder.width, 3)

    def blocks(self):
        return list(self.encoder.blocks)

    def forward(self, batch):
        tokens = self.encoder(batch["image"], batch["mask"], self.mask_token)
        return {"loss": (self.head(tokens.mean(1)) - batch["target"]).square().mean()}


def curves(world, options):
    """Loss and gradient norm of three steps, for each trunk."""
    found = {}
    for name in TRIED:
        torch.manual_seed(0)
        student = Student(name)
        batch = {"image": torch.randn(4, 3, 64, 64), "target": torch.randn(4, 3), "mask": torch.rand(4, 4) < 0.5}
        found[name] = three_steps(world, options, student, batch)
    return found


@pytest.fixture(scope="module")
def expected():
    return curves(World(), {"name": "single"})


@pytest.mark.parametrize("place", [{"name": "fsdp", "recompute": True}, NAMED["zero3"]], ids=["fsdp", "zero3"])
def test_trunks_of_stages_train_as_in_one_process(place, expected):
    found = ranks.run(curves, 2, place)[0]
    for name, history in expected.items():
        for ours, theirs in zip(found[name], history, strict=True):
            assert ours == pytest.approx(theirs, rel=5e-6), name
