"""BEiT v2's student: the second branch, its parameters and what is refused."""

import pytest
import torch
from torch import nn

from halfseen.config import ConfigError, Model
from halfseen.data.masks import random_mask
from halfseen.models import ViT
from halfseen.pretrain.beit2 import BEiT2, BEiT2Config
from halfseen.pretrain.mim import MIM, MIMConfig
from halfseen.pretrain.targets.codes import cross_entropy

SMALL = {"width": 32, "depth": 4, "heads": 2, "patch": 8, "position": "none", "relative": "shared", "key_bias": False}


class Given:
    width = 10
    loss = staticmethod(cross_entropy)


def build(early=3, extra=2, shared_head=True, hidden=6, **options):
    torch.manual_seed(0)
    cfg = BEiT2Config(early=early, extra=extra, shared_head=shared_head)
    student = BEiT2(ViT(Model(**(SMALL | options)), 32), cfg, hidden, Given())
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student


def batch_for(size=3):
    torch.manual_seed(1)
    mask = random_mask(0, torch.arange(size), 16, 6)
    return {"image": torch.randn(size, 3, 32, 32), "mask": mask, "target": torch.randint(10, (size, 16))}


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("options", [{}, {"relative": "block"}, {"share": 2, "early": 2}], ids=str)
def test_both_losses_are_those_of_the_definition(shared_head, options):
    student, batch = build(shared_head=shared_head, **options), batch_for()
    trunk = student.encoder
    trace = trunk.trace(batch["image"], batch["mask"], student.mask_token, layers=range(4))
    early = student.cfg.early - 1
    x = torch.cat([trace.layers[3][:, :1], trace.layers[early][:, 1:]], dim=1)
    for block in student.aggregation.blocks:
        x = block(x, places=trunk.places())
    norm, head = (trunk.norm, student.head) if shared_head else (student.aggregation.norm, student.aggregation.head)
    hidden = batch["mask"]
    expected = {
        "loss_patch": cross_entropy(student.head(trace.tokens[:, 1:])[hidden], batch["target"][hidden])["loss"],
        "loss_class": cross_entropy(head(norm(x)[:, 1:])[hidden], batch["target"][hidden])["loss"],
    }
    scalars = student(batch)
    for name, value in expected.items():
        torch.testing.assert_close(scalars[name], value, rtol=1e-5, atol=0)
    torch.testing.assert_close(scalars["loss"], sum(expected.values()), rtol=1e-5, atol=0)


def test_late_patches_reach_the_branch_through_the_class_token_alone():
    student, batch = build(), batch_for()
    before = student.tokens(batch["image"], batch["mask"])
    # What the last block does to patches changes, what it does to the class token does not.
    student.encoder.blocks[3].register_forward_hook(lambda _, __, x: torch.cat([x[:, :1], x[:, 1:].flip(1)], dim=1))
    after = student.tokens(batch["image"], batch["mask"])
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


def test_published_size():
    model = Model(size="b", position="none", relative="shared", key_bias=False, layer_scale=0.1)
    target = Given()
    target.width = 8192
    with torch.device("meta"):
        student = BEiT2(ViT(model, 224), BEiT2Config(), 75, target)
        plain = MIM(ViT(model, 224), MIMConfig(), 75, target)
    assert sum(p.numel() for p in student.parameters()) == 106_143_056
    assert (
        sum(p.numel() for p in student.aggregation.blocks.parameters()) + sum(p.numel() for p in plain.parameters())
        == 106_143_056
    )


def test_drop_path_goes_on_where_the_branch_begins():
    student = build(early=3, extra=3, drop_path=0.4)
    # Six steps are longer than the trunk's four: the ramp is theirs.
    rates = [block.rates[0] for block in student.aggregation.blocks]
    assert rates == pytest.approx([0.4 * step / 5 for step in (3, 4, 5)])
    assert student.encoder.blocks[3].rates[0] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"early": 5}, "objective.beit2.early"),
        ({"early": 1, "share": 2}, "objective.beit2.early"),
        ({"class_token": False}, "model.class_token"),
        ({"hidden": 0}, "mask.kind"),
    ],
)
def test_impossible_branches_are_refused(options, key):
    with pytest.raises(ConfigError) as refused:
        build(**options)
    assert refused.value.key == key


def test_blocks_and_work_hold_the_branch():
    student = build()
    assert len(student.blocks()) == 6
    assert student.train_flops_per_image() > MIM.train_flops_per_image(student)
