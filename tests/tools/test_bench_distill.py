"""The distillation benchmark: its figures are of what it says, and follow from the sizes."""

import json

import pytest

from halfseen.tools import bench, bench_distill

OPTIONS = [
    *("model.width=32", "model.depth=6", "model.heads=2", "model.patch=16", "engine.device=cpu"),
    *("model.distillation_token=false", "task.pool=class", "data.train=embedded:emoji/train", "data.label=folder"),
    *("data.classes=12", "data.image_size=32", "teacher.source=timm:test_vit", "teacher.weights=random"),
    *("teacher.classes=12", "teacher.precision=fp32", "distillation.attention=1", "distillation.student_layers=[5]"),
    "distillation.teacher_layers=[5]",
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    (folder / "recipe.yaml").write_text("")
    arguments = ["distill", str(folder / "recipe.yaml"), *OPTIONS, "--batch=4", "--repeats=1", "--share=1,2,4"]
    assert bench.main([*arguments, f"--json={folder / 'figures.json'}"]) == 0
    return json.loads((folder / "figures.json").read_text())


def test_every_kind_is_timed_and_groups_that_do_not_divide_the_depth_are_left_out(figures):
    assert set(figures["seconds"]) == {"teacher", "store", "student s=1", "student s=2"}
    assert all(value > 0 for value in figures["seconds"].values())


def test_shared_weights_halve_what_the_blocks_weigh_but_for_their_norms(figures):
    one, two = (figures["students"][f"student s={share}"] for share in (1, 2))
    norms = 6 * 2 * 2 * 32
    assert two["block_parameters"] == (one["block_parameters"] - norms) / 2 + norms
    assert one["moments_bytes"] == 8 * one["parameters"]
    assert one["sharded_bytes"] == 12 * one["parameters"]


def test_each_term_has_a_gradient_of_its_own(figures):
    found = figures["students"]["student s=2"]["gradients"]
    assert set(found) == {"labels", "scores", "attention"}
    assert all(value > 0 for value in found.values())


def test_the_table_says_what_the_figures_say(figures):
    text = bench_distill.table(figures)
    assert f"{figures['students']['student s=2']['parameters']:,}" in text
    assert "gradient norm" in text
