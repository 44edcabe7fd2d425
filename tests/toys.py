"""A small student and a stream of its batches, for tests of engines, checkpoints and the loop."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfseen import config, engine_config, engines, optim
from halfseen.data.hashing import uniform
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.engines import Engine

WIDTH = 16
TOTAL = 12  # divides by 1, 2 and 3 ranks and by accumulation

# Engines with options, by a short name. zero3 gathers every weight anew, which the toy's small ones would escape;
# zero3-kept leaves them gathered, as weights below DeepSpeed's threshold are.
GATHER_ALL = Path(__file__).parent / "engines" / "gather_all.json"
NAMED: dict[str, dict[str, Any]] = {
    "hsdp": {"name": "fsdp", "shard_size": 2},
    "zero0": {"name": "deepspeed", "zero_stage": 0},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3, "extra": str(GATHER_ALL)},
    "zero3-kept": {"name": "deepspeed", "zero_stage": 3},
    "oss": {"name": "fairscale", "fairscale": "oss"},
    "sharded": {"name": "fairscale", "fairscale": "sharded"},
}


class Block(nn.Module):
    """Residual block with dropout; a repeated one gets its repetition, as the trunk's does."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.grow, self.shrink = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, repetition: int) -> Tensor:
        inner = F.gelu(self.grow(self.norm(x)))
        return x + self.dropout(self.shrink(inner)) / (repetition + 1)


class Student(nn.Module):
    """Three blocks used four times: the second twice in a row, the third tied to the first by a weight."""

    def __init__(
        self,
        *,
        frozen: bool = False,
        dropout: float = 0.0,
        tied: bool = True,
        twice: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.calls = ((0, 0), (1, 0), (1, 1), (2, 0)) if twice else ((0, 0), (1, 0), (2, 0))
        self.embed = nn.Linear(8, WIDTH)
        self.statistics = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.layers = nn.ModuleList([Block(dropout) for _ in range(3)])
        if tied:
            self.layers[2].grow.weight = self.layers[0].grow.weight
        self.register_buffer("offset", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.head = nn.Linear(WIDTH, 4)
        if frozen:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".shrink." in name or name.startswith("head"))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def train_flops_per_image(self) -> float:
        return 1.0

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        x = self.statistics(self.embed(batch["image"])) + self.offset
        for block, repetition in self.calls:
            x = self.layers[block](x, repetition)
        logits = self.head(x)
        if batch.get("task") == "predict":
            return {"logits": logits}
        error = (logits.float() - batch["target"]).square().mean()
        return {"loss": error, "largest": logits.detach().float().abs().mean()}


def stream(plan: Batches, rank: int, start: int = 0, poison: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
    """Endless micro-batches; rank r owns positions p with p mod world == r. Poisoned ones bring a NaN."""
    for first in itertools.count(start, plan.total):
        own = torch.arange(first + rank, first + plan.total, plan.world)
        for position in own.split(plan.micro):
            image = uniform(7, position, 8, "image") * 2 - 1
            target = uniform(7, position, 4, "target")
            for wrong in poison:
                image[position == wrong] = float("nan")
            yield {"image": image, "target": target, "position": position}


def layer_of(name: str) -> int:
    """Layer-wise rates: embedding 0, block i at i + 1, head last."""
    return int(name.split(".")[1]) + 1 if name.startswith("layers.") else 4 * name.startswith("head")


def make(
    world: World,
    name: str = "auto",
    *,
    student: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    seed: int = 5,
    **options: Any,
) -> Engine:
    """An engine over the toy student, the same weights on every rank."""
    torch.manual_seed(1)
    built = Student(**(student or {}))
    chosen = config.Optim(**({"layer_decay": 0.7, "clip": 0.05, "eps": 1e-4} | (optimizer or {})))
    groups = optim.groups(built, chosen, layer_of, 4)
    named = NAMED.get(name, {"name": name}) | options
    settings = engine_config.Engine(**named)
    settings.check("engine")
    return engines.create(settings, built, chosen, groups, world, seed)


def steps(
    engine: Engine,
    world: World,
    count: int,
    *,
    start: int = 0,
    accumulation: int = 2,
    poison: tuple[int, ...] = (),
) -> list[dict[str, float]]:
    """Take steps and return each one's scalars on the host."""
    plan = Batches(TOTAL, world.world, TOTAL // world.world // accumulation, accumulation)
    data = stream(plan, world.rank, start, poison)
    history = []
    for position in range(start, start + count * TOTAL, TOTAL):
        scalars = engine.step([next(data) for _ in range(accumulation)], 0.01, position)
        history.append({name: float(value) for name, value in scalars.items()})
    return history


def three_steps(
    world: World, options: dict[str, Any], student: nn.Module, batch: dict[str, Tensor]
) -> list[tuple[float, float]]:
    """Loss and gradient norm of three steps of any student on one batch, of which each rank takes its share."""
    chosen = config.Optim(base_lr=None, lr=1e-3)
    groups = optim.groups(student, chosen)
    engine = engines.create(engine_config.Engine(**options), student, chosen, groups, world, 0)
    mine = {key: value[world.rank :: world.world] for key, value in batch.items()}
    found = [engine.step([mine], 1e-3, 4 * step) for step in range(3)]
    return [(float(scalars["loss"]), float(scalars["grad_norm"])) for scalars in found]


def furthest(some: list[dict[str, float]], others: list[dict[str, float]], *names: str) -> float:
    """Largest relative difference between two histories in the named scalars."""
    return max(abs(a[n] - b[n]) / max(abs(a[n]), 1e-12) for a, b in zip(some, others, strict=True) for n in names)


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes of the larger side of each."""

    def __init__(self):
        super().__init__()
        self.count, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = func._overloadpacket.__name__
            self.count[kind] += 1
            self.bytes[kind] += max(t.numel() * t.element_size() for t in tensors(args))
        return func(*args, **(kwargs or {}))


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []
