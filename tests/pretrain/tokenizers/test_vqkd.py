"""VQ-KD as a student: the same codebook and curve for any engine, number of ranks and split of a batch."""

import pytest
import ranks
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from halfseen import config, engine_config, engines, optim
from halfseen.data.hashing import uniform
from halfseen.distributed import World
from halfseen.models import ViT
from halfseen.pretrain.targets.features import Apart, Distance
from halfseen.pretrain.tokenizers import VQKD, VQKDConfig
from halfseen.pretrain.tokenizers.quantizer import QuantizerConfig
from halfseen.pretrain.train import begin_with

TOTAL, STEPS = 8, 3
MODEL = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "key_bias": False}
CODEBOOK = {"codes": 24, "width": 4, "start_images": 4, "revive": 2}


def build(**options):
    torch.manual_seed(0)
    cfg = VQKDConfig(24, 1, 2, QuantizerConfig(**(CODEBOOK | options)))
    return VQKD(ViT(config.Model(**MODEL), 32), cfg, Apart(Distance("cosine"), 6, 8))


def batch_at(positions):
    count = len(positions)
    image = uniform(1, positions, 3 * 32 * 32, "image").view(count, 3, 32, 32) * 4 - 2
    return {"image": image, "target": uniform(1, positions, 16 * 6, "target").view(count, 16, 6), "position": positions}


def run(world, name, accumulation, poison=None):
    """A few steps; codebook, usage and losses."""
    student = build()
    begin_with(student, lambda count: batch_at(torch.arange(count)), world)
    chosen = config.Optim(base_lr=None, lr=1e-2)
    engine = engines.create(engine_config.Engine(name=name), student, chosen, optim.groups(student, chosen), world, 5)
    losses = []
    for first in range(0, STEPS * TOTAL, TOTAL):
        own = torch.arange(first + world.rank, first + TOTAL, world.world)
        batches = [batch_at(part) for part in own.chunk(accumulation)]
        if poison == first and world.rank == 0:
            batches[0]["image"][0, 0, 0, 0] = torch.nan
        losses.append(float(engine.step(batches, 1e-2, first)["loss"]))
    state = engine.state()
    return state["buffer.quantizer.codebook"].clone(), state["buffer.quantizer.usage"].clone(), losses


@pytest.mark.parametrize(("name", "world"), [("single", 1), ("fsdp", 2)])
def test_codebook_and_losses_are_those_of_one_process_with_the_whole_batch(name, world):
    expected = run(World(), "single", 1)
    found = [run(World(), "single", 4)] if world == 1 else ranks.run(run, world, name, 2)
    for codebook, usage, losses in found:
        torch.testing.assert_close(codebook, expected[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(usage, expected[1], rtol=1e-5, atol=1e-5)
        assert losses == pytest.approx(expected[2], rel=1e-5)
        assert torch.equal(codebook, found[0][0])  # not only close: the very same on all ranks


def test_a_step_that_is_skipped_moves_no_code():
    # The first step is skipped: what is left are the codes that k-means made, moved by two steps.
    codebook, usage, losses = run(World(), "single", 2, poison=0)
    assert losses[0] != losses[0]
    assert codebook.isfinite().all()
    assert usage.isfinite().all()
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(24))


def test_the_first_codebook_is_k_means_of_the_first_images():
    student, other = build(), build()
    begin_with(student, lambda count: batch_at(torch.arange(count)), World())
    other.begin(batch_at(torch.arange(4)))
    assert torch.equal(student.quantizer.codebook, other.quantizer.codebook)
    plain = build(start_images=0)
    before = plain.quantizer.codebook.clone()
    begin_with(plain, lambda count: pytest.fail("needs no data"), World())
    assert torch.equal(plain.quantizer.codebook, before)


def test_a_codebook_that_came_with_the_weights_is_kept():
    student = build()
    student.load_state_dict(build().state_dict() | {"quantizer.usage": torch.rand(24) + 1.5})
    before = student.quantizer.codebook.clone()
    begin_with(student, lambda count: pytest.fail("needs no data"), World())
    assert torch.equal(student.quantizer.codebook, before)


def test_loss_is_reconstruction_and_commitment_over_all_patches():
    student = build().eval()
    batch = batch_at(torch.arange(2))
    scalars, predicted = student(batch), student(batch | {"task": "predict"})
    distance = 1 - F.cosine_similarity(predicted["prediction"], batch["target"], dim=-1)
    torch.testing.assert_close(scalars["reconstruction"], distance.mean())
    torch.testing.assert_close(scalars["loss"], scalars["reconstruction"] + scalars["commitment"])
    assert torch.equal(predicted["codes"], student.codes(batch["image"]))
    assert predicted["codes"].shape == (2, 16)


def test_a_step_never_waits_for_the_device():
    # A fake tensor has no numbers: whatever needs one on the host raises.
    student, batch = build(), batch_at(torch.arange(2))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        student({name: mode.from_tensor(value) for name, value in batch.items()})["loss"].backward()
        student.stepped(torch.zeros(()))


def test_gradients_reach_everything_but_the_codebook():
    student = build()
    student(batch_at(torch.arange(2)))["loss"].backward()
    idle = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert idle == []
    assert "quantizer.codebook" not in dict(student.named_parameters())


def test_codebook_and_its_use_travel_with_the_state():
    chosen = config.Optim(base_lr=None, lr=1e-2)

    def fresh():
        student = build(start_images=0)
        return engines.create(
            engine_config.Engine(name="single"), student, chosen, optim.groups(student, chosen), World(), 5
        )

    first, second = fresh(), fresh()
    for position in (0, TOTAL):
        first.step([batch_at(torch.arange(position, position + TOTAL))], 1e-2, position)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    batch = batch_at(torch.arange(2 * TOTAL, 3 * TOTAL))
    losses = [float(engine.step([batch], 1e-2, 2 * TOTAL)["loss"]) for engine in (first, second)]
    assert losses[0] == losses[1]
    assert torch.equal(first.state()["buffer.quantizer.codebook"], second.state()["buffer.quantizer.codebook"])
