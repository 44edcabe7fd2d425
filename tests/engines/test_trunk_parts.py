"""Parts that reach blocks from outside, or hold tensors of their own, train alike under every engine."""

import pytest
import ranks
import torch
from torch import nn
from toys import NAMED, three_steps

from halfseen.config import Model
from halfseen.distributed import World
from halfseen.models import ViT

# A table outside of the blocks that all of them read, places that differ between samples, parts of each repetition.
TRUNKS = {
    "shared table, visible patches": {"relative": "shared", "key_bias": False, "irpe": "product", "irpe_on": "qkv"},
    "repetitions": {"relative": "block", "irpe": "cross", "head_mixing": "affine", "share": 2, "rope": True},
    "convolutions": {"class_token": False, "attention": "convolutional", "peg": 2, "mlp": "swiglu"},
}


class Student(nn.Module):
    """A trunk and a linear head over all of its tokens."""

    def __init__(self, name):
        super().__init__()
        self.visible = "visible" in name
        self.trunk = ViT(Model(width=32, depth=4, heads=2, patch=8, **TRUNKS[name]), (16, 24))
        self.head = nn.Linear(32, 3)
        for parameter in self.trunk.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)

    def blocks(self):
        return list(self.trunk.blocks)

    def forward(self, batch):
        tokens = self.trunk(batch["image"], index=batch["index"] if self.visible else None)
        return {"loss": (self.head(tokens.mean(1)) - batch["target"]).square().mean()}


def curves(world, options):
    """Loss and gradient norm of three steps, for each trunk."""
    found = {}
    for name in TRUNKS:
        torch.manual_seed(0)
        student = Student(name)
        index = torch.rand(4, 6).argsort(1)[:, :4].sort(1)[0]
        batch = {"image": torch.randn(4, 3, 16, 24), "target": torch.randn(4, 3), "index": index}
        found[name] = three_steps(world, options, student, batch)
    return found


@pytest.fixture(scope="module")
def expected():
    return curves(World(), {"name": "single"})


PLACES = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp", "recompute": True},
    "zero3": NAMED["zero3"] | {"recompute": True},
    "sharded": NAMED["sharded"] | {"recompute": True},
    "by FairScale": NAMED["sharded"] | {"recompute": True, "recompute_by": "fairscale", "offload_activations": True},
}


@pytest.mark.parametrize("place", PLACES)
def test_parts_of_the_trunk_train_as_in_one_process(place, expected):
    found = ranks.run(curves, 2, PLACES[place])[0]
    for name, history in expected.items():
        for ours, theirs in zip(found[name], history, strict=True):
            assert ours == pytest.approx(theirs, rel=5e-6), name
