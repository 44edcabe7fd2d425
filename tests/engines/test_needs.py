"""What an engine is said to need is what it holds."""

import pytest
import ranks
from toys import NAMED, make

from halfseen.engine_config import Engine
from halfseen.engines.needs import WORD, checkpoint, memory
from halfseen.engines.parts import local_part


def held(world, names):
    """Of each engine: bytes of weights, masters, moments and averages on this rank, each piece of memory once."""
    found = {}
    for name in names:
        engine = make(world, name, ema=0.5, student={"frozen": True})
        weights = [getattr(p, "ds_tensor", p) for p in engine.parameters.values()]
        inner = getattr(engine.optimizer, "optim", engine.optimizer)  # OSS holds another one
        moments = [value for slots in inner.state.values() for value in slots.values() if value.ndim]
        tensors = [*weights, *engine.masters().values(), *moments, *engine.average.values()]
        storages = {(s := local_part(tensor).untyped_storage()).data_ptr(): s.nbytes() for tensor in tensors}
        shapes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.parameters.values()]
        state = sum(v.numel() * v.element_size() for v in engine.state().values() if v.ndim > 0)
        every, trained = sum(n for n, _ in shapes), sum(n for n, trains in shapes if trains)
        found[name] = sum(storages.values()), every, trained, state
    return found


@pytest.mark.parametrize("names", [("ddp", "fsdp", "oss"), ("zero0", "zero1", "zero2", "zero3")])
def test_memory_is_that_of_the_tensors(names):
    found = ranks.run(held, 2, names)
    for name in names:
        _, every, trained, state = found[0][name]
        cfg = Engine(**(NAMED.get(name, {"name": name}) | {"ema": 0.5}))
        gradients = WORD * trained // (2 if name in ("fsdp", "zero2", "zero3") else 1)
        mean = sum(rank[name][0] for rank in found) / 2  # OSS deals out whole weights, unevenly
        assert mean == pytest.approx(memory(cfg, every, trained, 2) - gradients, rel=0.08), name
        assert checkpoint(cfg, every, trained) == pytest.approx(state, rel=0.03), name
