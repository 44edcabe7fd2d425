"""Starting a student from other weights, with a report, and a refusal when they fill too little of it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfseen import layouts
from halfseen.config import ConfigError
from halfseen.models.positions import resize, resize_blocks
from halfseen.models.relative import PREFIX_ROWS, relative_rows, resize_relative

Grid = tuple[int, int]  # patches down and across
RELATIVE = "relative_position_bias_table"
TABLES = ("pos_embed", "patch_pos", RELATIVE)  # how the names of tables end that depend on the grid; patch_pos is TNT's


MADE = ("attn_mask", "relative_position_index")  # tables that follow from the sizes; older files of timm's hold them
_PART_OF_TRUNK = re.compile(r"encoder\.(blocks|layers|stages|body|patch_embeds?|stem)\.")


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
    listed = [f"{module} x{count}" if count > 1 else module for module, count in modules.items()]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")


@torch.no_grad()
def initialise(
    student: nn.Module, weights: Mapping[str, Tensor], *, coverage: float, grid: Grid | None = None
) -> Report:
    """Copy weights into the student in place, by name; call it before an engine takes the student.

    weights: in our names, or MAE's, DeiT's or timm's. A position table of another grid is resampled; one
    with or without a row for the class token is made to fit without changing what the trunk computes.
    coverage: least share of the trunk's elements (``encoder.*``) that must be filled; below it ConfigError is
    raised and the student is untouched. Above 0 the given trunk's blocks and stem must all find a place, too.
    grid: patches down and across of the given tables; None: the student's if that fits, else a square.
    """
    layout = layouts.detect(weights)
    trunk: Any = student.encoder
    if layout.name != "halfseen":  # timm's hierarchical models are all called alike, so the student says
        layout = layouts.LAYOUTS.get(getattr(trunk, "layout", ""), layout)
    given = layout.take(weights)
    own = student.state_dict()
    report = Report(layout.name)
    report.resized |= fit_class_row(trunk, given, grid)
    report.resized |= unshare_relative(own, given)
    moves = grid is not None and grid != trunk.grid  # also where the tables happen to be equally long
    filled: dict[str, Tensor] = {}
    for name, value in own.items():
        if name not in given:
            report.new[name] = "not given"
        elif given[name].shape == value.shape and not (moves and name.endswith(TABLES) and value.ndim < 4):
            filled[name] = given[name]
            if name not in report.resized:
                report.loaded.append(name)
        elif (moved := move(trunk, name, given[name], value, grid)) is not None:
            filled[name], how = moved
            report.resized[name] = ", ".join(filter(None, (report.resized.get(name), how)))
        else:
            report.new[name] = f"given as {tuple(given[name].shape)}, needed as {tuple(value.shape)}"
    report.unused = [name for name in given if name not in own]
    refuse_not_finite(filled)
    if coverage > 0:
        refuse_left_over(report.unused)
    counts = {name: value.numel() for name, value in own.items() if name.startswith("encoder.")}
    report.covered = sum(count for name, count in counts.items() if name in filled) / sum(counts.values())
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
    left = [name for name in unused if _PART_OF_TRUNK.match(name) and not name.endswith(MADE)]
    if left:
        raise ConfigError(
            "run.init",
            left[0] if len(left) == 1 else f"{left[0]} and {len(left) - 1} more",
            f"the student has no place for these weights of the trunk ({_brief(left)})",
            "use the same model options as the run that made them, or run.init_coverage=0 if this is meant",
        )


def refuse_not_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise ConfigError naming the first weight that holds a NaN or an infinity."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ConfigError("run.init", name, "holds NaN or infinity", "use an earlier checkpoint")


def fit_class_row(trunk: Any, given: dict[str, Tensor], grid: Grid | None = None) -> dict[str, str]:
    """Give the trunk's table the zero class row it needs, or fold one without a place into the class token.

    The row of a distillation token goes with that token. All leave the trunk's function as it is: a row is only ever
    added to its own token. Returns what was done.
    """
    name, token = "encoder.pos_embed", "encoder.cls_token"
    if name not in given or trunk.pos_embed is None or trunk.cls_token is None:
        return {}
    rows = rows_before_grid(given[name], trunk.position_rows, trunk.grid, grid)
    if rows == 2 and trunk.position_rows == 1:  # DeiT's distilled models, without their second token
        given[name] = torch.cat([given[name][:, :1], given[name][:, 2:]], dim=1)
        return {name: "distillation row left out"}
    if rows == 1 and trunk.position_rows == 2:
        given[name] = torch.cat([given[name][:, :1], torch.zeros_like(given[name][:, :1]), given[name][:, 1:]], dim=1)
        return {name: "zero distillation row added"}
    if rows == 0 and trunk.position_rows == 1:
        given[name] = torch.cat([torch.zeros_like(given[name][:, :1]), given[name]], dim=1)
        return {name: "zero class row added"}
    if rows == 1 and trunk.position_rows == 0 and token in given:
        given[token] = given[token] + given[name][:, :1]
        given[name] = given[name][:, 1:]
        return {name: "class row folded into cls_token"}
    return {}


def unshare_relative(own: Mapping[str, Tensor], given: dict[str, Tensor]) -> dict[str, str]:
    """Give each block a copy of a relative table that all blocks shared, if the student has one per block (BEiT).

    Neither changes what the trunk computes. Returns what was done.
    """
    shared = f"encoder.rel_pos_bias.{RELATIVE}"
    if shared not in given or shared in own:
        return {}
    tables = [name for name in own if name.startswith("encoder.blocks.") and name.endswith(RELATIVE)]
    table = given.pop(shared) if tables else given[shared]
    given.update(dict.fromkeys(tables, table))
    return dict.fromkeys(tables, "copied from the table of all blocks")


def move(trunk: Any, name: str, table: Tensor, own: Tensor, grid: Grid | None = None) -> tuple[Tensor, str] | None:
    """A table of another grid made to fit the student's own, and how; None where that is not what is the matter."""
    if not name.endswith(TABLES) or table.ndim != own.ndim or table.shape[-1] != own.shape[-1]:
        return None
    if name.endswith(RELATIVE):
        return move_relative(trunk, name, table, len(own), grid)
    if own.ndim < 4:
        return move_table(trunk, name, table, own.shape[1], grid)
    if table.shape[1] != own.shape[1]:  # NesT: blocks, whose number tells the levels, not the size of the image
        return None
    return resize_blocks(table, own.shape[2]), f"{table.shape[2]} -> {own.shape[2]} places a block"


