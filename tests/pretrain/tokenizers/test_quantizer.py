"""The codebook: nearest codes, straight-through gradients, updates, dead codes, k-means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from halfseen.config import ConfigError
from halfseen.pretrain.tokenizers.quantizer import Quantizer, QuantizerConfig, kmeans

NEVER, SKIP = torch.zeros(()), torch.ones(())


def build(codes=6, width=4, **options):
    torch.manual_seed(0)
    return Quantizer(QuantizerConfig(codes=codes, width=width, **options))


def tokens_of(seed, batch=3, count=5, width=4):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_codes_are_the_nearest_of_unit_vectors(seed):
    quantizer, tokens = build(), tokens_of(seed)
    vectors, codes, commitment = quantizer(tokens)
    unit = F.normalize(tokens, dim=-1)
    distances = torch.cdist(unit, quantizer.codebook.expand(3, -1, -1))
    chosen = distances.gather(2, codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.min(-1).values)
    torch.testing.assert_close(vectors, quantizer.codebook[codes])
    torch.testing.assert_close(commitment, (unit - quantizer.codebook[codes]).square().mean())


def test_the_search_is_float32_under_autocast():
    quantizer = build(codes=512, width=8)
    unit = F.normalize(tokens_of(1, count=200, width=8), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer.nearest(unit)
    assert torch.equal(codes, quantizer.nearest(unit))
    rounded = (unit.bfloat16() @ quantizer.codebook.bfloat16().T).argmax(-1)
    assert not torch.equal(codes, rounded)  # bf16 does take others


def test_gradients_go_straight_through_to_the_unit_vectors():
    quantizer = build(commitment=0.0)
    tokens = tokens_of(1).requires_grad_()
    upstream = tokens_of(2)
    vectors, _, _ = quantizer(tokens)
    (gradient,) = torch.autograd.grad(vectors, tokens, upstream)
    unit = F.normalize(tokens, dim=-1)
    (expected,) = torch.autograd.grad(unit, tokens, upstream)
    torch.testing.assert_close(gradient, expected)


def test_an_update_moves_used_codes_on_the_sphere_and_leaves_the_others_alone():
    quantizer, tokens = build(codes=12), tokens_of(3)
    before = quantizer.codebook.clone()
    _, codes, _ = quantizer(tokens)
    assert torch.equal(quantizer.codebook, before)  # a forward only counts
    quantizer.stepped(NEVER)
    unit = F.normalize(tokens, dim=-1)
    for code in range(12):
        mine = unit[codes == code]
        if not len(mine):
            assert torch.equal(quantizer.codebook[code], before[code])
            continue
        expected = F.normalize(0.99 * before[code] + 0.01 * F.normalize(mine.mean(0), dim=0), dim=0)
        torch.testing.assert_close(quantizer.codebook[code], expected)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(12))
    counts = torch.bincount(codes.flatten(), minlength=12).float()
    torch.testing.assert_close(quantizer.usage, 0.99 + 0.01 * counts)


def test_one_update_of_two_micro_batches_is_that_of_both_together():
    whole, parts = build(codes=12, revive=3), build(codes=12, revive=3)
    tokens, positions = tokens_of(4, batch=4), torch.arange(4)
    for quantizer in (whole, parts):
        quantizer.usage[:4] = 0.0  # dead, so that some are revived
    whole(tokens, positions)
    for part in (slice(0, 1), slice(1, 4)):
        parts(tokens[part], positions[part])
    for quantizer in (whole, parts):
        quantizer.stepped(NEVER)
    torch.testing.assert_close(parts.codebook, whole.codebook)
    torch.testing.assert_close(parts.usage, whole.usage)


def test_a_skipped_update_leaves_everything_as_it_was():
    quantizer = build(revive=2)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(tokens_of(5) * torch.nan, torch.arange(3))
    quantizer.stepped(SKIP)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    # and the next one counts nothing of it
    other = build(revive=2)
    for each in (quantizer, other):
        each(tokens_of(6), torch.arange(3))
        each.stepped(NEVER)
    assert torch.equal(quantizer.codebook, other.codebook)


def test_evaluation_and_inference_count_nothing():
    quantizer = build()
    quantizer.eval()(tokens_of(7))
    with torch.no_grad():
        quantizer.train()(tokens_of(7))
    assert quantizer.counts.sum() == 0


def test_dead_codes_are_set_to_tokens_and_counted_as_used():
    quantizer, tokens = build(codes=6, revive=2), tokens_of(8)
    quantizer.usage.copy_(torch.tensor([9.0, 0.0, 9.0, 9.0, 0.0, 0.0]))
    quantizer.codebook[[1, 4, 5]] = -F.normalize(tokens.mean((0, 1)), dim=0)  # far from all tokens or not: fixed below
    _, codes, _ = quantizer(tokens, torch.arange(3))
    quantizer.stepped(NEVER)
    unit = F.normalize(tokens, dim=-1).flatten(0, 1)
    unused = [code for code in (1, 4, 5) if code not in codes]
    revived = [code for code in unused if (unit - quantizer.codebook[code]).norm(dim=1).min() < 1e-6]
    assert len(revived) == min(2, len(unused)) > 0
    assert all(quantizer.usage[code] > 1 for code in revived)


def test_reviving_needs_positions():
    with pytest.raises(ValueError, match="positions"):
        build(revive=1)(tokens_of(9))


def test_scalars_tell_how_many_codes_live():
    quantizer = build(codes=8)
    quantizer.usage.copy_(torch.tensor([5.0, 5.0, 5.0, 5.0, 0, 0, 0, 0]))
    scalars = quantizer.scalars()
    assert scalars["code_perplexity"].item() == pytest.approx(4)
    assert scalars["dead_codes"].item() == 0.5


def test_only_codebook_and_usage_are_saved():
    assert set(build(revive=1).state_dict()) == {"codebook", "usage"}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_k_means_ends_where_another_round_changes_little_and_never_loses_a_mean(seed, clusters):
    samples = F.normalize(tokens_of(seed, 1, 40)[0], dim=1)
    means, counts = kmeans(samples, samples[:clusters], 60)
    again, _ = kmeans(samples, means, 1)
    torch.testing.assert_close(again, means, rtol=0, atol=1e-5)
    assert counts.sum() == 40
    torch.testing.assert_close(means.norm(dim=1), torch.ones(clusters))


def test_k_means_starts_the_codebook_reproducibly_with_fewer_tokens_than_codes_too():
    first, second = build(codes=30), build(codes=30)
    second.codebook.zero_()
    for quantizer in (first, second):
        quantizer.start(tokens_of(10), seed=3)
    assert torch.equal(first.codebook, second.codebook)
    torch.testing.assert_close(first.codebook.norm(dim=1), torch.ones(30))


@pytest.mark.parametrize("options", [{"codes": 0}, {"decay": 1.5}, {"revive": 9000}, {"commitment": -1.0}])
def test_impossible_codebooks_are_refused(options):
    with pytest.raises(ConfigError, match=r"^quantizer\."):
        QuantizerConfig(**options).check("quantizer")
