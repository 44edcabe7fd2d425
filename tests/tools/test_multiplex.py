"""Multiplexing a trained trunk: what is shared, what is kept, what is said about the loss."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfseen import weights
from halfseen.classification import Classifier, Task
from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.swin import Swin, SwinConfig
from halfseen.tools import multiplex

SIZES = {"width": 16, "depth": 4, "heads": 2, "patch": 8}
POOL = Task(pool="norm_mean")


def student(seed=0, **options):
    torch.manual_seed(seed)
    made = Classifier(ViT(Model(**(SIZES | options)), 16), POOL, 5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.3)
    return made.eval()


def answer(model):
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model({"image": image, "task": "predict"})["logits"]


def test_equal_blocks_lose_nothing_and_keep_their_own_norms():
    """A teacher whose pairs of blocks are equal but for their norms is the shared student, exactly."""
    teacher = student(layer_scale=0.5)
    state = teacher.state_dict()
    for name in list(state):
        for pair in (0, 2):
            if f"blocks.{pair}.attn" in name or f"blocks.{pair}.mlp" in name:
                state[name.replace(f"blocks.{pair}", f"blocks.{pair + 1}")] = state[name].clone()
    teacher.load_state_dict(state)
    made, misfits = multiplex.multiplex(state, [[2, 2]])
    shared = student(1, share=2, layer_scale=0.5)
    report = weights.initialise(shared, made, coverage=1.0)
    assert report.covered == 1.0
    torch.testing.assert_close(answer(shared), answer(teacher))
    assert all(max(misfit.distances) < 1e-6 for misfit in misfits)


@pytest.mark.parametrize(("choose", "expected"), [("average", 0.5), ("first", 0), ("1", 1)])
def test_the_rule_decides_what_stands_for_the_group(choose, expected):
    state = student().state_dict()
    made, misfits = multiplex.multiplex(state, [[2, 2]], choose)
    one, other = (state[f"encoder.blocks.{block}.mlp.fc1.weight"] for block in (2, 3))
    torch.testing.assert_close(made["encoder.blocks.1.mlp.fc1.weight"], one + expected * (other - one))
    found = next(misfit for misfit in misfits if misfit.name == "encoder.blocks.1.mlp.fc1.weight")
    apart = (one - other).norm().item()
    distances = [expected * apart / one.norm().item(), (1 - expected) * apart / other.norm().item()]
    assert found.distances == pytest.approx(distances, rel=1e-5)
    assert len(made) < len(state)


def test_identity_maps_let_a_student_with_mixed_heads_start_where_one_without_does():
    made, _ = multiplex.multiplex(student().state_dict(), [[2, 2]])
    plain, mixing = student(1, share=2), student(1, share=2, head_mixing="linear")
    weights.initialise(plain, made, coverage=1.0)
    weights.initialise(mixing, made | multiplex.identity_maps(made, [2], [[2, 2]]), coverage=1.0)
    torch.testing.assert_close(answer(mixing), answer(plain))


def test_a_hierarchical_trunk_has_a_group_size_per_stage():
    sizes = {"width": 8, "depths": [2, 4], "heads": [1, 2], "window": 4}
    teacher = Classifier(Swin(SwinConfig(**sizes), 32), POOL, 5)
    made, misfits = multiplex.multiplex(teacher.state_dict(), [[1, 1], [4]], "first")
    shared = Classifier(Swin(SwinConfig(**sizes, share=[1, 4]), 32), POOL, 5)
    shared.load_state_dict(made)
    assert {misfit.name.split(".")[2] for misfit in misfits} == {"1"}
    assert len(misfits[0].distances) == 4


def test_groups_of_several_sizes_keep_some_blocks_as_they_are():
    state = student(layer_scale=0.5).state_dict()
    groups = multiplex.groups_of(state, (), [1, 2, 1])
    made, misfits = multiplex.multiplex(state, groups, "first")
    shared = student(1, groups=[1, 2, 1], layer_scale=0.5)
    assert weights.initialise(shared, made, coverage=1.0).covered == 1.0
    assert {misfit.name.split(".")[2] for misfit in misfits} == {"1"}
    for ours, theirs in ((0, 0), (2, 3)):
        for part in ("attn.qkv.weight", "norm1.weight"):
            assert torch.equal(made[f"encoder.blocks.{ours}.{part}"], state[f"encoder.blocks.{theirs}.{part}"])
    mixing = student(1, groups=[1, 2, 1], layer_scale=0.5, head_mixing="linear")
    weights.initialise(mixing, made | multiplex.identity_maps(made, [2], groups), coverage=1.0)
    torch.testing.assert_close(answer(mixing), answer(shared))
    with pytest.raises(ConfigError, match="every group"):
        multiplex.groups_of(state, (), [1, 2])


@pytest.mark.parametrize(
    ("share", "choose", "words"),
    [
        ([3], "average", "does not divide 4"),
        ([2, 2], "average", "1 stages"),
        ([2], "2", "no rule"),
        ([2], "best", "no rule"),
    ],
)
def test_groups_that_do_not_come_out_even_are_refused(share, choose, words):
    state = student().state_dict()
    with pytest.raises(ConfigError, match=words):
        multiplex.multiplex(state, multiplex.groups_of(state, share), choose)


def test_a_trunk_that_shares_already_is_refused():
    with pytest.raises(ConfigError, match="already"):
        multiplex.groups_of(student(share=2).state_dict(), [2])


def test_the_command_writes_what_a_student_starts_from(tmp_path, capsys):
    state = student().state_dict()
    plain = {name.removeprefix("encoder."): value for name, value in state.items()}  # as timm has it
    save_file(plain, tmp_path / "teacher.safetensors")
    arguments = [str(tmp_path / "teacher.safetensors"), str(tmp_path / "out.safetensors"), "--share", "2"]
    assert multiplex.main([*arguments, "--identity-maps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "encoder.blocks.1.attn.qkv.weight" in printed
    assert "parameters" in printed
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["encoder.blocks.1.norm1.1.weight"], state["encoder.blocks.3.norm1.weight"])
    assert torch.equal(found["encoder.blocks.0.attn.proj_w.1.weight"], torch.eye(2))
    with pytest.raises(ConfigError, match="exists"):
        multiplex.main(arguments)
    with pytest.raises(ConfigError, match="whole numbers"):
        multiplex.main([arguments[0], str(tmp_path / "other.safetensors"), "--share", "two"])
