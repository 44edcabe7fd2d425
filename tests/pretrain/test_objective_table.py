"""docs/objectives.md says what the tests say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import objective_table


def test_the_published_table_is_the_tested_one():
    assert objective_table.PAGE.read_text() == objective_table.page(), "run python tests/pretrain/objective_table.py"
