"""Attention: the definition, the last tokens alone, and the CPU's bfloat16 path."""

import pytest
import torch

from halfseen.models.attention import Attention, attend


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


def test_bfloat16_on_the_cpu_agrees_with_float32():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    exact = attend(q, k, v)
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.03)
