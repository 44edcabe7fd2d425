"""What weights say of their model, and how a run that starts from them takes its trunk from there."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import halfseen
from halfseen import delta, opening, origin
from halfseen.config import ConfigError, Model
from halfseen.finetune.config import Finetune
from halfseen.finetune.segment_config import Segment
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import find_recipe, load, recipe_root, to_yaml
from halfseen.tools.architecture import Architecture

TRUNK = {"size": "ti", "width": 32, "depth": 2, "heads": 4, "patch": 8, "stem": "hmlp", "position": "sincos"}
LABELS = ["data.label=folder", "data.classes=12", "data.train=embedded:emoji/train"]
DROPS = {"drop_path": 0.3, "attention_dropout": 0.05}
SAID = {"stage": "pretrain", "model": TRUNK | DROPS, "augment": {"mean": [0.5] * 3, "std": [0.5] * 3}}


@pytest.fixture
def run(tmp_path):
    """A pretraining run's folder, with its config alone."""
    folder = tmp_path / "pre"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load(Pretrain, None, (), [SAID])))
    return folder


def opened(tmp_path, init, *overrides, recipe="", schema=Finetune):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    given = [str(path), *LABELS, f"run.init={init}", f"run.folder={tmp_path / 'fine'}", *overrides]
    return opening.open_run(schema, given).config


def test_options_that_nobody_states_are_those_of_the_weights(tmp_path, run):
    config = opened(tmp_path, run)
    assert {name: getattr(config.model, name) for name in TRUNK} == TRUNK
    assert (config.model.drop_path, config.model.attention_dropout) == (0.1, 0.0), "dropping is a training's own"
    assert (config.augment.mean, config.augment.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert config.data.image_size == 224


def test_what_is_stated_counts_where_the_weights_can_be_made_to_fit(tmp_path, run):
    config = opened(tmp_path, run, "model.position=learned", "model.registers=2", recipe="augment: {mean: [0, 0, 0]}")
    assert (config.model.position, config.model.registers, config.model.stem) == ("learned", 2, "hmlp")
    assert config.augment.mean == (0.0, 0.0, 0.0)
    assert config.augment.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.stem=patch", r"model\.stem='patch': run\.init is .*pre, whose trunk has stem 'hmlp'\n  fix: leave"),
        ("model.heads=2", r"model\.heads=2: .* has heads 4"),
        ("model.norm_place=post", r"model\.norm_place='post': .*'pre'"),
        ("model.size=b", r"model\.size='b': .* has width 32, not 768"),
        ("model.size=ti", r"model\.size='ti': .* has width 32, not 192"),
        ("model.position=none", r"model\.position='none': .*'sincos'"),
        ("trunk=swin", r"trunk='swin': the trunk of .* is of the kind vit"),
        ("swin.size=b", r"swin\.size='b': the trunk of .* is of the kind vit"),
    ],
)
def test_a_stated_trunk_that_is_another_one_is_refused(tmp_path, run, override, message):
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, run, override)


def test_the_refusal_can_be_switched_off_and_the_rest_is_still_taken_over(tmp_path, run):
    config = opened(tmp_path, run, "model.depth=1", "run.init_coverage=0")
    assert (config.model.depth, config.model.width, config.model.stem) == (1, 32, "hmlp")


def test_dimensions_may_be_stated_as_a_size_that_means_the_same(tmp_path):
    said = SAID | {"model": {"size": "b", "width": 192, "depth": 12, "heads": 3, "patch": 16, "mlp_ratio": 4.0}}
    (tmp_path / "pre").mkdir()
    (tmp_path / "pre" / "config.yaml").write_text(to_yaml(load(Pretrain, None, (), [said])))
    assert opened(tmp_path, tmp_path / "pre", "model.size=ti").model == Model(
        size="ti", position="sincos", drop_path=0.1
    )
    with pytest.raises(ConfigError, match=r"model\.size='s': .* has width 192, not 384"):
        opened(tmp_path, tmp_path / "pre", "model.size=s")


def test_a_run_goes_on_with_its_own_trunk_wherever_the_first_weights_are_now(tmp_path, run):
    first = opened(tmp_path, run)
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine" / "config.yaml").write_text(to_yaml(first))
    (run / "config.yaml").unlink()
    run.rmdir()
    assert opened(tmp_path, run) == first
    with pytest.raises(ConfigError, match=r"model\.depth=4: the run in .* has 2"):
        opened(tmp_path, run, "model.depth=4")


def test_every_stage_with_a_trunk_takes_it_over(tmp_path, run):
    assert opened(tmp_path, run, "data.label=seg.png", schema=Segment).model.stem == "hmlp"


