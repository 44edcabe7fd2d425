"""What the teacher says of a batch, and whether its blocks can be compared with the student's."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from halfseen.config import ConfigError
from halfseen.teachers import Teacher

from ..store import Missing
from .config import Distillation
from .store import Answer, Stored

# From a prepared image [B, 3, S, S], its positions int64 [B] on the CPU and its samples' keys.
Ask = Callable[[Tensor, Tensor, Sequence[str]], Answer]


FADING = 0.98  # weight of the past in the teacher's share of the time, at each question


class Live:
    """Asks the teacher, on the very images the student is shown."""

    def __init__(self, teacher: Teacher, cfg: Distillation) -> None:
        self.teacher, self.cfg = teacher, cfg

    def __call__(self, image: Tensor, position: Tensor | None = None, keys: Sequence[str] = ()) -> Answer:
        """image float [B, 3, S, S], normalised for the student, erased and mixed as it is; all a teacher needs."""
        seen, prefix = self.teacher.look(image, self.cfg.teacher), self.teacher.prefix
        answer: Answer = {} if self.cfg.scores == "none" else {"teacher_logits": seen.logits}
        if seen.qkv:
            answer["teacher_qkv"] = [tokens[:, prefix:] for tokens in seen.qkv]
        if seen.hidden:
            answer["teacher_hidden"] = [tokens[:, prefix:] for tokens in seen.hidden]
        return answer


class FromStore:
    """Reads the answers from a store; asks the teacher, if there is one, for those that are not in it."""

    def __init__(self, stored: Stored, live: Live | None) -> None:
        self.stored, self.live = stored, live

    def __call__(self, image: Tensor, position: Tensor, keys: Sequence[str]) -> Answer:
        """As the teacher, to the precision of the store."""
        try:
            return self.stored(position, keys)
        except Missing as gap:
            if self.live is None:
                fix = "run `halfseen teach` again, or set store.missing=live"
                raise ConfigError("store.folder", str(self.stored.folder), str(gap), fix) from gap
            return self.live(image)


class Timed:
    """Adds to an answer what answers take: teacher_ms, the last one known to be finished; teacher_share, of all time.

    teacher_share compares with the time from one question to the next, over about the last 50. Both are 0 before the
    first is known: ranks must return the same scalars. Never waits for the device.
    """

    def __init__(self, ask: Ask, device: torch.device) -> None:
        self.ask, self.device = ask, device
        self.took = self.asking = self.passed = 0.0  # milliseconds; the latter two fade
        self.earlier: deque[tuple[Any, Any]] = deque()  # begin and end of each answer that is not yet counted

    def __call__(self, image: Tensor, position: Tensor, keys: Sequence[str]) -> Answer:
        """As the one asked."""
        begin = self._mark()
        self._count(begin)
        answer = self.ask(image, position, keys)
        self.earlier.append((begin, self._mark()))
        figures = {"teacher_ms": self.took, "teacher_share": self.asking / max(self.passed, 1e-9)}
        return answer | {name: torch.full((), value, device=self.device) for name, value in figures.items()}

    def _count(self, now: Any) -> None:
        """Take in the answers that were finished when the next question began."""
        while self.earlier:
            following = self.earlier[1][0] if len(self.earlier) > 1 else now
            if self.device.type == "cuda" and not following.query():
                return
            begin, end = self.earlier.popleft()
            self.took, period = self._between(begin, end), self._between(begin, following)
            self.asking, self.passed = FADING * self.asking + self.took, FADING * self.passed + period

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, one: Any, other: Any) -> float:
        return one.elapsed_time(other) if self.device.type == "cuda" else 1e3 * (other - one)


class Resized:
    """Brings a teacher's patch tokens to the student's numbers, block by block, where they are not alike."""

    def __init__(self, ask: Ask, counts: dict[str, list[int]]) -> None:
        """counts: tokens of each compared block of the student, by the answer's entry."""
        self.ask, self.counts = ask, counts

    def __call__(self, image: Tensor, position: Tensor, keys: Sequence[str]) -> Answer:
        """As the one asked."""
        answer = self.ask(image, position, keys)
        for name, counts in self.counts.items():
            answer[name] = [resized(tokens, count) for tokens, count in zip(answer[name], counts, strict=True)]
        return answer


