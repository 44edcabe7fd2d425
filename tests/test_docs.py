"""What the documentation names is there: files, the names in them, recipes, commands, options."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from halfseen.cli import COMMANDS
from halfseen.recipes import recipes
from halfseen.tools.recipes import STAGES, describe

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *ROOT.glob("docs/performance/*.md"),
]
TOP = ("halfseen", "pretrain", "finetune", "launch", "tools", "configs", "tests", "docs")


def quoted(page):
    """What stands in `backticks` of a page, outside of blocks of code."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def commands(page):
    """Every line that begins with ``halfseen``, in blocks and in prose, continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL))
    return [
        *re.findall(r"^(?:\$ )?halfseen +([a-z]+)([^\n]*)", fenced, re.MULTILINE),
        *re.findall(r"(?:^    |`)halfseen +([a-z]+)([^`\n]*)", text, re.MULTILINE),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_link_is_there(page):
    names = [name for name in quoted(page) if re.fullmatch(r"[\w./*]+\.(py|md|json|yaml|toml)", name) and "/" in name]
    names = [name for name in names if name.startswith(tuple(f"{top}/" for top in TOP))]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    missing = [name for name in names if not list(ROOT.glob(name))]
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_beside_a_file_is_in_that_file(page):
    wrong = []
    for line in page.read_text().splitlines():
        # | what | `pretrain/mae.py`, `Decoder`, `MAE.forward` |
        for file, names in re.findall(r"`((?:\w+/)+\w+\.py)`((?:, `[A-Za-z_][\w.]*(?<!\.py)`)+)", line):
            if not (ROOT / file).is_file():
                continue  # the test above says so
            source = (ROOT / file).read_text()
            for name in re.findall(r"`([\w.]+)`", names):
                missing = [part for part in name.split(".") if not re.search(rf"\b{part}\b", source)]
                wrong += [(file, part) for part in missing]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_bundled_recipe_is_there(page):
    known = {name for name, _ in recipes()}
    wrong = []
    for command, arguments in commands(page):
        if command not in COMMANDS:
            wrong.append(command)
        for name in re.findall(r"\b(?:pretrain|finetune|distill|segment)/[a-z]\w+(?![\w./{])", arguments):
            if name not in known and f"runs/{name}" not in arguments:
                wrong.append(name)
    assert not wrong


@pytest.fixture(scope="module")
def options():
    """Every option of every stage, dotted."""
    found = set()
    for module, name in STAGES.values():
        schema = getattr(importlib.import_module(module), name)
        assert dataclasses.is_dataclass(schema)
        found |= {line.partition(" = ")[0] for line in describe(schema())}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_is_set_is_one(page, options):
    sections = {option.partition(".")[0] for option in options if "." in option}
    text = page.read_text()
    named = re.findall(r"(?<![\w./-])((?:[a-z_]+\.)+[a-z_]+)=", text)
    wrong = sorted({name for name in named if name.partition(".")[0] in sections and name not in options})
    assert not wrong
