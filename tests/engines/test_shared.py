"""A group of blocks that share weights is one unit: gathered and reduced once per pass, its gradient summed in fp32."""

import functools
import json

import pytest
import ranks
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from toys import TOTAL, Traffic, make, stream

from halfseen import config, engine_config, engines, optim
from halfseen.config import Model
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.models import ViT

DEPTH = 6
SHARES = (1, 2, 3)
BLOCK = 12 * 32 * 32 + 13 * 32  # weights of one block of width 32


class Student(nn.Module):
    """A trunk of 6 blocks, of which ``share`` in a row are one module, and a linear head."""

    def __init__(self, share):
        super().__init__()
        self.trunk = ViT(Model(width=32, depth=DEPTH, heads=2, patch=8, share=share), 16)
        self.head = nn.Linear(32, 3)

    def blocks(self):
        return list(self.trunk.blocks)

    def forward(self, batch):
        return {"loss": (self.head(self.trunk(batch["image"])[:, 0]) - batch["target"]).square().mean()}


def prepared(world, share, **options):
    """The student in its engine, and this rank's batch."""
    torch.manual_seed(0)
    student = Student(share)
    chosen = config.Optim(base_lr=None, lr=1e-3)
    engine = engines.create(engine_config.Engine(**options), student, chosen, optim.groups(student, chosen), world, 0)
    batch = {"image": torch.randn(4, 3, 16, 16), "target": torch.randn(4, 3)}
    return engine, {name: value[world.rank :: world.world] for name, value in batch.items()}


def passes(world, options):
    """For each (share, recompute): the second step's traffic, and every step's loss and gradient norm."""
    found = {}
    for share in SHARES:
        for recompute in (False, True):
            engine, batch = prepared(world, share, recompute=recompute, **options)
            history = []
            for step in range(2):
                with Traffic() as traffic:
                    scalars = engine.step([batch], 1e-3, 4 * step)
                history.append((float(scalars["loss"]), float(scalars["grad_norm"])))
            found[share, recompute] = traffic.count, traffic.bytes, history
    return found


@pytest.fixture(scope="module")
def expected():
    return passes(World(), {"name": "single"})


@functools.cache
def under_fsdp():
    return ranks.run(passes, 2, {"name": "fsdp"})[0]


@pytest.fixture(scope="module")
def under_zero3(tmp_path_factory):
    """Nothing is gathered ahead of its use, and nothing kept for a use that is further away than one block."""
    extra = tmp_path_factory.mktemp("extra") / "extra.json"
    kept = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    kept["stage3_max_reuse_distance"] = BLOCK
    extra.write_text(json.dumps({"zero_optimization": kept}))
    return ranks.run(passes, 2, {"name": "deepspeed", "zero_stage": 3, "extra": str(extra)})[0]


def same_curves(found, expected):
    for case, (_, _, history) in found.items():
        for ours, theirs in zip(history, expected[case][2], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-6), case


def test_fsdp_gathers_a_group_twice_a_step_and_reduces_it_once(expected):
    """Once for the forward and once for the backward; the root, which stays gathered in between, once."""
    same_curves(under_fsdp(), expected)
    for (share, _), (count, _, _) in under_fsdp().items():
        units = DEPTH // share + 1  # the trunk's, and the root
        assert count["_allgather_base_"] == 2 * units - 1
        assert count["_reduce_scatter_base_"] == units


def test_zero3_gathers_a_group_once_a_pass_and_reduces_all_at_once(expected, under_zero3):
    same_curves(under_zero3, expected)
    weights = 4 * BLOCK
    for recompute in (False, True):
        gathered = [under_zero3[share, recompute][1]["_allgather_base_"] for share in SHARES]
        # Forward and backward; the turning point is gathered once, and recomputing may gather single weights again.
        assert gathered[0] - gathered[1] >= 2 * weights * (DEPTH - DEPTH // 2) - 2 * weights
        assert gathered[1] - gathered[2] >= 2 * weights * (DEPTH // 2 - DEPTH // 3) * 0.8
    assert all(count["_reduce_scatter_base_"] == 1 for count, _, _ in under_zero3.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_traffic_falls_with_the_size_of_a_group(under_zero3, recompute):
    for found in (under_fsdp(), under_zero3):
        total = [sum(found[share, recompute][1].values()) for share in SHARES]
        assert total[1] < 0.62 * total[0]
        assert total[2] < 0.47 * total[0]


def gathered(world, *types):
    """Bytes of all-gathers in a step under bf16, for weights that travel in each type."""
    found = []
    for gather in types:
        engine, batch = prepared(world, 1, name="fsdp", precision="bf16", gather=gather)
        with Traffic() as traffic:
            engine.step([batch], 1e-3, 0)
        found.append(traffic.bytes["_allgather_base_"])
    return found


def test_weights_in_bf16_are_half_the_traffic_of_the_blocks():
    full, half = ranks.run(gathered, 2, "fp32", "bf16")[0]
    blocks = 4 * BLOCK * DEPTH * 2  # gathered twice; the root's weights stay fp32
    assert full - half == pytest.approx(blocks / 2, rel=0.01)


def in_bf16(world, name):
    """Gradients after one backward, by name."""
    engine = make(world, name, precision="bf16")
    plan = Batches(TOTAL, world.world, TOTAL // world.world, 1)
    found = {}
    update = engine.update

    def look(*arguments):
        for key, parameter in engine.trained.items():
            gradient = parameter.grad
            found[key] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()
        update(*arguments)

    engine.update = look
    engine.step([next(stream(plan, world.rank))], 0.01, 0)
    return found


@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_a_shared_weights_gradient_is_summed_in_fp32(name):
    """One use gives a number of bf16; a sum of two has more digits, unless it was made in bf16."""
    found = in_bf16(World(), name) if name == "single" else ranks.run(in_bf16, 1, name)[0]
    used_once, used_twice, tied = (
        found[f"layers.{part}"] for part in ("0.shrink.weight", "1.grow.weight", "0.grow.weight")
    )
    assert torch.equal(used_once, used_once.bfloat16().float())
    for gradient in (used_twice, tied):
        assert not torch.equal(gradient, gradient.bfloat16().float())
