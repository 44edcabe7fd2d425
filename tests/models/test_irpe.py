"""iRPE: buckets, encodings against the definition, repetitions, visible tokens."""

import math

import pytest
import torch
from torch import nn

from halfseen.config import Model
from halfseen.models import ViT
from halfseen.models.general import GeneralAttention, HeadMixing, Parts
from halfseen.models.irpe import Cross, Encoding, bucket_count, bucket_table, encoding_of, piecewise
from halfseen.models.places import Places

from .irpe_formulations import FORMULATIONS, along_the_last_axis

METHODS = ("product", "euclidean", "quant", "cross")
GRID, HEADS, WIDTH = (3, 4), 2, 8


def scrambled(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def encoding(method="product", mode="contextual", heads=1, prefix=1, ratio=1.0):
    return Encoding(method, mode, ratio, heads, WIDTH, GRID, prefix)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (1.9, [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
        (2.0, [0, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4]),
    ],
)
def test_near_offsets_have_their_own_bucket_and_far_ones_share(ratio, expected):
    steps = torch.arange(12)
    assert piecewise(steps, ratio, 2 * ratio, 8 * ratio).tolist() == expected
    assert piecewise(-steps, ratio, 2 * ratio, 8 * ratio).tolist() == [-step for step in expected]


@pytest.mark.parametrize("method", ["product", "euclidean", "quant", "rows", "columns"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_every_pair_of_a_prefix_token_is_in_the_last_bucket(method, prefix):
    table = bucket_table(method, GRID, prefix, 1.9)
    count = bucket_count(method, prefix, 1.9)
    assert table.shape == (prefix + 12, prefix + 12)
    assert table.max() < count
    assert (table[:prefix] == count - 1).all()
    assert (table[:, :prefix] == count - 1).all()
    assert torch.equal(table[prefix:, prefix:], bucket_table(method, GRID, 0, 1.9))


def by_definition(method, ratio, prefix):
    """Bucket of each pair as python numbers; for cross a pair of buckets."""

    def step(offset):
        if abs(offset) <= ratio:
            return round(offset)
        grown = ratio + math.log(abs(offset) / ratio) / math.log(8) * ratio
        return int(math.copysign(min(2 * ratio, round(grown)), offset))

    reach, places = int(2 * ratio), [(y, x) for y in range(GRID[0]) for x in range(GRID[1])]
    found = {}
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            dy, dx = query[0] - key[0], query[1] - key[1]
            rule = {
                "product": ((step(dy) + reach) * (2 * reach + 1) + step(dx) + reach,),
                "euclidean": (step(round(math.sqrt(dy * dy + dx * dx))) + reach,),
                "quant": (step(dy * dy + dx * dx) + reach,),
                "cross": (step(dy) + reach, step(dx) + reach),
            }
            found[prefix + i, prefix + j] = rule[method]
    return found


def tables(module):
    return [module.rp_rows, module.rp_cols] if isinstance(module, Cross) else [module]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["contextual", "bias"])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_scores_get_what_the_definition_says(method, mode, heads):
    module = scrambled(encoding_of(encoding(method, mode, heads), "scores"))
    query = torch.randn(2, HEADS, 13, WIDTH)
    added = module(query).expand(2, HEADS, 13, 13)
    buckets = by_definition(method, 1.0, 1)
    for i, j, head in ((1, 1, 0), (4, 9, 1), (12, 2, 0), (7, 8, 1), (0, 5, 1), (3, 0, 0), (0, 0, 1)):
        expected = torch.zeros(2)
        for number, table in enumerate(tables(module)):
            last = bucket_count(method if method == "product" else "rows", 1, 1.0) - 1
            bucket = buckets[i, j][number] if (i, j) in buckets else last
            own = head if heads > 1 else 0
            if mode == "bias":
                expected = expected + table.lookup_table_bias[own, bucket]
            else:
                expected = expected + query[:, head, i] @ table.lookup_table_weight[own, :, bucket]
        torch.testing.assert_close(added[:, head, i, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads", [1, HEADS])
def test_values_get_their_encodings_by_weight(method, heads):
    module = scrambled(encoding_of(encoding(method, heads=heads), "values"))
    weights = torch.rand(2, HEADS, 13, 13)
    expected = 0
    for table in tables(module):
        rows = table.lookup_table_weight[:, table.buckets].expand(HEADS, -1, -1, -1)
        expected = expected + torch.einsum("bhij,hijd->bhid", weights, rows)
    torch.testing.assert_close(module(weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_all_formulations_agree_in_value_and_gradient(formulation):
    buckets = bucket_table("product", GRID, 1, 1.9)
    results = []
    for rule in (along_the_last_axis, formulation):
        torch.manual_seed(0)
        each = torch.randn(2, 3, 13, 50, requires_grad=True)
        out = rule(each, buckets)
        (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
        results += [out.detach(), each.grad]
    torch.testing.assert_close(results[2:], results[:2])


def test_attention_adds_the_encodings_where_the_definition_says():
    parts = Parts(irpe=encoding("product", heads=HEADS), irpe_on="qkv", mixing=True)
    module = scrambled(GeneralAttention(16, HEADS, parts=parts))
    x = torch.randn(2, 13, 16)
    q, k, v = module.qkv(x).view(2, 13, 3, HEADS, 8).permute(2, 0, 3, 1, 4)
    scale = 8**-0.5
    scores = scale * (q @ k.mT) + module.rpe_k(scale * q) + module.rpe_q(scale * k).mT
    scores = torch.einsum("gh,bhij->bgij", module.proj_l.weight, scores) + module.proj_l.bias[:, None, None]
    weights = (
        torch.einsum("gh,bhij->bgij", module.proj_w.weight, scores.softmax(-1)) + module.proj_w.bias[:, None, None]
    )
    expected = module.proj((weights @ v + module.rpe_v(weights)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "on"), [("contextual", "k"), ("contextual", "qkv"), ("bias", "k"), ("bias", "qk")])
@pytest.mark.parametrize("method", ["product", "cross"])
def test_visible_tokens_keep_their_encodings(mode, on, method):
    torch.manual_seed(0)
    model = Model(width=16, depth=1, heads=HEADS, patch=16, irpe=method, irpe_on=on, irpe_mode=mode)
    vit = scrambled(ViT(model, (48, 64))).eval()
    image, index = torch.randn(2, 3, 48, 64), torch.tensor([[0, 3, 7, 8], [1, 2, 10, 11]])
    kept = torch.cat([torch.zeros(2, 1, dtype=torch.long), index + 1], dim=1)
    far = torch.full((2, 1, 1, 13), -1e9).scatter(3, kept[:, None, None], 0.0)
    (block,) = vit.blocks
    whole = vit.norm(block(vit.embed(image), places=Places(bias=far)))
    whole = whole.gather(1, kept[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(vit(image, index=index), whole, rtol=1e-3, atol=1e-4)


def test_each_repetition_has_tables_and_mixing_of_its_own():
    vit = ViT(Model(width=16, depth=4, heads=2, patch=16, share=2, irpe="product", head_mixing="linear"), 48)
    names = {name for name, _ in vit.named_parameters()}
    assert {"blocks.1.attn.rpe_k.1.lookup_table_weight", "blocks.0.attn.proj_l.0.weight"} <= names
    scrambled(vit)
    attention, x = vit.blocks[0].attn, torch.randn(1, 10, 16)
    first, second = attention(x, repetition=0), attention(x, repetition=1)
    assert not torch.allclose(first, second)
    with torch.no_grad():
        for part in (attention.rpe_k, attention.proj_l, attention.proj_w):
            part[1].load_state_dict(part[0].state_dict())
    torch.testing.assert_close(attention(x, repetition=1), first)


def test_tables_start_at_zero_and_mixing_near_it():
    vit = ViT(Model(width=16, depth=1, heads=2, patch=16, irpe="product", irpe_on="qkv", head_mixing="affine"), 48)
    attention = vit.blocks[0].attn
    assert not any(part.lookup_table_weight.any() for part in (attention.rpe_q, attention.rpe_k, attention.rpe_v))
    weight = HeadMixing(64, True).weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert attention.proj_l.weight.abs().max() < 0.2


@pytest.mark.parametrize(("size", "count"), [("ti", 3_090_304), ("s", 11_450_824), ("b", 44_098_408)])
def test_parameter_counts_are_those_of_mini_deit(size, count):
    options = {"share": 2, "class_token": False, "irpe": "product", "head_mixing": "linear"}
    with torch.device("meta"):
        vit = ViT(Model(size=size, **options), 224)
    assert sum(p.numel() for p in vit.parameters()) + vit.width * 1000 + 1000 == count
