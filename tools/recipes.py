"""``halfseen recipes``: the bundled recipes, one line each; one recipe whole; or every option with its default."""

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from halfseen.recipes import BASES, find_recipe, recipes

STAGES = {
    "pretrain": ("halfseen.pretrain.config", "Pretrain"),
    "distill": ("halfseen.pretrain.distill.config", "Distill"),
    "finetune": ("halfseen.finetune.config", "Finetune"),
    "segment": ("halfseen.finetune.segment_config", "Segment"),
    "probe": ("halfseen.finetune.probe_config", "Probe"),
    "launch": ("halfseen.launch.config", "Launch"),
}

LAUNCH = "launch/"  # bundled files that are neither a run nor a part of one


def main(argv: Sequence[str]) -> int:
    """List recipes, print one, or print a stage's options."""
    parser = argparse.ArgumentParser(prog="halfseen recipes", description=__doc__)
    parser.add_argument("name", nargs="?", help="print this recipe")
    parser.add_argument("--fields", choices=sorted(STAGES), help="print every option of a stage with its default")
    arguments = parser.parse_args(argv)
    if arguments.fields:
        module, schema = STAGES[arguments.fields]
        for line in describe(getattr(importlib.import_module(module), schema)()):
            print(line)
    elif arguments.name:
        sys.stdout.write(find_recipe(arguments.name).read_text())
    else:
        found = recipes()
        width = max(len(name) for name, _ in found)
        for name, line in found:
            if not name.startswith((*BASES, LAUNCH)):
                print(f"{name:<{width}}  {line}")
        print("\nbases for other recipes:")
        for name, line in found:
            if name.startswith(BASES):
                print(f"{name:<{width}}  {line}")
        print("\nresources and chains for halfseen launch:")
        for name, line in found:
            if name.startswith(LAUNCH):
                print(f"{name:<{width}}  {line}")
    return 0


def describe(config: Any, key: str = "") -> Iterator[str]:
    """``key = default  # effect`` for every option, the effect taken from the comment beside the field."""
    sources = [inspect.getsource(kind) for kind in reversed(type(config).__mro__) if dataclasses.is_dataclass(kind)]
    comments = dict(re.findall(r"^    (\w+):[^\n]*?  # ([^\n]+)$", "\n".join(sources), re.MULTILINE))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{key}.{field.name}" if key else field.name
        if dataclasses.is_dataclass(value):
            yield from describe(value, path)
        else:
            effect = comments.get(field.name, "")
            yield f"{path} = {value!r}" + (f"  # {effect}" if effect else "")