def test_a_trunk_of_another_kind_is_taken_over_with_its_section(tmp_path, run):
    said = {"stage": "pretrain", "trunk": "swin", "swin": {"depths": [1, 1], "heads": [2, 4], "drop_path": 0.5}}
    (run / "config.yaml").write_text(json.dumps(said))
    config = opened(tmp_path, run, "task.pool=norm_mean")
    assert (config.trunk, config.swin.depths, config.swin.drop_path) == ("swin", [1, 1], 0.0)
    with pytest.raises(ConfigError, match=r"model\.depth=2: the trunk of .* is of the kind swin"):
        opened(tmp_path, run, "model.depth=2", "task.pool=norm_mean")
    with pytest.raises(ConfigError, match="trunk"):
        opened(tmp_path, run, "data.label=seg.png", schema=Segment)


# ------------------------------------------------------------------------------------------------ files


def test_files_of_export_convert_and_delta_say_what_they_are(tmp_path):
    weights = {"encoder.cls_token": torch.zeros(1, 1, 32)}
    config = to_yaml(load(Pretrain, None, (), [SAID]))
    save_file(weights, tmp_path / "exported.safetensors", {"config": config})
    model = Model(**TRUNK)
    told = Architecture(model, 48, "the run's config", "pretrain", {"mean": [0.5] * 3, "std": [0.5] * 3}).described()
    save_file(weights, tmp_path / "converted.safetensors", told)
    torch.save({"model": weights, "halfseen": told}, tmp_path / "converted.pth")
    delta.write(tmp_path / "delta.safetensors", weights, delta.Header(config=config))
    for name in ("exported.safetensors", "converted.safetensors", "converted.pth", "delta.safetensors"):
        said = origin.of(tmp_path / name).said
        assert {key: said["model"][key] for key in TRUNK} == TRUNK, name
        assert said["augment"]["mean"] == [0.5] * 3
    for name in ("exported.safetensors", "converted.safetensors", "converted.pth"):
        assert opened(tmp_path, tmp_path / name).model.stem == "hmlp"


def test_a_file_that_says_nothing_leaves_the_recipe_as_it_is(tmp_path):
    save_file({"encoder.cls_token": torch.zeros(1, 1, 32)}, tmp_path / "plain.safetensors")
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        assert origin.of(tmp_path / name) is None
        assert opened(tmp_path, tmp_path / name).model == Model(drop_path=0.1)
    with pytest.raises(ConfigError, match="does not say what its trunk is"):
        halfseen.load(tmp_path / "plain.pth")


def test_a_file_in_a_run_folder_is_described_by_the_run(run):
    save_file({"encoder.cls_token": torch.zeros(1, 1, 32)}, run / "best.safetensors")
    assert origin.of(run / "best.safetensors").said["model"]["stem"] == "hmlp"


def test_a_run_in_stages_stands_for_its_last_one(tmp_path, run):
    (run / "1_a" / "checkpoints" / "img_000000000008").mkdir(parents=True)
    (run / "10_c").mkdir()
    for number, stem in ((1, "patch"), (2, "conv")):
        folder = next(run.glob(f"{number}_*"), run / f"{number}_b")
        (folder / "checkpoints" / "img_000000000008").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(f"model: {{stem: {stem}}}")
    found = origin.of(run)
    assert (found.weights, found.said["model"]["stem"]) == (run / "2_b", "conv")
    inside = run / "1_a" / "checkpoints" / "img_000000000008"
    assert origin.of(inside).said["model"]["stem"] == "patch"


@pytest.mark.parametrize("name", ["none", "empty", "junk.safetensors", "junk.pth", "junk.txt"])
def test_what_says_nothing_where_something_must_be_said_is_refused_by_name(tmp_path, name):
    (tmp_path / "empty").mkdir()
    for junk in ("junk.safetensors", "junk.pth", "junk.txt"):
        (tmp_path / junk).write_text("junk")
    with pytest.raises(ConfigError, match=name):
        origin.require("run", tmp_path / name)


# ------------------------------------------------------------------------------------------------ recipes


def pairs():
    """Recipes whose command names a run of another bundled recipe, with that recipe."""
    for path in sorted(recipe_root().rglob("*.yaml")):
        start = re.search(r"run\.init=runs/([\w]+)", "\n".join(re.findall(r"^#.*$", path.read_text(), re.M)))
        if start and path.parent.name in ("finetune", "segment"):
            for before in ("pretrain", "distill", "finetune"):
                if (recipe_root() / before / f"{start[1]}.yaml").is_file():
                    yield f"{before}/{start[1]}", f"{path.parent.name}/{path.stem}"
                    break


@pytest.mark.parametrize(("before", "after"), pairs())
def test_a_recipe_fits_the_run_that_its_command_starts_from(tmp_path, before, after):
    from halfseen.pretrain.distill.config import Distill

    schema = {"pretrain": Pretrain, "distill": Distill, "finetune": Finetune}[before.partition("/")[0]]
    (tmp_path / "config.yaml").write_text(to_yaml(load(schema, before)))
    target = Segment if after.startswith("segment") else Finetune
    given = [f"run.init={tmp_path}", f"run.folder={tmp_path / 'fine'}"]
    config = opening.open_run(target, [after, *given]).config
    assert config == load(target, find_recipe(after), given), "nothing in the recipe was left to be taken over"
