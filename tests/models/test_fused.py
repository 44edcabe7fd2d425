"""Fused parallel blocks compute what the branches compute."""

import pytest
import torch
from torch import nn

from halfseen.config import Model
from halfseen.models import ViT
from halfseen.models.fused import fuse

SMALL = {"width": 32, "depth": 2, "heads": 2, "patch": 16}


@pytest.mark.parametrize("parallel", [2, 3])
@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}, {"qkv_bias": False, "peg": 1}])
def test_a_fused_trunk_computes_the_same(parallel, options):
    torch.manual_seed(0)
    vit = ViT(Model(**SMALL, parallel=parallel, drop_path=0.3, **options), 48)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    wide = fuse(vit)
    image = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(wide(image), vit.eval()(image), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert not any(parameter.requires_grad for parameter in wide.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"parallel": 2, "mlp": "swiglu"}, {"parallel": 2, "norm": "power"}, {"parallel": 2, "rope": True}]
)
def test_what_cannot_be_folded_is_refused(options):
    with pytest.raises(ValueError, match=r"no branches|cannot be folded"):
        fuse(ViT(Model(**SMALL, **options), 48))