def resized(tokens: Tensor, count: int) -> Tensor:
    """Tokens [B, N', C] of a square grid as those of another square grid, [B, count, C]; bilinear, antialiased."""
    if tokens.shape[1] == count:
        return tokens
    old, new = math.isqrt(tokens.shape[1]), math.isqrt(count)
    plane = tokens.float().transpose(1, 2).unflatten(2, (old, old))
    return F.interpolate(plane, (new, new), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------- pairs of blocks


@dataclass(frozen=True)
class Pair:
    """Two blocks that are compared."""

    what: str  # attention or hidden
    student: int
    teacher: int
    ours: tuple[int, ...]  # shape for one image: rows (1, or windows), tokens, channels
    theirs: tuple[int, ...]

    def __str__(self) -> str:
        blocks = ((self.student, self.ours), (self.teacher, self.theirs))
        ours, theirs = (f"block {number:>2}: {' x '.join(map(str, shape))}" for number, shape in blocks)
        return f"{self.what:<9} student {ours}  <-  teacher {theirs}"


@torch.no_grad()
def pair_up(encoder: Any, answer: Answer, cfg: Distillation, image: Tensor) -> list[Pair]:
    """Every pair of blocks that will be compared. Raises ConfigError if some cannot be.

    answer: the teacher's, to one image; image [1, 3, S, S]: any, for the student's shapes.
    """
    layers, prefix = cfg.student, encoder.prefix
    trace = encoder.trace(image, layers=layers.hidden, qkv=layers.qkv)
    sides = {
        "attention": ([trace.qkv[n][:, prefix:] for n in layers.qkv], answer.get("teacher_qkv", ())),
        "hidden": ([trace.layers[n][:, prefix:] for n in layers.hidden], answer.get("teacher_hidden", ())),
    }
    pairs = [
        Pair(what, *blocks, tuple(ours.shape), tuple(theirs.shape))
        for what, (student, teacher) in sides.items()
        for blocks, ours, theirs in zip(zip(cfg.student_layers, cfg.teacher_layers), student, teacher)
    ]
    for pair in pairs:
        refuse_unlike(pair, cfg)
    return pairs


def refuse_unlike(pair: Pair, cfg: Distillation) -> None:
    """Raise ConfigError unless two blocks have relations of one size, and channels that the heads divide."""
    (rows, count, width), (their_rows, their_count, their_width) = pair.ours, pair.theirs
    squares = all(math.isqrt(number) ** 2 == number for number in (count, their_count))
    resizable = rows == their_rows == 1 and squares
    if (rows, count) != (their_rows, their_count) and not (cfg.resize and resizable):
        raise ConfigError(
            "distillation.student_layers",
            cfg.student_layers,
            f"block {pair.student} has {rows} x {count} tokens, the teacher's block {pair.teacher} "
            f"{their_rows} x {their_count}: their relations have different sizes",
            "set teacher.image_size so that both have one grid (196 for patch 14 against patch 16 at 224), or "
            + ("distillation.resize=true" if resizable else "compare other blocks"),
        )
    if pair.what == "attention" and ((width // 3) % cfg.relation_heads or (their_width // 3) % cfg.relation_heads):
        raise ConfigError(
            "distillation.relation_heads",
            cfg.relation_heads,
            f"does not divide both {width // 3} and {their_width // 3} channels (blocks {pair.student} and "
            f"{pair.teacher})",
            f"use a divisor of {math.gcd(width // 3, their_width // 3)}",
        )


def described(pairs: Sequence[Pair], cfg: Distillation) -> list[str]:
    """The mapping, for people."""
    lines = [str(pair) for pair in pairs]
    if cfg.attention:
        which = "q, k and v, each with each" if cfg.pairs == "all" else "q with q, k with k, v with v"
        lines.append(f"relations of {cfg.relation_heads} heads: {which}")
    return lines


def fitted(ask: Ask, pairs: Sequence[Pair]) -> Ask:
    """The same answers with as many tokens as the student's blocks have."""
    if all(pair.ours[1] == pair.theirs[1] for pair in pairs):
        return ask
    counts: dict[str, list[int]] = {}
    for pair in pairs:
        counts.setdefault("teacher_qkv" if pair.what == "attention" else "teacher_hidden", []).append(pair.ours[1])
    return Resized(ask, counts)


def widths_of(answer: Answer) -> list[int]:
    """Channels of each compared block's result, for projections."""
    return [cast(Tensor, tokens).shape[-1] for tokens in answer.get("teacher_hidden", ())]
