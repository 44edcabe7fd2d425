"""What a layout is, and the one rule that all of them share: where the trunk stands."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Names = Callable[[set[str]], dict[str, str]]
Weights = Mapping[str, Tensor]


def unchanged(weights: Weights) -> dict[str, Tensor]:
    """The weights as they are."""
    return dict(weights)


@dataclass(frozen=True)
class Layout:
    """One project's names.

    owns tells whether the names of a file are in this layout. to_ours maps every name of a file, from_ours every
    name that has a place there (timm has no decoder), both one to one, over all the names of one file: a block's
    branches can only be told from each other's presence.

    Where one tensor there is several here or the reverse (q, k and v apart), join brings theirs into tensors that
    to_ours can name, and part is its inverse. Both move values and change none, so that there and back is exact.
    """

    name: str
    what: str
    owns: Callable[[set[str]], bool]
    to_ours: Names
    from_ours: Names
    join: Callable[[Weights], dict[str, Tensor]] = unchanged
    part: Callable[[Weights], dict[str, Tensor]] = unchanged

    def take(self, weights: Weights) -> dict[str, Tensor]:
        """Their weights under our names."""
        joined = self.join(weights)
        return rename(joined, self.to_ours(set(joined)))

    def give(self, weights: Weights) -> dict[str, Tensor]:
        """Our weights under their names; those without a place there are left out."""
        return self.part(rename(weights, self.from_ours(set(weights))))


def rename(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights that the table names, under their new names, values untouched.

    Raises ValueError if two would become one.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in table:
            if table[name] in renamed:
                raise ValueError(f"{name} and another weight would both be called {table[name]}")
            renamed[table[name]] = value
    return renamed


# Modules of a student that stand beside its trunk and keep their names everywhere.
_BESIDE = re.compile(r"(head|fc_norm|head_dist)\.")


def beside(name: str) -> bool:
    """Whether a weight is of a classifier's parts beside its trunk."""
    return bool(_BESIDE.match(name))


# Parts of our trunks that the plain ViTs of timm, MAE and DeiT III do not have.
_BEYOND = re.compile(
    r"encoder\.(body\.|layers\.|stages\.|stem\.|patch_embeds\.|rel_pos_bias\.|absolute_pos_embed"
    r"|blocks\.\d+\.(peg\.|(norm|ls)[12]\.\d+\.|.*(relative_position_bias_table|[qv]_bias|rpe_[qkv]|proj_[lw]|reattention|attn\.map)))"
)


def plain(name: str) -> bool:
    """Whether a plain ViT may have this weight of ours; leaving out one that it lacks changes what is computed."""
    return not _BEYOND.match(name)


def only(trunk: str, from_ours: Names, *others: str) -> Names:
    """from_ours where nothing has a place but a classifier and what begins as is said.

    trunk: an expression for the names of our trunk; others: how names beside it begin.
    """
    inside = re.compile(rf"encoder\.({trunk})")
    return lambda names: from_ours(
        {name for name in names if inside.match(name) or beside(name) or (others and name.startswith(others))}
    )


def in_trunk(name: str) -> str:
    """Our name of a weight that others call ``name``: trunks are flat there, ``encoder`` here."""
    return name if beside(name) else f"encoder.{name}"


def out_of_trunk(name: str) -> str:
    """The inverse of in_trunk."""
    return name.removeprefix("encoder.")
