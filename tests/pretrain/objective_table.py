"""Writes docs/objectives.md from the combinations that test_objectives.py runs: what is not tested is not claimed.

Run: python tests/pretrain/objective_table.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "objectives.md"
HEAD = """# Objectives: what goes together, and is tested

Made from the tests by `python tests/pretrain/objective_table.py`; do not edit. Mask, objective and target are
independent sections of a recipe. Every cell is tested: the stems named in it took an update of a small model, every
other stem was refused at start with the option and the way out. Only CPUs were used.

"""
ENGINES = """
## Engines

Two steps of two micro-batches per rank on {ranks} CPU (gloo) ranks gave the losses of one process to 2e-5 relative in
fp32, with the hMLP stem: {names}. The discrete VAE draws its noise on each rank, as dropout does, so that its curve
depends on their number: it ran, and was not compared.

| objective | target | mask | """


def page() -> str:
    """The whole text of docs/objectives.md."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import test_objectives as tested

    lines = [
        "| objective | target | " + " | ".join(f"`{mask}`" for mask in tested.MASKS) + " |",
        "| --- " * (len(tested.MASKS) + 2) + "|",
    ]
    for objective, target in tested.STUDENTS:
        cells = []
        for mask in tested.MASKS:
            stems = [stem for stem in tested.STEMS if tested.legal(objective, mask, stem)]
            every = len(stems) == len(tested.STEMS)
            cells.append("every stem" if every else ", ".join(stems) or "refused")
        lines.append(f"| `{objective}` | `{target}` | " + " | ".join(cells) + " |")
    names = [f"`{name}`" for name in tested.ENGINES]
    lines.append(ENGINES.format(ranks=2, names=", ".join(names)) + " | ".join(names) + " |")
    lines.append("| --- " * (len(names) + 3) + "|")
    for objective, target in tested.SHARDED:
        cell = "ran" if objective in tested.NOISY else "equal"
        row = [f"`{objective}`", f"`{target}`", f"`{tested.usual(objective)}`", *[cell] * len(names)]
        lines.append("| " + " | ".join(row) + " |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
