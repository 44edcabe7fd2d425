"""facebookresearch/mae: a flat trunk, and a decoder beside it."""

import re

from .layout import Layout, in_trunk, out_of_trunk, plain

# MAE's decoder, flat there, one module here.
_DECODER = re.compile(r"decoder_(embed|pos_embed|blocks|norm|pred)(?=\.|$)")
_OUR_DECODER = re.compile(r"decoder\.(embed|pos_embed|blocks|norm|pred)(?=\.|$)")


def _mae_to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        if name == "mask_token":
            return "decoder.mask_token"
        return _DECODER.sub(r"decoder.\1", name) if _DECODER.match(name) else in_trunk(name)

    return {name: ours(name) for name in names}


def _mae_from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str:
        if name == "decoder.mask_token":
            return "mask_token"
        return _OUR_DECODER.sub(r"decoder_\1", name) if _OUR_DECODER.match(name) else out_of_trunk(name)

    return {name: theirs(name) for name in names if plain(name)}


MAE = Layout(
    "mae",
    "facebookresearch/mae, pretraining and fine-tuning",
    lambda names: any(_DECODER.match(name) for name in names),
    _mae_to_ours,
    _mae_from_ours,
)
