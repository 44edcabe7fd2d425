"""PVT v1 and CPVT-v2: shapes, sizes, names, and what they compute beside the papers' equations and timm's Twins."""

import math

import pytest
import torch
from timm.models.twins import Twins
from torch import nn
from torch.nn import functional as F

from halfseen.config import ConfigError
from halfseen.layouts import LAYOUTS, detect
from halfseen.models.pyramid import Pyramid, PyramidConfig
from halfseen.selection import freeze
from halfseen.weights import initialise

PYRAMID = {"depths": [2, 1], "widths": [8, 16], "heads": [1, 2], "mlp_ratios": [2, 2], "reductions": [2, 1]}


@pytest.mark.parametrize("positions", ["learned", "peg"])
def test_a_pyramid_halves_its_grid_and_locates_each_stage_once(positions):
    model = Pyramid(PyramidConfig(positions=positions, drop_path=0.1, **PYRAMID), 32)
    assert model.grids == [(8, 8), (4, 4)]
    pegs, tables = positions == "peg", [merge.pos_embed is not None for merge in model.patch_embeds]
    assert [block.peg is not None for block in model.blocks] == [pegs, False, pegs]
    assert tables == [not pegs, not pegs]
    assert (model.cls_token is None) == pegs
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert math.prod(model.grid) == model.tokens == 16
    assert model.prefix == int(not pegs)


def test_pyramids_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="divide by 8"):
        Pyramid(PyramidConfig(**PYRAMID), 44)
    for wrong, key in (
        ({"widths": [8]}, "widths"),
        ({"heads": [3, 2]}, "heads"),
        ({"reductions": [2, 2]}, "reductions"),
    ):
        with pytest.raises(ConfigError) as refused:
            PyramidConfig(**PYRAMID | {key: wrong}).check("pyramid")
        assert refused.value.key == f"pyramid.{key}"
    PyramidConfig(positions="peg", **PYRAMID | {"reductions": [2, 2]}).check("pyramid")


@pytest.mark.parametrize(("size", "millions"), [("t", 13.2), ("s", 24.5), ("m", 44.2), ("l", 61.4)])
def test_pvt_has_as_many_parameters_as_published(size, millions):
    """Table 1 of the paper, with 1000 classes."""
    with torch.device("meta"):
        model = Pyramid(PyramidConfig(size=size), 224)
    count = sum(parameter.numel() for parameter in model.parameters()) + 513 * 1000
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_pyramid_s_layers_begin_with_what_leads_to_them():
    ids = Pyramid(PyramidConfig(**PYRAMID), 32).layer_ids()
    names = (
        "patch_embeds.0.pos_embed",
        "stages.0.0.norm1.weight",
        "stages.0.1.mlp.fc1.bias",
        "patch_embeds.1.proj.bias",
    )
    assert [ids[name] for name in (*names, "cls_token", "stages.1.0.attn.q.weight")] == [0, 1, 2, 2, 2, 3]
    assert "norm.weight" not in ids


