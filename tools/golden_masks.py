"""BEiT's and SimMIM's mask generators: the original's own masks from its own random numbers, and their statistics."""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfseen.data.masks import Grid, block_mask, mask_from_noise, spread_cells, top_up, unpack

from .golden import Case, Check, Family, exact, refuse_unknown

UNILM = "microsoft/unilm"
GENERATOR = (
    *("input_size", "num_masking_patches", "min_num_patches", "max_num_patches", "min_aspect", "max_aspect"),
    *("seed", "python_random_seed", "masks", "statistics_over"),
)
STATISTICS = ("mean_count", "std_count", "min_count", "max_count", "equal_right_neighbour", "equal_lower_neighbour")


def block_v1(case: Case) -> list[Check]:
    """BEiT's masks: at most so many patches."""
    return block_family(case, exact_count=False)


def block_v2(case: Case) -> list[Check]:
    """BEiT v2's masks: exactly so many patches, topped up by numpy."""
    return block_family(case, exact_count=True)


def block_family(case: Case, exact_count: bool) -> list[Check]:
    """Masks, equal to the bit; then statistics, whose masks the original drew from a state nobody knows."""
    checks = []
    for key, config in case.config.items():
        refuse_unknown(config, (*GENERATOR, *STATISTICS))
        grid = grid_of(config["input_size"])
        draw = generator(config, grid, exact_count)
        given = case.outputs[f"{key}/masks"].bool()
        checks.append(exact(f"out/{key}/masks", torch.stack([draw() for _ in given]).view_as(given), given))
        many = torch.stack([draw() for _ in range(config["statistics_over"])]).view(-1, *grid)
        checks += statistics(key, many, case.outputs, config)
    return checks


def generator(config: Mapping[str, Any], grid: Grid, exact_count: bool) -> Callable[[], Tensor]:
    """The original's stream of masks bool [h*w], after it seeded Python's and numpy's generators."""
    seed = config["seed"] if "seed" in config else config["python_random_seed"]
    rng, legacy = random.Random(seed), np.random.RandomState(seed)
    tokens, hidden = grid[0] * grid[1], config["num_masking_patches"]
    lowest = config.get("min_aspect") or 0.3
    aspects = (lowest, config.get("max_aspect") or 1 / lowest)
    largest = config.get("max_num_patches")

    def choose(visible: Any, count: int) -> Any:
        return np.array(visible)[legacy.choice(len(visible), count, replace=False)]

    def draw() -> Tensor:
        smallest = config.get("min_num_patches", 4)
        bits = block_mask(rng, grid, hidden, smallest=smallest, largest=largest, aspects=aspects)
        return torch.from_numpy(unpack(top_up(bits, tokens, hidden, choose) if exact_count else bits, tokens))

    return draw


def statistics(key: str, masks: Tensor, expected: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Check]:
    """Frequencies, counts and neighbours of masks bool [n, h, w], within five deviations of their difference."""
    apart = 5 * (2 / len(masks)) ** 0.5  # five deviations of the difference of two means, over the spread of one mask
    counts = masks.flatten(1).sum(1)
    checks = [Check(f"out/{key}/freq", masks.double().mean(0), expected[f"{key}/freq"], rtol=0, atol=apart / 2)]
    if f"{key}/count_hist" in expected:
        given = expected[f"{key}/count_hist"]
        found = torch.bincount(counts, minlength=len(given))
        # Distributions, not counts: the largest distance of two of them is what Kolmogorov and Smirnov compare.
        ours, theirs = ((histogram.cumsum(0) / histogram.sum()).double() for histogram in (found, given))
        checks.append(Check(f"out/{key}/count_hist", ours, theirs, rtol=0, atol=2 * (2 / len(masks)) ** 0.5))
    right, lower = masks[:, :, 1:] == masks[:, :, :-1], masks[:, 1:] == masks[:, :-1]
    for name, each in (
        ("mean_count", counts.double()),
        ("equal_right_neighbour", right.double().mean((1, 2))),
        ("equal_lower_neighbour", lower.double().mean((1, 2))),
    ):
        if name in config:
            value = torch.tensor(config[name], dtype=torch.float64)
            checks.append(Check(f"config/{key}/{name}", each.mean(), value, rtol=0, atol=apart * float(each.std())))
    return checks


def coarse(case: Case) -> list[Check]:
    """SimMIM's masks, equal to the bit: cells in numpy's permutation, the first ones hidden."""
    checks = []
    for key, config in case.config.items():
        known = (
            "input_size",
            "mask_patch_size",
            "model_patch_size",
            "mask_ratio",
            "numpy_seed",
            "masks",
            "masked_units",
        )
        refuse_unknown(config, known)
        side = config["input_size"] // config["model_patch_size"]
        cell = config["mask_patch_size"] // config["model_patch_size"]
        cells = (side // cell) ** 2
        hidden = math.ceil(cells * config["mask_ratio"])
        given = case.outputs[f"{key}/masks"].bool()
        legacy = np.random.RandomState(config["numpy_seed"])
        noise = torch.empty(len(given), cells)
        for row in noise:
            row[torch.from_numpy(legacy.permutation(cells))] = -torch.arange(cells, dtype=torch.float32)
        found = spread_cells(mask_from_noise(noise, hidden), (side, side), cell)
        checks.append(exact(f"out/{key}/masks", found.view_as(given), given))
        if "masked_units" in config:
            checks.append(exact(f"config/{key}/units", torch.tensor(hidden), torch.tensor(config["masked_units"])))
    return checks


def grid_of(size: int | list[int]) -> Grid:
    """A grid given by its side, or by both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


FAMILIES = (
    Family("beit_blockmask", UNILM, "masking_generator.py", block_v1),
    Family("beit2_blockmask", UNILM, "masking_generator.py", block_v2),
    Family("simmim_mask", "microsoft/SimMIM", "data/data_simmim.py", coarse),
)
