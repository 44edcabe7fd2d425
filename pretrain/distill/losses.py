"""What a student is compared with a teacher by: scores, attention relations, hidden states.

Papers: DeiT (arXiv 2012.12877), MiniViT (2204.07154), equations in docs/minivit.md. Official code:
facebookresearch/deit losses.py, microsoft/Cream MiniViT/Mini-Swin/main.py. Everything is computed in fp32.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# Pairs of queries (0), keys (1) and values (2) whose relations are compared.
PAIRS: dict[str, tuple[tuple[int, int], ...]] = {
    "all": tuple((first, second) for first in range(3) for second in range(3)),
    "same": ((0, 0), (1, 1), (2, 2)),
}

# The released hidden-relation loss multiplies by the tokens of one window, whatever the number of tokens is.
WINDOW_TOKENS = 49.0


# ------------------------------------------------------------------------------------------------- scores


def hard(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy with the class the teacher scores highest, mean over images. Both [B, K]."""
    return F.cross_entropy(logits.float(), teacher.argmax(-1))


def soft(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DeiT's soft distillation: KL(teacher || student) at a temperature, times its square, over B * K (not B).

    Both [B, K].
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(student, target, reduction="sum", log_target=True) * temperature**2 / logits.numel()


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """MiniViT's prediction loss: cross entropy with the teacher's distribution, mean over rows. Both [..., K]."""
    target = F.softmax(teacher.float() / temperature, dim=-1)
    return -(target * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1).mean()


def binary(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Binary cross entropy per class with the teacher's sigmoid, mean over both axes of [B, K]; goes with loss=bce."""
    target = torch.sigmoid(teacher.float() / temperature)
    return F.binary_cross_entropy_with_logits(logits.float() / temperature, target)


def of_scores(kind: str, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The loss on scores [B, K] that a config names: distillation.scores."""
    if kind == "hard":
        return hard(logits, teacher)
    return {"soft": soft, "soft_ce": soft_cross_entropy, "bce": binary}[kind](logits, teacher, temperature)


# ------------------------------------------------------------------------------------------------- relations


def relation_logits(first: Tensor, second: Tensor, heads: int) -> Tensor:
    """Scaled products of tokens, [B, N, C] twice -> [B, heads, N, N]: S_i S_j^T / sqrt(C / heads), head by head."""
    first, second = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (first, second))
    return (first * first.shape[-1] ** -0.5) @ second.transpose(-1, -2)


def attention_relation(student: Tensor, teacher: Tensor, heads: int = 1, pairs: str = "all") -> Tensor:
    """Cross entropy between the relations among one block's queries, keys and values (MiniViT, eq. 10 and 11).

    student [B, N, 3C] and teacher [B, N, 3C'], unscaled, as the fused map gives them; the widths may differ, since a
    relation is N x N. heads: relation heads the channels are cut into, alike on both sides. Mean over pairs, images,
    relation heads and rows.
    """
    ours, theirs = student.float().chunk(3, dim=-1), teacher.float().chunk(3, dim=-1)
    losses = [
        soft_cross_entropy(relation_logits(ours[i], ours[j], heads), relation_logits(theirs[i], theirs[j], heads))
        for i, j in PAIRS[pairs]
    ]
    return torch.stack(losses).mean()


def hidden_relation_code(student: Tensor, teacher: Tensor, factor: float = WINDOW_TOKENS) -> Tensor:
    """The released form: mean squared difference of the tokens' cosine similarities, times ``factor``.

    student [B, N, C], teacher [B, N, C'].
    """
    ours, theirs = (F.normalize(tokens.float(), dim=-1) for tokens in (student, teacher))
    return factor * F.mse_loss(ours @ ours.transpose(-1, -2), theirs @ theirs.transpose(-1, -2))


def hidden_relation_paper(student: Tensor, teacher: Tensor) -> Tensor:
    """The paper's form (MiniViT, eq. 12): cross entropy of rows of softmax(H H^T / sqrt(d)); mean over rows.

    student [B, N, C], teacher [B, N, C'].
    """
    ours, theirs = student.float(), teacher.float()
    return soft_cross_entropy(relation_logits(ours, ours, 1), relation_logits(theirs, theirs, 1))


def hidden_relation(student: Tensor, teacher: Tensor, form: Literal["code", "paper"], factor: float) -> Tensor:
    """The hidden-state loss of one block, [B, N, C] and [B, N, C'], in the form a config names."""
    return hidden_relation_code(student, teacher, factor) if form == "code" else hidden_relation_paper(student, teacher)


def matching(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of hidden states [B, N, C'], the student's already projected to the teacher's width."""
    return F.mse_loss(student.float(), teacher.float())


def over_layers(losses: Sequence[Tensor]) -> Tensor:
    """Mean of scalars, one for each pair of compared blocks."""
    return torch.stack(list(losses)).mean()
