"""A queued run is the run that torchrun makes, under every engine."""

import drill
import pytest
import torch
from drill import SHORT, THERE, ended, halfseen, losses, resources, torchrun

from halfseen.checkpoint import read_weights

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


@pytest.mark.long
def test_final_weights_are_those_of_torchrun_under_every_engine(tmp_path):
    """The three run at once on the same nodes: ports and folders do not meet."""
    made = {}
    for engine in ("ddp", "fsdp", "deepspeed"):
        file = resources(tmp_path / engine, **THERE)
        run = tmp_path / engine / "run"
        halfseen("launch", "pretrain", *SHORT, f"engine.name={engine}", f"run.folder={run}", "--launch", file)
        made[engine] = (run, tmp_path / engine / "torchrun")
    for engine, (ours, theirs) in made.items():
        drill.finish(torchrun(theirs, *SHORT, engine=engine))
        ended(ours, "complete")
        assert losses(ours) == losses(theirs), engine
        expected = read_weights(theirs)
        found = read_weights(ours)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), (engine, name)
        drill.nothing_left(ours)
