"""Position tables: MAE's sine-cosine tables and its resampling to another grid."""

import torch

from halfseen.models.positions import resize, sincos

from .golden import Case, Check, Family, outputs, refuse_unknown


def grid_of(size: int | list[int]) -> tuple[int, int]:
    """A grid given by its side, or by both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def tables(case: Case) -> list[Check]:
    """Each table of the case: shape, whole or by rows, and its sums in double."""
    checks = []
    for key, config in case.config.items():
        table = sincos(config["embed_dim"], grid_of(config["grid_size"]), int(config["cls_token"]))[0]
        actual = {f"{key}/rows": table[config["rows"]], f"{key}/table": table}
        checks += outputs(case, actual)
        double = table.double().flatten()
        turned = double * torch.arange(len(double), dtype=torch.float64).cos()
        shape = torch.tensor(table.shape, dtype=torch.float64)
        sums = {"sum": double.sum(), "abs_sum": double.abs().sum(), "sq_sum": double.square().sum()}
        # Ours is rounded to float32, an error of up to 3e-8 per entry that adds up like a random walk, in
        # which each step repeats in every row or column of the grid.
        noise = 1e-7 * (len(double) * max(grid_of(config["grid_size"]))) ** 0.5
        for name, value in ({"shape": shape} | sums | {"dot_cos": turned.sum()}).items():
            expected = torch.tensor(config[name], dtype=torch.float64)
            checks.append(Check(f"config/{key}/{name}", value, expected, rtol=1e-9, atol=noise))
    return checks


def interpolation(case: Case) -> list[Check]:
    """One table moved from a grid to another."""
    config = case.config
    refuse_unknown(config, ("src_grid", "dst_grid", "extra_tokens", "dim"))
    old, new = grid_of(config["src_grid"]), grid_of(config["dst_grid"])
    return outputs(case, {"pos_embed": resize(case.inputs["pos_embed"], old, new, config["extra_tokens"])})


FAMILIES = (
    Family("mae_sincos", "facebookresearch/mae", "util/pos_embed.py", tables),
    Family("mae_pos_interp", "facebookresearch/mae", "util/pos_embed.py", interpolation),
)
