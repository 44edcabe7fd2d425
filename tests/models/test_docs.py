"""The page of methods names what exists: files, functions, options."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from halfseen.finetune.config import Finetune
from halfseen.models.trunks import SECTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
EQUATIONS = [row for row in ROWS if len(row) == 4 and ".py`" in row[2]]


def named(cell):
    """(file, name) of each `file.py`, `name`, `name`; ... in a cell."""
    file = None
    for word in re.findall(r"`([^`]+)`", cell):
        if word.endswith(".py"):
            file = word.removesuffix(".py")
        else:
            yield file, word


def test_the_table_was_found():
    assert len(EQUATIONS) > 25
    assert all(list(named(row[2])) for row in EQUATIONS)


@pytest.mark.parametrize("row", EQUATIONS, ids=lambda row: f"{row[0]}-{row[1]}"[:40])
def test_what_computes_an_equation_exists(row):
    for file, name in named(row[2]):
        found = importlib.import_module(f"halfseen.models.{file}")
        for part in name.split("."):
            found = getattr(found, part)


def test_options_of_the_table_exist():
    schemas = {name: {part.name for part in dataclasses.fields(kind)} for name, kind in SECTIONS.values()}
    stage = {part.name for part in dataclasses.fields(Finetune)}
    for row in EQUATIONS:
        for option in re.findall(r"`([\w.]+)=?[^`]*`", row[3]):
            section, _, name = option.rpartition(".")
            known = schemas.get(section or "model", set()) | (stage if not section else set())
            assert name in known or option in ("mask_token", "run.init"), option
