"""The linear map by oneDNN: F.linear's values, gradients and saved tensors, and when it is chosen."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from halfseen.config import Model
from halfseen.models import ViT, linear
from halfseen.models.linear import Linear, by_onednn

INNER, OUTER = 24, 40

# These call the product itself, on whatever processor the tests run.
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def chosen(monkeypatch):
    """As on a processor where oneDNN is the faster one, for small products too."""
    monkeypatch.setattr(linear, "mkl_lacks_avx512", lambda: True)
    monkeypatch.setattr(linear, "WORTHWHILE", 1)


def tensors(shape, bias=True, dtype=torch.float32):
    """x, weight and bias that all want a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*shape, INNER), (OUTER, INNER), *([(OUTER,)] if bias else [])]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gradients_of(function, inputs, upstream):
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, upstream.to(out.dtype))


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 7), (2, 3, 5), (0,)])
def test_values_and_gradients_are_those_of_float64(chosen, shape, bias):
    upstream = torch.randn(*shape, OUTER)
    out, gradients = gradients_of(linear.linear, tensors(shape, bias), upstream)
    exact, expected = gradients_of(F.linear, tensors(shape, bias, torch.float64), upstream)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, expected):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient.double(), other, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_no_tensor_need_be_contiguous(chosen):
    x = torch.randn(INNER, 6, 2).permute(2, 1, 0)
    weight = torch.randn(3 * OUTER, 2 * INNER)[OUTER : 2 * OUTER, INNER:]
    upstream = torch.randn(1, 1, OUTER).expand(2, 6, OUTER)
    for same_x in (x, x[:1, :1].expand(2, 6, INNER), x[:, ::2].repeat_interleave(2, 1)):
        inputs = [same_x.detach().requires_grad_(), weight.detach().requires_grad_()]
        torch.testing.assert_close(
            gradients_of(linear.linear, inputs, upstream),
            gradients_of(F.linear, inputs, upstream),
            rtol=1e-5,
            atol=1e-5,
        )


@needs_onednn
@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_what_is_frozen_costs_no_memory_and_no_gradient(chosen, frozen):
    x, weight, bias = tensors((2, 7))
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = linear.linear(x, weight, bias)
    wanted = {"x": [x], "weight": [weight], "both": []}[frozen]
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in wanted]
    out.sum().backward()
    assert [tensor.grad is not None for tensor in (x, weight, bias)] == [frozen == "weight", frozen == "x", True]


def test_only_large_eager_float32_products_on_the_cpu_are_given_to_onednn(chosen, monkeypatch):
    x, weight, _ = (tensor.detach() for tensor in tensors((3,)))
    assert by_onednn(x, weight)
    assert not by_onednn(x[:0], weight)
    monkeypatch.setattr(linear, "WORTHWHILE", 3 * INNER * OUTER + 1)
    assert not by_onednn(x, weight)
    monkeypatch.setattr(linear, "WORTHWHILE", 1)
    assert not by_onednn(x.double(), weight.double())
    assert not by_onednn(x.bfloat16(), weight.bfloat16())
    assert not by_onednn(x.bfloat16(), weight)
    assert not by_onednn(x, weight.bfloat16())
    assert not by_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, weight)
        assert linear.linear(x, weight).dtype == torch.bfloat16


def test_a_compiler_is_left_to_choose(chosen, monkeypatch):
    monkeypatch.setattr(linear, "_Linear", None)
    module, x = Linear(INNER, OUTER), torch.randn(3, INNER)
    with pytest.raises(AttributeError):
        module(x)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), nn.Linear.forward(module, x))


@pytest.mark.parametrize(
    ("text", "capability", "lacks"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True),
        ("vendor_id\t: AuthenticAMD", "AVX2", False),
        ("vendor_id\t: GenuineIntel", "AVX512", False),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, text, capability, lacks):
    info = tmp_path / "cpuinfo"
    info.write_text(text)
    monkeypatch.setattr(linear, "Path", lambda path: info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert linear.mkl_lacks_avx512.__wrapped__() is lacks


@needs_onednn
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stem", ["patch", "hmlp"])
def test_a_trunk_learns_the_same(chosen, monkeypatch, stem, recompute):
    torch.manual_seed(0)
    trunk = ViT(Model(size="ti", width=32, depth=2, heads=2, patch=8, stem=stem, position="sincos"), 32)
    image, index = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 4, 9], [1, 2, 11, 15]])
    for block in trunk.blocks if recompute else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    found = []
    for lacks in (False, True):
        monkeypatch.setattr(linear, "mkl_lacks_avx512", lambda lacks=lacks: lacks)
        tokens = trunk(image, index=index)
        found.append([tokens.detach(), *torch.autograd.grad(tokens[..., 0].square().mean(), trained)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
