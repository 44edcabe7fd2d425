"""Relative position tables moved to another grid, as BEiT's fine-tuning script does it."""

import re
from types import SimpleNamespace

from torch import Tensor

from halfseen.layouts import in_trunk
from halfseen.models.relative import geometric, whole
from halfseen.weights import RELATIVE, move_relative, unshare_relative

from .golden import Case, Check, Family, numbers, outputs, refuse_unknown
from .golden_positions import grid_of

READ = ("src_grid", "dst_grid", "heads", "shared_table", "q", "src_positions", "dst_positions")


def interpolation(case: Case) -> list[Check]:
    """Every table of the fine-tuning model, through what init does with a checkpoint; and the places it is read at."""
    config = case.config
    refuse_unknown(config, READ)
    given = tables(case)
    own = {in_trunk(name): value for name, value in case.outputs.items()}
    unshare_relative(own, given)
    trunk = SimpleNamespace(grid=grid_of(config["dst_grid"]))
    moved = {}
    for name, value in case.outputs.items():
        moved[name], _ = move_relative(trunk, name, given[in_trunk(name)], len(value))
    checks = outputs(case, moved)
    source, target = (2 * grid_of(config[key])[0] - 1 for key in ("src_grid", "dst_grid"))
    if "src_positions" in config:
        places = geometric(source, target)
        checks.append(numbers("config/src_positions", places.tolist(), config["src_positions"]))
        if "q" in config and source > 3:
            ratio = (places[-1] - places[-2]) / (places[-2] - places[-3])
            checks.append(numbers("config/q", [float(ratio)], [config["q"]], rtol=1e-6))
    if "dst_positions" in config:
        checks.append(numbers("config/dst_positions", whole(target).tolist(), config["dst_positions"]))
    return checks


def tables(case: Case) -> dict[str, Tensor]:
    """The checkpoint's tables under our names: ``table`` is that of all blocks, or one that each of them has."""
    found = {in_trunk(name): value for name, value in case.inputs.items() if not name.startswith("table")}
    for name, value in case.inputs.items():
        if name == "table" and case.config.get("shared_table", False):
            found[f"encoder.rel_pos_bias.{RELATIVE}"] = value
        elif name == "table":
            found |= {in_trunk(output): value for output in case.outputs}
        elif numbered := re.fullmatch(r"table_?(\d+)", name):
            found[f"encoder.blocks.{numbered[1]}.attn.{RELATIVE}"] = value
    return found


FAMILIES = (Family("beit_relbias_interp", "microsoft/unilm", "run_class_finetuning.py", interpolation),)
