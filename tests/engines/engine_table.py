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
ranks on which six steps were compared with one process: losses and gradient norms within 1e-6 relative in fp32,
2e-2 under bf16 and fp16 autocast, with two micro-batches per update (one on four ranks, or as the column says),
clipping, layer-wise rates, a block used twice and a tied weight (recomputed by FairScale: without these two).
Compiled blocks ran on torch's `aot_eager` backend. "refused" is an error at start; an empty cell was not tested and is
not claimed. Nothing here ran on a GPU; that the tensors of every kind of step are on one device, and that the host
never waits for it, is watched without one (`tests/test_devices.py`).

"""


TAIL = """
## FairScale's FullyShardedDataParallel

`engine.fairscale=full` needs CUDA and was not yet run on a GPU. Its logic was compared with one process on two and
three CPU ranks on which CUDA's streams were replaced by nothing (`tests/engines/test_fairscale_fsdp.py`): fp32,
bf16 autocast, averages, recomputation (FairScale's own too), frozen and tied weights, and a checkpoint of another
engine. On a CPU it is refused; `engine.name=fsdp` does the same.

## Blocks that share weights

A group of blocks with one set of weights (`model.share`) is one unit: one call, gathered once for the forward and
once for the backward, reduced once, recomputed and compiled as a whole. FSDP2's all-gathers in a step of six blocks
were 13, 7 and 5 for groups of one, two and three (`tests/engines/test_shared.py` counts messages and bytes, under
ZeRO-3 too). ZeRO-3 keeps a weight for its next use when that is nearer than DeepSpeed's `stage3_max_reuse_distance`
(10^9 weights by default): set in `engine.extra`, it must stay above the size of a block. Under autocast the uses of
a shared weight are summed in fp32.

## Compiled blocks

`engine.compile` compiles one block for all that are alike: drop-path rates that differ are arguments of the code, not
constants in it (`tests/models/test_block.py`). An MAE student takes three compilations (encoder, decoder, the decoder's
last block) to train and two to predict; on a CPU, where the decoder's first block is another one, four and three.

## Recomputation

`engine.recompute` recomputes block by block, without re-entering the backward; compiled blocks too. With
`engine.offload_activations` each block's input waits in pinned host memory meanwhile; on a CPU, where it was tested,
nothing has to be copied. It is the same under every engine.

`engine.recompute_by=fairscale`, under `engine.name=fairscale` alone, has FairScale's `checkpoint_wrapper` do it, with
`offload_to_cpu` where `engine.offload_activations` is on. It re-enters the backward: each block has a backward of its
own, in which a weight that two blocks share would be ready twice. Such weights are refused at start, a block that is
called twice in the first step (an objective that runs its encoder twice is one); a group of `model.share` is one block
and runs. Two faults of the wrapper are mended around it: it passes gradients through tensors that are arguments
themselves and loses those inside of other objects, and what was computed in bf16 it recomputes in fp32 on a CPU, and by
its source in fp16 on a GPU (`tests/engines/test_fairscale_checkpoint.py`). Nothing is gained over
`engine.recompute_by=torch`, which has no such limits: it is there for who compares the two.

## FSDP2: what travels

`engine.gather=fp32` is the default: weights are gathered in fp32 and autocast casts them, so every operator
computes what it computes under DDP, and a run may change engines without a seam. `engine.gather=bf16` halves that
traffic (a `MixedPrecisionPolicy` for the blocks, gradients reduced in fp32); norms and biases are then rounded too,
activations between blocks are bf16, and the uses of a shared weight are summed in bf16. `engine.offload=true` keeps
masters and moments in host memory and updates them there: each step then waits for the device. Both ran on CPU
ranks only.
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

`halfseen pretrain runs/NAME engine.name=ddp` is all it takes: options of the engine that is left (`engine.zero_stage`,
`engine.offload`, ...) return to their defaults. An option that the named engine would ignore is refused.
"""
    return HEAD + "\n".join(lines) + "\n" + switch + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