def move_relative(trunk: Any, name: str, table: Tensor, needed: int, grid: Grid | None = None) -> tuple[Tensor, str]:
    """A relative position table [rows, H] resampled to the trunk's grid or window, [needed, H], and how.

    grid: that of the given table, else it is taken to be a square. Rows about prefix tokens are copied; where the
    student has such tokens and the given model had none they are zero, as at the start of training.
    """
    old, given_prefix = relative_grid(name, len(table), grid)
    new, prefix = relative_grid(name, needed, getattr(trunk, "grid", None))
    moved = resize_relative(table, old, new)
    rows = relative_rows(new, 0)
    if prefix and not given_prefix:
        moved = torch.cat([moved, moved.new_zeros(PREFIX_ROWS, moved.shape[1])])
    return (moved if prefix else moved[:rows]), moved_how(old, new)


def relative_grid(name: str, rows: int, expected: Grid | None) -> tuple[Grid, bool]:
    """The grid of a relative table of so many rows, and whether it has rows about prefix tokens.

    The number of offsets of a grid is odd, so an even number of rows has the three. The grid is ``expected`` if that
    fits, else a square.
    """
    prefix = rows % 2 == 0
    offsets = rows - PREFIX_ROWS * prefix
    if expected is not None and relative_rows(expected, 0) == offsets:
        return expected, prefix
    side = (math.isqrt(max(offsets, 0)) + 1) // 2
    if side < 1 or relative_rows((side, side), 0) != offsets:
        raise no_square(name, f"a relative position table of {rows} rows")
    return (side, side), prefix


def rows_before_grid(table: Tensor, expected: int, own: Grid | None = None, stated: Grid | None = None) -> int:
    """How many rows of a table [1, rows, D] stand before its grid.

    With a stated grid that is what it leaves. Else ``expected`` if the rest is the student's own grid or any square,
    else 0, 1 or 2 if that leaves a square.
    """
    rows = table.shape[1]
    if stated is not None:
        left = rows - math.prod(stated)
        if left in (0, 1, 2):
            return left
        reason = f"a position table of {rows} rows is no grid of {stated[0]}x{stated[1]} with one row per named token"
        raise ConfigError("run.init_grid", list(stated), reason, "count the patches down and across")
    if own is not None and rows - expected == math.prod(own):
        return expected
    for prefix in (expected, 0, 1, 2):
        if math.isqrt(max(rows - prefix, 0)) ** 2 == rows - prefix > 0:
            return prefix
    raise no_square(tuple(table.shape), f"a position table of {rows} rows")


def move_table(trunk: Any, name: str, table: Tensor, needed: int, grid: Grid | None = None) -> tuple[Tensor, str]:
    """A position table [1, rows, D] resampled to the trunk's grid, [1, needed, D], and how.

    grid: that of the given table, else it is taken to be a square.
    """
    new: Grid = trunk.grid
    if needed - math.prod(new) not in (0, 1, 2):  # of another stage than the last, whose places are a square
        new = (math.isqrt(needed), math.isqrt(needed))
    prefix = needed - math.prod(new)
    found = rows_before_grid(table, prefix, stated=grid)
    side = math.isqrt(table.shape[1] - found)
    if prefix != found:
        raise ConfigError(
            "run.init",
            name,
            f"has {found} rows before its grid, the student's has {prefix}",
            "use a model with the same prefix tokens",
        )
    old = grid or (side, side)
    return resize(table, old, new, prefix), moved_how(old, new)


def moved_how(old: Grid, new: Grid) -> str:
    """For the report."""
    return f"{old[0]}x{old[1]} -> {new[0]}x{new[1]}"


def no_square(value: object, what: str) -> ConfigError:
    """What a table of an unknown grid is refused with."""
    reason = f"{what} is no square grid, so it cannot be moved to another"
    return ConfigError("run.init", value, reason, "state its grid, e.g. run.init_grid=[14,28]: patches down and across")