class Official:
    """PVT v1 by its equations, in double, on weights under the names of its authors' code."""

    def __init__(self, stages):
        self.stages, self.weights = stages, {}
        generator = torch.Generator().manual_seed(0)

        def draw(name, *shape):
            self.weights[name] = 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

        def linear(name, out, width):
            draw(f"{name}.weight", out, width)
            draw(f"{name}.bias", out)

        channels, side = 3, 32
        for number, (depth, width, _, ratio, by) in enumerate(stages, 1):
            factor = 4 if number == 1 else 2
            side //= factor
            draw(f"patch_embed{number}.proj.weight", width, channels, factor, factor)
            draw(f"patch_embed{number}.proj.bias", width)
            draw(f"pos_embed{number}", 1, side**2 + (number == len(stages)), width)
            norms = [f"patch_embed{number}.norm"]
            for block in (f"block{number}.{index}." for index in range(depth)):
                norms += [f"{block}norm1", f"{block}norm2"]
                for name, out, inner in (("attn.q", 1, 1), ("attn.kv", 2, 1), ("attn.proj", 1, 1)):
                    linear(block + name, out * width, inner * width)
                linear(f"{block}mlp.fc1", ratio * width, width)
                linear(f"{block}mlp.fc2", width, ratio * width)
                if by > 1:
                    draw(f"{block}attn.sr.weight", width, width, by, by)
                    draw(f"{block}attn.sr.bias", width)
                    norms.append(f"{block}attn.norm")
            for name in norms:
                draw(f"{name}.weight", width)
                draw(f"{name}.bias", width)
            channels = width
        for name in ("norm.weight", "norm.bias"):
            draw(name, width)
        draw("cls_token", 1, 1, width)

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].t() + self.weights[f"{name}.bias"]

    def norm(self, x, name, eps):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def convolved(self, plane, name, factor):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(plane, weight, bias, stride=factor).flatten(2).transpose(1, 2)

    def attention(self, x, name, heads, by, side):
        summary = x
        if by > 1:
            plane = x.transpose(1, 2).unflatten(2, (side, side))
            summary = self.norm(self.convolved(plane, f"{name}.sr", by), f"{name}.norm", 1e-5)
        keys, values = self.linear(summary, f"{name}.kv").chunk(2, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (self.linear(x, f"{name}.q"), keys, values))
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return self.linear(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2), f"{name}.proj")

    def __call__(self, image):
        plane, side = image.double(), 32
        for number, (depth, _, heads, _, by) in enumerate(self.stages, 1):
            factor = 4 if number == 1 else 2
            side //= factor
            x = self.norm(self.convolved(plane, f"patch_embed{number}.proj", factor), f"patch_embed{number}.norm", 1e-5)
            if number == len(self.stages):
                x = torch.cat([self.weights["cls_token"].expand(len(x), -1, -1), x], 1)
            x = x + self.weights[f"pos_embed{number}"]
            for block in (f"block{number}.{index}." for index in range(depth)):
                x = x + self.attention(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn", heads, by, side)
                hidden = F.gelu(self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1"))
                x = x + self.linear(hidden, f"{block}mlp.fc2")
            if number < len(self.stages):
                plane = x.transpose(1, 2).unflatten(2, (side, side))
        return self.norm(x, "norm", 1e-6)


def test_pvt_computes_its_equations_on_weights_under_its_authors_names():
    official = Official([(2, 8, 1, 2, 2), (1, 12, 2, 3, 1)])
    layout = detect(official.weights)
    assert layout.name == "pvt"
    cfg = PyramidConfig(depths=[2, 1], widths=[8, 12], heads=[1, 2], mlp_ratios=[2, 3], reductions=[2, 1])
    student = nn.Module()
    student.encoder = Pyramid(cfg, 32).double()
    student.load_state_dict(layout.take(official.weights))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student.encoder(image.double()), official(image))
    back = layout.give(student.state_dict())
    assert back.keys() == official.weights.keys()
    assert all(torch.equal(back[name], value) for name, value in official.weights.items())


def test_cpvt_computes_what_timms_twins_does():
    options = {"embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (2, 2), "depths": (2, 1), "sr_ratios": (2, 1)}
    theirs = Twins(img_size=32, num_classes=0, **options).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    student = nn.Module()
    student.encoder = Pyramid(PyramidConfig(positions="peg", **PYRAMID), 32).eval()
    student.load_state_dict(LAYOUTS["cpvt"].take(theirs.state_dict()))
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student.encoder(image), theirs.forward_features(image), rtol=1e-4, atol=1e-5)


def test_a_pyramid_starts_from_weights_for_another_size_of_images():
    source, student = nn.Module(), nn.Module()
    source.encoder, student.encoder = (Pyramid(PyramidConfig(**PYRAMID), side) for side in (32, 64))
    report = initialise(student, source.state_dict(), coverage=1.0)
    names = [f"encoder.patch_embeds.{number}.pos_embed" for number in (0, 1)]
    assert report.resized == {names[0]: "8x8 -> 16x16", names[1]: "4x4 -> 8x8"}
    assert torch.equal(student.state_dict()[names[1]][:, 0], source.state_dict()[names[1]][:, 0])


def test_the_attention_of_a_pyramid_trains_alone_with_the_positions_of_all_stages():
    student = nn.Module()
    student.encoder, student.head = Pyramid(PyramidConfig(**PYRAMID), 32), nn.Linear(16, 3)
    trained = {name.removeprefix("encoder.") for name in freeze(student, "attention").trained}
    own = {name for name, _ in student.encoder.named_parameters() if ".attn." in name or name.endswith("pos_embed")}
    assert trained == own | {"head.weight", "head.bias"}
    assert sum(name.endswith("pos_embed") for name in own) == 2
