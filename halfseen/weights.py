"""Starting a student from other weights, with a report, and a refusal when they fill too little of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfseen import layouts
from halfseen.config import ConfigError
from halfseen.models.positions import resize


@dataclass
class Report:
    """What became of every weight. ``str()`` is a short table."""

    layout: str  # what the given names were read as
    loaded: list[str] = field(default_factory=list)  # copied as they are
    resized: dict[str, str] = field(default_factory=dict)  # position tables moved to another grid -> how
    new: dict[str, str] = field(default_factory=dict)  # the student's, left at their random start -> why
    unused: list[str] = field(default_factory=list)  # given, without a place in the student
    covered: float = 0.0  # share of the trunk's elements that were filled

    def __str__(self) -> str:
        lines = [f"init      {self.covered:.1%} of the trunk filled; names read as {self.layout}"]
        for title in ("loaded", "resized", "new", "unused"):
            names = getattr(self, title)
            lines.append(f"  {title:<8} {len(names):>4}  {_brief(names)}")
        return "\n".join(lines)


def _brief(names: list[str] | dict[str, str]) -> str:
    """Names by their leading modules, with the reasons where there are any."""
    if isinstance(names, dict):
        listed = [f"{name} ({why})" for name, why in names.items()]
        return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
    modules: dict[str, int] = {}
    for name in names:
        module = ".".join(name.split(".")[:2])
        modules[module] = modules.get(module, 0) + 1
    return ", ".join(f"{module} x{count}" if count > 1 else module for module, count in modules.items())


@torch.no_grad()
def initialise(student: nn.Module, weights: Mapping[str, Tensor], *, coverage: float) -> Report:
    """Copy weights into the student in place, by name; call it before an engine takes the student.

    weights: in our names, or MAE's, DeiT's or timm's. A position table of another grid is resampled; one
    with or without a row for the class token is made to fit without changing what the trunk computes.
    coverage: least share of the trunk's elements (``encoder.*``) that must be filled; below it ConfigError is
    raised and the student is untouched. Above 0 the given trunk's blocks and stem must all find a place, too.
    """
    layout = layouts.detect(weights)
    given = layout.take(weights)
    own = student.state_dict()
    report = Report(layout.name)
    report.resized |= fit_class_row(student.encoder, given)
    filled: dict[str, Tensor] = {}
    for name, value in own.items():
        if name not in given:
            report.new[name] = "not given"
        elif given[name].shape == value.shape:
            filled[name] = given[name]
            if name not in report.resized:
                report.loaded.append(name)
        elif name.endswith("pos_embed") and given[name].shape[-1] == value.shape[-1]:
            filled[name], how = move_table(student.encoder, name, given[name], value.shape[1])
            report.resized[name] = ", ".join(filter(None, (report.resized.get(name), how)))
        else:
            report.new[name] = f"given as {tuple(given[name].shape)}, needed as {tuple(value.shape)}"
    report.unused = [name for name in given if name not in own]
    refuse_not_finite(filled)
    if coverage > 0:
        refuse_left_over(report.unused)
    trunk = {name: value.numel() for name, value in own.items() if name.startswith("encoder.")}
    report.covered = sum(count for name, count in trunk.items() if name in filled) / sum(trunk.values())
    if report.covered < coverage:
        raise ConfigError(
            "run.init_coverage",
            coverage,
            f"only {report.covered:.1%} of the trunk would be filled\n{report}",
            "give weights of the same model, or lower run.init_coverage if this is meant",
        )
    for name, value in filled.items():
        own[name].copy_(value)
    return report


def refuse_left_over(unused: list[str]) -> None:
    """Raise ConfigError if blocks or stem weights were given that the student lacks: it is another, smaller model."""
    left = [name for name in unused if name.startswith(("encoder.blocks.", "encoder.patch_embed."))]
    if left:
        more = f" and {len(left) - 6} more" if len(left) > 6 else ""
        raise ConfigError(
            "run.init",
            ", ".join(left[:6]) + more,
            "the student has no place for these weights of the trunk",
            "use the same model options as the run that made them, or run.init_coverage=0 if this is meant",
        )


def refuse_not_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise ConfigError naming the first weight that holds a NaN or an infinity."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ConfigError("run.init", name, "holds NaN or infinity", "use an earlier checkpoint")


def fit_class_row(trunk: Any, given: dict[str, Tensor]) -> dict[str, str]:
    """Give the trunk's table the zero class row it needs, or fold one without a place into the class token.

    Both leave the trunk's function as it is: the row is only ever added to that token. Returns what was done.
    """
    name, token = "encoder.pos_embed", "encoder.cls_token"
    if name not in given or trunk.pos_embed is None or trunk.cls_token is None:
        return {}
    rows = rows_before_grid(given[name], trunk.position_rows, trunk.grid)
    if rows == 0 and trunk.position_rows == 1:
        given[name] = torch.cat([torch.zeros_like(given[name][:, :1]), given[name]], dim=1)
        return {name: "zero class row added"}
    if rows == 1 and trunk.position_rows == 0 and token in given:
        given[token] = given[token] + given[name][:, :1]
        given[name] = given[name][:, 1:]
        return {name: "class row folded into cls_token"}
    return {}


def rows_before_grid(table: Tensor, expected: int, grid: tuple[int, int] | None = None) -> int:
    """How many rows of a table [1, rows, D] stand before its grid.

    That is ``expected`` if the rest is the given grid or any square, else 0 or 1 if that leaves a square.
    """
    rows = table.shape[1]
    if grid is not None and rows - expected == math.prod(grid):
        return expected
    for prefix in (expected, 0, 1):
        if math.isqrt(max(rows - prefix, 0)) ** 2 == rows - prefix > 0:
            return prefix
    raise ConfigError(
        "run.init",
        tuple(table.shape),
        f"a position table of {rows} rows is no square grid, so it cannot be moved to another",
        "pretrain and fine-tune on the same grid, or start from square images",
    )


def move_table(trunk: Any, name: str, table: Tensor, needed: int) -> tuple[Tensor, str]:
    """A position table resampled to the trunk's grid, and how. needed: rows of the student's own table."""
    height, width = trunk.grid
    prefix = needed - height * width
    found = rows_before_grid(table, prefix)
    side = math.isqrt(table.shape[1] - found)
    if prefix != found:
        raise ConfigError(
            "run.init",
            name,
            f"has {found} rows before its grid, the student's has {prefix}",
            "use a model with the same prefix tokens",
        )
    return resize(table, (side, side), (height, width), prefix), f"{side}x{side} -> {height}x{width}"
