"""xxxnell/how-do-vits-work: its attention modules alone, and its ConViT."""

import re

from torch import Tensor

from .layout import Layout, Weights, in_trunk, only, out_of_trunk

_ATTENTION = {"to_q.": "q.", "to_kv.": "kv.", "to_out.0.": "proj."}
_CONVIT = {
    r"embedding\.0\.": "patch_embed.proj.",
    r"embedding\.2\.pos_embedding$": "pos_embed",
    r"transformers\.(\d+)\.norm([12])\.1\.": r"blocks.\1.norm\2.",
    r"transformers\.(\d+)\.attn\.": r"blocks.\1.attn.map.",
    r"transformers\.(\d+)\.ff\.net\.0\.": r"blocks.\1.mlp.fc1.",
    r"transformers\.(\d+)\.ff\.net\.3\.": r"blocks.\1.mlp.fc2.",
    r"classifier\.2\.": "fc_norm.",
    r"classifier\.3\.": "head.",
}
_CONVIT_BACK = {
    r"patch_embed\.proj\.": "embedding.0.",
    r"pos_embed$": "embedding.2.pos_embedding",
    r"blocks\.(\d+)\.norm([12])\.": r"transformers.\1.norm\2.1.",
    r"blocks\.(\d+)\.attn\.map\.": r"transformers.\1.attn.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"transformers.\1.ff.net.0.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"transformers.\1.ff.net.3.",
    r"fc_norm\.": "classifier.2.",
    r"head\.": "classifier.3.",
}
_MLP = re.compile(r"transformers\.\d+\.ff\.net\.[03]\.weight$")


def attention(name: str, back: bool = False) -> str:
    """A name with the attention's maps called as ours, or back; other names as they are."""
    if name.startswith("patch_embed."):
        return name
    for theirs, ours in _ATTENTION.items():
        before, after = (ours, theirs) if back else (theirs, ours)
        name = re.sub(rf"(^|\.){re.escape(before)}", rf"\g<1>{after}", name)
    return name


def _replaced(name: str, table: dict[str, str]) -> str:
    for pattern, text in table.items():
        if re.match(pattern, name):
            return re.sub(pattern, text, name, count=1)
    return name


def _flat(weights: Weights) -> dict[str, Tensor]:
    """1x1 convolutions of the MLP as the matrices they are."""
    return {name: value.flatten(1) if _MLP.match(name) else value for name, value in weights.items()}


def _convolutions(weights: Weights) -> dict[str, Tensor]:
    return {name: value[..., None, None] if _MLP.match(name) else value for name, value in weights.items()}


HDVW = Layout(
    "hdvw",
    "one attention, or one block of AlterNet, of xxxnell/how-do-vits-work",
    lambda names: any(re.search(r"(^|\.)to_kv\.", name) for name in names),
    lambda names: {name: attention(name) for name in names},
    lambda names: {name: attention(name, back=True) for name in names if not name.startswith("encoder.")},
)
HDVW_CONVIT = Layout(
    "hdvw_convit",
    "the ConViT of xxxnell/how-do-vits-work",
    lambda names: any(name.startswith("transformers.") for name in names) and "embedding.0.weight" in names,
    lambda names: {name: in_trunk(attention(_replaced(name, _CONVIT))) for name in names},
    only(
        r"patch_embed\.proj\.(weight|bias)|pos_embed|blocks\.\d+\.(norm[12]\.|attn\.map\.|mlp\.)",
        lambda names: {name: _replaced(attention(out_of_trunk(name), back=True), _CONVIT_BACK) for name in names},
    ),
    _flat,
    _convolutions,
)
