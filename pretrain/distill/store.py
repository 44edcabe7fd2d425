"""A teacher's answers on disk (see pretrain/store.py): how they are made smaller, and what they depend on.

Arrays of a block of positions: scores.value, scores.class, scores.rest; and for every recorded block of the teacher
qkv0, qkv1, ... and hidden0, ..., with NAME.scale where they are int8.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from halfseen.classification import mixing
from halfseen.config import at_least
from halfseen.data import ImageSet

from .. import store

Answer = dict[str, Any]  # teacher_logits [B, K]; teacher_qkv and teacher_hidden: a list with a tensor for each block
DIGEST = "teacher.digest"


@dataclass
class Answers(store.StoreConfig):
    """Where the teacher's answers are kept, and how exactly."""

    top: int = 0  # highest scores kept of each image, the rest as one number; 0: all
    tokens: Literal["fp16", "int8"] = "int8"  # type of recorded blocks; int8 has one scale per token

    def check(self, key: str) -> None:
        """Ranges."""
        super().check(key)
        at_least(f"{key}.top", self.top, 0)


def block_of(config: Any) -> int:
    """Positions in a block: whole groups of images that are mixed with each other."""
    group = 2 * stride_of(config) or 1
    return -(-store.BLOCK // group) * group


def stride_of(config: Any) -> int:
    """Positions between an image and its partner in mixup and cutmix; 0: nothing is mixed."""
    if not (config.augment.mixup or config.augment.cutmix):
        return 0
    return mixing.resolve_stride(config.run.global_batch, config.task.mix_stride)


def span_of(config: Any) -> int:
    """Positions in a shard."""
    block = block_of(config)
    return -(-config.store.shard_images // block) * block


def describe(config: Any, train_set: ImageSet) -> dict[str, Any]:
    """Everything the answers depend on, and how they are kept. Two configs of equal descriptions share a store."""
    chosen, cfg = config.distillation, config.teacher
    described = {
        **store.views_of(config, train_set),
        "task.mix_stride": stride_of(config),
        **{f"teacher.{name}": getattr(cfg, name) for name in ("source", "weights", "part", "image_size", "precision")},
        "distillation.scores": chosen.scores != "none",
        "distillation.teacher_layers": {"qkv": chosen.teacher.qkv, "hidden": chosen.teacher.hidden},
        **{f"store.{name}": getattr(config.store, name) for name in ("top", "tokens")},
        "store.shard_images": span_of(config),
    }
    return json.loads(json.dumps(described))


# ------------------------------------------------------------------------------------------------- arrays


def packed(answer: Answer, cfg: Answers, count: int) -> dict[str, np.ndarray]:
    """An answer to ``count`` images as the arrays that are stored, a row for each."""
    arrays: dict[str, Tensor] = {}
    if "teacher_logits" in answer:
        arrays |= packed_scores(answer["teacher_logits"], cfg.top)
    for kind in ("qkv", "hidden"):
        for number, tokens in enumerate(answer.get(f"teacher_{kind}", ())):
            arrays |= packed_tokens(f"{kind}{number}", tokens, cfg.tokens)
    return {name: per_image(value.cpu().numpy(), count) for name, value in arrays.items()}


def per_image(array: np.ndarray, count: int) -> np.ndarray:
    """Rows [count * W, ...] of windows as [count, W, ...]; one row per image as it is."""
    return array if len(array) == count else array.reshape(count, -1, *array.shape[1:])


def packed_scores(logits: Tensor, top: int) -> dict[str, Tensor]:
    """The highest scores [B, k] with their classes, and what each of the others would have if all were alike [B]."""
    classes = logits.shape[1]
    kept = min(top or classes, classes)
    value, chosen = logits.float().topk(kept, dim=1)
    others = logits.float().scatter(1, chosen, -torch.inf).logsumexp(1)
    rest = others - np.log(classes - kept) if kept < classes else torch.zeros_like(others)
    smallest = torch.int16 if classes <= 2**15 else torch.int32
    return {"scores.value": value.half(), "scores.class": chosen.to(smallest), "scores.rest": rest.half()}


def unpacked_scores(arrays: Mapping[str, Tensor], classes: int) -> Tensor:
    """float32 [B, K]: the kept scores in their places, the rest's everywhere else."""
    filled = arrays["scores.rest"].float()[:, None].expand(-1, classes)
    return filled.scatter(1, arrays["scores.class"].long(), arrays["scores.value"].float())


def packed_tokens(name: str, tokens: Tensor, kind: str) -> dict[str, Tensor]:
    """Tokens [B', N, C] in half precision, or as int8 with a scale for each token."""
    if kind == "fp16":
        return {name: tokens.half()}
    scale = tokens.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return {name: (tokens.float() / scale).round().to(torch.int8), f"{name}.scale": scale}


def unpacked_tokens(name: str, arrays: Mapping[str, Tensor]) -> Tensor:
    """float32 [B', N, C]."""
    scale = arrays.get(f"{name}.scale")
    return arrays[name].float() if scale is None else arrays[name].float() * scale


def unpacked(arrays: Mapping[str, Tensor], classes: int) -> Answer:
    """The answer that arrays stand for."""
    answer: Answer = {}
    if "scores.value" in arrays:
        answer["teacher_logits"] = unpacked_scores(arrays, classes)
    for kind in ("qkv", "hidden"):
        count = sum(name.startswith(kind) and "." not in name for name in arrays)
        if count:
            tokens = [unpacked_tokens(f"{kind}{number}", arrays) for number in range(count)]
            answer[f"teacher_{kind}"] = [part.flatten(0, 1) if part.ndim == 4 else part for part in tokens]
    return answer


def losses_of(answer: Answer, restored: Answer) -> dict[str, float]:
    """What storing lost: the largest error of a probability, and of a token's channel over the token's largest one."""
    lost: dict[str, float] = {}
    if "teacher_logits" in answer:
        before, after = (side["teacher_logits"].float().cpu().softmax(1) for side in (answer, restored))
        lost["scores"] = (before - after).abs().max().item()
    for kind in ("qkv", "hidden"):
        sides = (side.get(f"teacher_{kind}", ()) for side in (answer, restored))
        for number, (before, after) in enumerate(zip(*sides, strict=True)):
            before = before.float().cpu()
            peak = before.abs().amax(-1, keepdim=True).clamp(min=1e-12)
            lost[f"{kind}{number}"] = ((before - after.cpu()).abs() / peak).max().item()
    return lost


# ------------------------------------------------------------------------------------------------- reading


class Stored(store.Stored):
    """Reads answers by position."""

    def __init__(self, folder: Path, block: int, span: int, classes: int, device: torch.device) -> None:
        super().__init__(folder, block, span, device)
        self.classes = classes

    def __call__(self, position: Tensor, keys: Sequence[str]) -> Answer:
        """The answers to positions int64 [B], on the CPU, whose samples have these keys. Raises Missing."""
        return unpacked(self.rows(position, keys), self.classes)

    def one(self) -> Answer:
        """Any stored answer to one image, to see what is there. Raises Missing."""
        return unpacked(self.example(), self.classes)
