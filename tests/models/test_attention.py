"""Attention: the definition, the last tokens alone, and the CPU's bfloat16 path."""

import pytest
import torch

from halfseen.config import Model
from halfseen.models import ViT
from halfseen.models.attention import Attention, attend
from halfseen.models.convolutional import Attention2d, OnGrid
from halfseen.models.general import GeneralAttention
from halfseen.models.pyramid import ReducedAttention


def by_definition(module, x):
    batch, tokens, width = x.shape
    q, k, v = module.qkv(x).view(batch, tokens, 3, module.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_softmax_of_scaled_products(bias):
    module, x = Attention(24, 3, bias), torch.randn(2, 7, 24)
    torch.testing.assert_close(module(x), by_definition(module, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_the_last_tokens_alone_are_the_end_of_all(bias):
    module, x = Attention(24, 3, bias), torch.randn(2, 7, 24)
    torch.testing.assert_close(module(x, last=3), module(x)[:, -3:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["softmax with parts", "over a map", "over a summary"])
def test_other_kinds_refuse_to_compute_some_tokens_alone(kind):
    module = {
        "softmax with parts": lambda: GeneralAttention(24, 3),
        "over a map": lambda: OnGrid(Attention2d(24, 3, 8), (2, 4)),
        "over a summary": lambda: ReducedAttention(24, 3, (2, 4), 2, True),
    }[kind]()
    x = torch.randn(2, 8, 24)
    assert module(x, repetition=1, qkv=None).shape == x.shape
    for more in ({"last": 3}, {"common": (torch.randn(1, 24), torch.zeros(2, 1, dtype=torch.int64))}):
        with pytest.raises(ValueError, match="only plain attention"):
            module(x, **more)


def test_bfloat16_on_the_cpu_agrees_with_float32():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    exact = attend(q, k, v)
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_dropped_weights_are_as_many_as_said_and_the_others_larger(precision):
    torch.manual_seed(0)
    q, k = torch.zeros(2, 4, 2, 50, 50, dtype=precision)  # every weight is 1/50 ...
    v = torch.eye(50, dtype=precision).expand(4, 2, 50, 50)  # ... and can be read off the result
    weights = 50 * attend(q, k, v, dropout=0.25).float()
    kept = weights > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(weights[kept], torch.full((int(kept.sum()),), 4 / 3), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"relative": "shared"}, {"irpe": "product"}, {"attention": "reattention"}], ids=str
)
def test_every_softmax_attention_drops_weights_in_training_alone(options):
    vit = ViT(Model(width=24, depth=1, heads=3, patch=8, attention_dropout=0.5, **options), 32)
    image = torch.randn(2, 3, 32, 32)
    assert not torch.equal(vit(image), vit(image))
    vit.eval()
    assert torch.equal(vit(image), vit(image))
