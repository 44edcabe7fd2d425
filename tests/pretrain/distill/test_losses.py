"""The losses against their equations, written out; the released numbers are in tests/golden."""

import math

import pytest
import torch
import torch.nn.functional as F

from halfseen.pretrain.distill import losses


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_soft_distillation_divides_by_images_times_classes():
    ours, theirs = drawn(4, 7), drawn(4, 7, seed=1)
    p = (theirs / 3).softmax(-1)
    divergence = (p * (p.log() - (ours / 3).log_softmax(-1))).sum()
    torch.testing.assert_close(losses.soft(ours, theirs, 3.0), 9 * divergence / 28)


def test_soft_cross_entropy_is_the_divergence_plus_the_teachers_entropy_per_row():
    ours, theirs = drawn(4, 7), drawn(4, 7, seed=1)
    p = (theirs / 2).softmax(-1)
    torch.testing.assert_close(losses.soft_cross_entropy(ours, theirs, 2.0), F.cross_entropy(ours / 2, p))


def test_hard_distillation_takes_the_teachers_class():
    ours, theirs = drawn(4, 7), drawn(4, 7, seed=1)
    assert losses.hard(ours, theirs) == F.cross_entropy(ours, theirs.argmax(1))
    assert losses.hard(ours, theirs) == losses.hard(ours, theirs / 10)


def test_the_binary_form_is_least_at_the_teacher():
    theirs = drawn(4, 7)
    best = losses.binary(theirs, theirs)
    p = theirs.sigmoid()
    torch.testing.assert_close(best, -(p * p.log() + (1 - p) * (1 - p).log()).mean())
    assert losses.binary(theirs + 0.5, theirs) > best


@pytest.mark.parametrize("pairs", ["all", "same"])
def test_attention_relations_by_the_papers_equation(pairs):
    """R_ij = softmax(S_i S_j^T / sqrt(d)) per relation head; cross entropy of rows, mean over pairs and rows."""
    ours, theirs, heads = drawn(2, 5, 3 * 8), drawn(2, 5, 3 * 12, seed=1), 4
    total, count = torch.zeros(()), 0
    for i in range(3):
        for j in range(3):
            if pairs == "same" and i != j:
                continue
            for image in range(2):
                for head in range(heads):
                    rows = []
                    for side, width in ((ours, 2), (theirs, 3)):
                        s = side[image].view(5, 3, heads, width)
                        rows.append(s[:, i, head] @ s[:, j, head].T / math.sqrt(width))
                    total += F.cross_entropy(rows[0], rows[1].softmax(-1))
                    count += 1
    torch.testing.assert_close(losses.attention_relation(ours, theirs, heads, pairs), total / count)


def test_hidden_relations_in_both_forms():
    ours, theirs = drawn(2, 5, 8), drawn(2, 5, 12, seed=1)
    cosines = [F.cosine_similarity(h[:, :, None], h[:, None], dim=-1) for h in (ours, theirs)]
    code = 49 * (cosines[0] - cosines[1]).square().mean()
    torch.testing.assert_close(losses.hidden_relation(ours, theirs, "code", 49.0), code)
    rows = [h @ h.transpose(1, 2) / math.sqrt(h.shape[-1]) for h in (ours, theirs)]
    paper = -(rows[1].softmax(-1) * rows[0].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses.hidden_relation(ours, theirs, "paper", 49.0), paper)


def test_relations_do_not_see_a_rotation_of_the_channels():
    """What makes students of another width possible: only products of tokens count."""
    hidden = drawn(2, 5, 8)
    turn = torch.linalg.qr(drawn(8, 8, seed=2))[0]
    assert losses.hidden_relation_code(hidden @ turn, hidden) < 1e-10


@pytest.mark.parametrize("name", ["hard", "soft", "soft_ce", "bce"])
def test_every_named_loss_on_scores_pulls_towards_the_teacher(name):
    ours, theirs = torch.zeros(3, 5, requires_grad=True), drawn(3, 5, seed=1)
    losses.of_scores(name, ours, theirs, 1.0).backward()
    assert (ours.grad.gather(1, theirs.argmax(1, keepdim=True)) < 0).all()
