"""What the head of a bundled recipe says is so: its command, its epochs, what was published or run."""

import importlib.util
import re
import shlex

import pytest

from halfseen.recipes import find_recipe, load, recipes, stage_of
from halfseen.tools.recipes import STAGES

RUNS = [name for name, _ in recipes() if name.partition("/")[0] in ("pretrain", "finetune", "distill", "segment")]


def head(name):
    """The comment a recipe begins with, as lines."""
    lines = find_recipe(name).read_text().splitlines()
    return [line.lstrip("#").strip() for line in lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")]]


def schema(name):
    module, kind = STAGES[stage_of(find_recipe(name))]
    return getattr(importlib.import_module(module), kind)


def command(name):
    """The words of a head's command, its lines joined, the remark behind it left out."""
    text = "\n".join(head(name)).replace("\\\n", " ")
    (line,) = re.findall(r"^(?:torchrun|halfseen) .*$", text, re.MULTILINE)
    return shlex.split(line.partition("   (")[0])


@pytest.mark.parametrize("name", RUNS)
def test_the_command_and_the_epochs_of_a_head_are_those_of_the_recipe(name):
    words = command(name)
    place = words.index(name)
    stage = stage_of(find_recipe(name))
    if words[0] == "torchrun":
        assert words[1:3] == ["--nproc-per-node", "8"]
        modules = (f"halfseen.{stage}", f"halfseen.pretrain.{stage}")
        assert words[3] == "-m"
        assert words[5:place] == [stage] if words[4] == "halfseen" else words[4] in modules
        assert importlib.util.find_spec(f"{words[4]}.__main__")
    else:
        assert words[1:place] == [stage]
    config = load(schema(name), name, words[place + 1 :])
    if said := set(re.findall(r"(\d+) ?(?:more )?ep", head(name)[0])):
        stages = [part.get("run", {}).get("images") for part in getattr(config, "stages", [])]
        assert said & {str(length).removesuffix("ep") for length in (config.run.images, *stages)}


@pytest.mark.parametrize("name", RUNS)
def test_a_head_says_what_to_expect_and_what_was_published_or_run(name):
    text = " ".join(head(name))
    assert "Run here: " in text or ("Expected: " in text and "Published: " in text and "not yet run here" in text)
