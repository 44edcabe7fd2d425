"""openai/DALL-E: the encoder of its discrete VAE, which BEiT takes its codes from."""

import re

from .layout import Layout

_PART = re.compile(r"blocks\.(input|output\.conv|group_(\d+)\.block_(\d+)\.(id_path|res_path\.conv_\d))\.([wb])$")
_OURS = re.compile(r"(input|output|groups\.(\d+)\.(\d+)\.(id_path|res_path\.conv_\d))\.(weight|bias)$")
_KINDS = {"w": "weight", "b": "bias"}


def _to_ours(names: set[str]) -> dict[str, str]:
    def ours(name: str) -> str | None:
        found = _PART.match(name)
        if not found:
            return None
        part, group, block, path, kind = found.groups()
        place = part.partition(".")[0] if group is None else f"groups.{int(group) - 1}.{int(block) - 1}.{path}"
        return f"{place}.{_KINDS[kind]}"

    return {name: mine for name in names if (mine := ours(name))}


def _from_ours(names: set[str]) -> dict[str, str]:
    def theirs(name: str) -> str | None:
        found = _OURS.match(name)
        if not found:
            return None
        part, group, block, path, kind = found.groups()
        place = (
            f"group_{int(group) + 1}.block_{int(block) + 1}.{path}" if group else part.replace("output", "output.conv")
        )
        return f"blocks.{place}.{kind[0]}"

    return {name: outer for name in names if (outer := theirs(name))}


DALLE = Layout(
    "dalle",
    "openai/DALL-E, the encoder of its discrete VAE",
    lambda names: "blocks.input.w" in names,
    _to_ours,
    _from_ours,
)
