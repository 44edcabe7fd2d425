"""docs/engines.md says what the tests say."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import engine_table


def test_the_published_table_is_the_tested_one():
    assert engine_table.PAGE.read_text() == engine_table.page(), "run python tests/engines/engine_table.py"
