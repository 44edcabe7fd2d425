"""microsoft/unilm, beit2: the VQ-KD tokenizer, two trunks of BEiT's kind around a codebook."""

import re

import torch
from torch import Tensor

from . import beit
from .layout import Layout, Weights, out_of_trunk

_TRUNK = re.compile(r"(encoder|decoder)\.")
_BESIDE = {
    "quantize.embedding.weight": "quantizer.codebook",
    "quantize.cluster_size": "quantizer.usage",
    "encode_task_layer.": "project.",
    "decode_task_layer.": "predict.",
}
# Kept in the official files and used by nothing there: constants, and the teacher the tokenizer was made with.
_IDLE = re.compile(r"(quantize\.embedding\.(cluster_size|embed_avg|initted)|teacher|scaling|loss)")
_CODEBOOK = "quantize.embedding.weight"


def _to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str:
        if found := _TRUNK.match(name):
            short = name.removeprefix(found[0]).replace("fc_norm.", "norm.")
            return found[0] + out_of_trunk(beit.to_ours({short})[short])
        theirs = next((part for part in _BESIDE if name.startswith(part)), None)
        return _BESIDE[theirs] + name.removeprefix(theirs) if theirs else name  # unknown: kept, so that it is reported

    return {name: ours(name) for name in names}


def _from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str | None:
        if found := _TRUNK.match(name):
            short = name.removeprefix(found[0])
            outer = beit.from_ours({short})[short]
            return found[0] + (outer.replace("norm.", "fc_norm.") if outer.startswith("norm.") else outer)
        part = next((theirs for theirs, ours in _BESIDE.items() if name.startswith(ours)), None)
        return part and part + name.removeprefix(_BESIDE[part])

    if not any(name.startswith(("quantizer.", "project.")) for name in names):  # no tokenizer, whatever its trunk
        return {}
    return {name: outer for name in names if (outer := theirs(name))}


def _join(weights: Weights) -> dict[str, Tensor]:
    return beit.without_index({name: value for name, value in weights.items() if not _IDLE.match(name)})


def _part(weights: Weights) -> dict[str, Tensor]:
    found = beit.with_index(weights)
    if _CODEBOOK in weights:
        codebook = weights[_CODEBOOK]
        found["quantize.embedding.cluster_size"] = torch.zeros(len(codebook))
        found["quantize.embedding.embed_avg"] = codebook.clone()
        found["quantize.embedding.initted"] = torch.ones(1)
    return found


VQKD = Layout(
    "vqkd",
    "microsoft/unilm beit2, the VQ-KD tokenizer",
    lambda names: _CODEBOOK in names,
    _to_ours,
    _from_ours,
    _join,
    _part,
)
