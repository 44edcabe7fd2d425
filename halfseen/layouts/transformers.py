"""Hugging Face transformers: ViT, ViTMAE and BEiT as their files name them, queries, keys and values apart."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from .layout import Layout, Weights

INDEX = "relative_position_index"  # made from the grid; files of older versions hold it
_PARTS = ("query", "key", "value")
_APART = re.compile(rf"(.*\.attention\.attention)\.({'|'.join(_PARTS)})\.(weight|bias)$")
_JOINED = re.compile(r"(.*\.attention\.attention)\.qkv\.(weight|bias)$")

# Of a block: theirs (queries, keys and values joined) -> ours.
_BLOCK = {
    "attention.attention.qkv.": "attn.qkv.",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "attention.attention.relative_position_bias.": "attn.",
    "attention.output.dense.": "attn.proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "lambda_1": "ls1.gamma",
    "lambda_2": "ls2.gamma",
}
# Of a trunk: theirs -> ours.
_TRUNK = {
    "embeddings.cls_token": "encoder.cls_token",
    "embeddings.position_embeddings": "encoder.pos_embed",
    "embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.",
    "embeddings.mask_token": "mask_token",
    "encoder.layer.": "encoder.blocks.",
    "encoder.relative_position_bias.": "encoder.rel_pos_bias.",
    "layernorm.": "encoder.norm.",
}
# ViTMAE's decoder: theirs -> ours.
_DECODER = {
    "decoder.decoder_layers.": "decoder.blocks.",
    "decoder.decoder_embed.": "decoder.embed.",
    "decoder.decoder_norm.": "decoder.norm.",
    "decoder.decoder_pred.": "decoder.pred.",
    "decoder.decoder_pos_embed": "decoder.pos_embed",
    "decoder.mask_token": "decoder.mask_token",
}
_NUMBERED = re.compile(r"(.*\.(?:layer|blocks|decoder_layers)\.\d+\.)(.+)$")


def join(weights: Weights) -> dict[str, Tensor]:
    """q, k and v as one map; where keys have no bias (BEiT), those of q and v stay apart. Index tables left out."""
    joined: dict[str, Tensor] = {}
    for name, value in weights.items():
        found = _APART.match(name)
        names = [f"{found[1]}.{part}.{found[3]}" for part in _PARTS] if found else []
        if not found or not all(part in weights for part in names):
            joined[name] = value
        elif found[2] == "query":
            joined[f"{found[1]}.qkv.{found[3]}"] = torch.cat([weights[part] for part in names])
    return {name: value for name, value in joined.items() if not name.endswith(INDEX)}


def part(weights: Weights) -> dict[str, Tensor]:
    """The inverse of join."""
    parted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if found := _JOINED.match(name):
            parted |= {f"{found[1]}.{part}.{found[2]}": piece for part, piece in zip(_PARTS, value.chunk(3))}
        else:
            parted[name] = value
    return parted


def translate(name: str, table: dict[str, str]) -> str | None:
    """The name with the first prefix of the table that it has replaced, and so inside a block; None: no such prefix."""
    prefix = next((old for old in table if name.startswith(old)), None)
    if prefix is None:
        return None
    name = table[prefix] + name.removeprefix(prefix)
    inside = _NUMBERED.match(name)
    if not inside:
        return name
    block = _BLOCK if inside[1].startswith(("encoder.blocks.", "decoder.blocks.")) else _OURS_BLOCK
    old = next((old for old in block if inside[2].startswith(old)), None)
    return None if old is None else inside[1] + block[old] + inside[2].removeprefix(old)


_OURS_BLOCK = {
    ours: theirs for theirs, ours in _BLOCK.items() if theirs != "attention.attention.relative_position_bias."
}
_OURS_BLOCK["attn.relative_position_bias_table"] = (
    "attention.attention.relative_position_bias.relative_position_bias_table"
)


_SHARED = re.compile(r"encoder\.blocks\.\d+\.(norm|ls)[12]\.\d+\.")  # blocks that stand for several are in none
# Parts that their BEiT has and their ViT lacks.
_BEIT_ALONE = re.compile(r"(mask_token$|encoder\.(rel_pos_bias|blocks\.\d+\.(ls[12]|attn\.[qv]_bias|attn\.relative)))")


def tables(root: str, beside: dict[str, str], plain: bool) -> tuple[Callable[[set[str]], dict[str, str]], ...]:
    """to_ours and from_ours of a model whose trunk stands under ``root`` and that has other modules beside it.

    plain: a ViT, without the parts of a BEiT.
    """
    there = {root + theirs: ours for theirs, ours in _TRUNK.items()} | beside
    back = {ours: theirs for theirs, ours in there.items()}

    def to_ours(names: set[str]) -> dict[str, str]:
        # What has no place here keeps its name, so that it is reported and comes back.
        return {name: translate(name, there) or name for name in names}

    def from_ours(names: set[str]) -> dict[str, str]:
        kept = {name for name in names if not (_SHARED.match(name) or (plain and _BEIT_ALONE.match(name)))}
        given = {name: translate(name, back) for name in kept}
        return {name: theirs for name, theirs in given.items() if theirs is not None}

    return to_ours, from_ours


def layout(name: str, what: str, root: str, beside: dict[str, str], owns: Callable[[set[str]], bool]) -> Layout:
    """A layout of this family; owns is asked of names that have a trunk under ``root``."""
    trunk = f"{root}encoder.layer.0.attention.attention."
    to_ours, from_ours = tables(root, beside, plain="beit" not in name)

    def mine(names: set[str]) -> bool:
        return any(name.startswith(trunk) for name in names) and owns(names)

    return Layout(name, what, mine, to_ours, from_ours, join, part)


def _scaled(names: set[str]) -> bool:
    return any(name.endswith("layer.0.lambda_1") for name in names)


HF_MAE = layout(
    "transformers_mae",
    "transformers' ViTMAEForPreTraining",
    "vit.",
    _DECODER,
    lambda names: any(name.startswith("decoder.decoder_") for name in names),
)
HF_VIT = layout(
    "transformers_vit", "transformers' ViTForImageClassification", "vit.", {"classifier.": "head."}, lambda names: True
)
HF_VIT_MODEL = layout("transformers_vit_model", "transformers' ViTModel", "", {}, lambda names: not _scaled(names))
# The final norm of masked image modeling stands outside of the trunk.
HF_BEIT_MIM = layout(
    "transformers_beit_mim",
    "transformers' BeitForMaskedImageModeling",
    "beit.",
    {"layernorm.": "encoder.norm.", "lm_head.": "head."},
    lambda names: any(name.startswith("lm_head.") for name in names),
)
HF_BEIT = layout(
    "transformers_beit",
    "transformers' BeitForImageClassification",
    "beit.",
    {"beit.pooler.layernorm.": "fc_norm.", "classifier.": "head."},
    lambda names: True,
)
HF_BEIT_MODEL = layout(
    "transformers_beit_model", "transformers' BeitModel", "", {"pooler.layernorm.": "fc_norm."}, _scaled
)
TRANSFORMERS = (HF_MAE, HF_VIT, HF_VIT_MODEL, HF_BEIT_MIM, HF_BEIT, HF_BEIT_MODEL)
