"""FairScale's fully sharded engine. It needs CUDA; here its logic runs on CPU ranks that pretend to have streams."""

import contextlib

import pytest
import ranks
import torch
from toys import TOTAL, furthest, make, steps

from halfseen.checkpoint import Checkpoints
from halfseen.config import ConfigError
from halfseen.distributed import World

STEPS = 5
VARIANTS = {
    "plain": {},
    "average, recompute": {"ema": 0.8, "recompute": True},
    "frozen": {"student": {"frozen": True}, "ema": 0.8},
    "untied": {"student": {"tied": False}, "optimizer": {"clip": None}},
    "recompute by FairScale": {
        "student": {"tied": False, "twice": False},
        "recompute": True,
        "recompute_by": "fairscale",
        "offload_activations": True,
    },
    "bf16": {"precision": "bf16"},
}


def test_on_a_cpu_it_is_refused_with_the_alternative():
    for device in ("cpu", "auto"):  # before anything starts; once the device is known
        with pytest.raises(ConfigError, match=r"engine\.fairscale='full'.*CUDA streams.*\n.*engine\.name=fsdp"):
            make(World(), "fairscale", fairscale="full", device=device)


def test_what_it_cannot_do_is_refused():
    for options, key in (({"optimizer": {"name": "lamb"}}, "optim.name"), ({"compile": True}, "engine.compile")):
        with pytest.raises(ConfigError) as error:
            make(World(), "fairscale", fairscale="full", **options)
        assert error.value.key == key


class OneStream:
    """All of CUDA's streams on a device that has none: work is done when it is given."""

    def wait_stream(self, other): ...

    def synchronize(self): ...


def pretend():
    """FairScale with pretended streams, and an engine that accepts the CPU."""
    from fairscale.internal.reduce_scatter_bucketer import ReduceScatterBucketer
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    from halfseen.engines.fairscale_fsdp import FullySharded

    stream = OneStream()
    torch.cuda.current_stream = lambda *arguments: stream
    torch.cuda.stream = lambda given: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda tensor, given: None
    scatter = torch.distributed.reduce_scatter_tensor  # gloo wants flat tensors
    torch.distributed._reduce_scatter_base = lambda own, every, group: scatter(own, every.view(-1), group=group)

    def streams(root):
        if root._is_root and not root._streams:
            root._reducer = ReduceScatterBucketer(root.bucket_cap_mb)
            for module in root.modules():
                if isinstance(module, FullyShardedDataParallel):
                    module._streams = dict.fromkeys(("all_gather", "post_backward"), stream)
                    module._reducer = root._reducer

    FullyShardedDataParallel._setup_streams = streams
    FullySharded.place = FullySharded.wrap


def curves(world, variants):
    """History, weights and averages of each variant; in one plain process, or fully sharded."""
    if world.group:
        pretend()
    full = {"name": "fairscale", "fairscale": "full"} if world.group else {"name": "single"}
    found = {}
    for variant in variants:
        own = dict(VARIANTS[variant])
        if not world.group:
            own.pop("recompute_by", None)
        engine = make(world, **full, **own)
        history = steps(engine, world, STEPS)
        averages = engine.weights(ema=True) if own.get("ema") else {}
        found[variant] = history, engine.weights(), averages
    found["keys"] = sorted(engine.state()), engine.aliases
    return found


def test_its_logic_gives_the_curve_of_one_process():
    expected = curves(World(), list(VARIANTS))
    for count, variants in ((2, list(VARIANTS)), (3, ["plain", "bf16"])):
        found = ranks.run(curves, count, variants)[0]
        assert found["keys"] == expected["keys"]
        for variant in variants:
            history, weights, averages = expected[variant]
            ours, our_weights, our_averages = found[variant]
            tolerance = 2e-2 if variant == "bf16" else 1e-6
            assert furthest(history, ours, "loss", "grad_norm") < tolerance, (count, variant)
            if variant != "bf16":
                for name, weight in (weights | averages).items():
                    torch.testing.assert_close((our_weights | our_averages)[name], weight, rtol=1e-5, atol=1e-6)


def switched(world, folder):
    """From another engine's checkpoint on, with a skipped step on the way; then written and read again."""
    pretend()
    engine = make(world, "fairscale", fairscale="full", ema=0.8, seed=6)
    steps(engine, world, 1)
    store = Checkpoints(folder, 3, world)
    state = engine.state()
    store.load(store.newest(), state)
    engine.load_state(state)
    plain = engine.weights()
    with engine.averaged():
        inside = engine.weights()
    bad = steps(engine, world, 1, start=3 * TOTAL, poison=(4 * TOTAL - 1,))[0]
    history = steps(engine, world, 3, start=3 * TOTAL)
    store.save(6 * TOTAL, engine.state(), {})
    again = engine.state()
    store.load(store.newest(), again)
    return plain, inside, bad["loss"], engine.skipped(), history, engine.weights(ema=True)


def test_its_logic_continues_any_checkpoint(tmp_path):
    engine = make(World(), "single", ema=0.8)
    steps(engine, World(), 3)
    Checkpoints(tmp_path, 3, World()).save(3 * TOTAL, engine.state(), {})
    weights, averages = engine.weights(), engine.weights(ema=True)
    expected = steps(engine, World(), 3, start=3 * TOTAL)
    plain, inside, bad, skipped, history, after = ranks.run(switched, 2, tmp_path)[0]
    for name, value in weights.items():
        assert torch.equal(plain[name], value), name
        assert torch.equal(inside[name], averages[name]), name
    assert bad != bad
    assert skipped == 1
    assert furthest(expected, history, "loss", "grad_norm") < 1e-6
    for name, value in engine.weights(ema=True).items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
