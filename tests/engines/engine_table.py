"""Writes docs/engines.md from the cases that the parity and switch tests run: what is not tested is not claimed.

Run: python tests/engines/engine_table.py
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "engines.md"
TITLES = {
    "ddp": "`ddp`",
    "fsdp": "`fsdp`",
    "hsdp": "`fsdp`, `shard_size=2`",
    "zero0": "`deepspeed`, `zero_stage=0`",
    "zero1": "`deepspeed`, `zero_stage=1`",
    "zero2": "`deepspeed`, `zero_stage=2`",
    "zero3": "`deepspeed`, `zero_stage=3`",
    "zero3-kept": "the same, small weights kept whole",
    "oss": "`fairscale`, `fairscale=oss`",
    "sharded": "`fairscale`, `fairscale=sharded`",
}
HEAD = """# Engines: what is tested

Made from the tests by `python tests/engines/engine_table.py`; do not edit. A number is the number of CPU (gloo)
ranks on which ten steps were compared with one process: losses and gradient norms within 1e-6 relative in fp32,
2e-2 under bf16 and fp16 autocast, with two micro-batches per update (one on four ranks), clipping, layer-wise rates,
a block used twice and a tied weight. "refused" is an error at start; an empty cell was not tested and is not
claimed. Nothing here ran on a GPU.

"""


def page() -> str:
    """The whole text of docs/engines.md."""
    sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "checkpoint")]
    import test_parity
    import test_switch

    variants = list(test_parity.VARIANTS)
    names = list(dict.fromkeys(name for name, _ in test_parity.ENGINES))
    lines = ["| engine | " + " | ".join(variants) + " |", "| --- " * (len(variants) + 1) + "|"]
    for name in names:
        cells = []
        for variant in variants:
            ranks = [str(count) for other, count in test_parity.ENGINES if other == name]
            tested = [count for count in ranks if ((name, int(count)), variant) in test_parity.CASES]
            refused = (name.removesuffix("-kept"), variant) in test_parity.REFUSED
            cells.append(", ".join(tested) or ("refused" if refused else ""))
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    places = ", ".join(test_switch.title(place) for place in test_switch.PLACES)
    switch = f"""
## Continuing under another engine

A checkpoint written in any of these {len(test_switch.PLACES)} places (engine-ranks) was continued in every other, all
{len(test_switch.PLACES) ** 2} ordered pairs, and the losses stayed on the uninterrupted curve: {places}.
"""
    return HEAD + "\n".join(lines) + "\n" + switch


if __name__ == "__main__":
    PAGE.write_text(page())
