"""``halfseen reconstruct``: a picture from a run folder's config and weights."""

import pytest
import torch
from torchvision.io import encode_png, read_image

from halfseen.config import ConfigError
from halfseen.data.writer import ShardWriter
from halfseen.pretrain import objectives, targets
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load, to_yaml
from halfseen.tools import reconstruct

TINY = [
    "model.width=32",
    "model.depth=1",
    "model.heads=2",
    "data.image_size=32",
    "data.train=embedded:emoji/train",
    "data.val=embedded:emoji/val",
    "data.label=none",
    "objective.mae.decoder_width=16",
    "objective.mae.decoder_depth=1",
    "objective.mae.decoder_heads=2",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose weights are random."""
    config = load(Pretrain, None, TINY)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(0)
    weights = objectives.create(config, targets.create(config, torch.device("cpu"))).state_dict()
    monkeypatch.setattr(reconstruct, "read_weights", lambda path: weights)
    return tmp_path


def test_one_row_of_three_pictures_per_image(run, capsys):
    assert reconstruct.main([str(run), "--count", "3"]) == 0
    picture = read_image(str(run / "reconstruction.png"))
    assert picture.shape == (3, 3 * 36 + 4, 3 * 36 + 4)
    assert "reconstruction.png" in capsys.readouterr().out


def test_masks_are_those_of_training_and_the_picture_is_repeatable(run, tmp_path):
    for name in ("a.png", "b.png"):
        reconstruct.main([str(run), "--count", "2", "--out", str(tmp_path / name)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        reconstruct.main([str(tmp_path)])


def test_a_run_of_another_stage_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("stage: finetune\n")
    with pytest.raises(ConfigError, match="stage finetune"):
        reconstruct.main([str(tmp_path)])


def test_a_count_of_nothing_is_refused(run):
    with pytest.raises(ConfigError, match="--count"):
        reconstruct.main([str(run), "--count", "0"])


ROW = 36  # a 32-pixel picture and its margin


def tar(path, images):
    """A shard of as many pictures, every second one of which is damaged, without labels."""
    with ShardWriter(path) as shard:
        for number in range(2 * images):
            pixels = torch.full((3, 40, 40), number * 10, dtype=torch.uint8)
            content = encode_png(pixels).numpy().tobytes()
            shard.write(f"k{number}", {"png": content if number % 2 else content[:20]})


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (8, 8), (9, 9), (20, 9)])
def test_exactly_as_many_images_as_asked_for_are_drawn(run, tmp_path, count, rows):
    tar(tmp_path / "nine.tar", 9)
    out = tmp_path / "missing" / "folder" / "x.png"
    flags = ["--count", str(count), f"data.val={tmp_path / 'nine.tar'}", "--out", str(out)]
    assert reconstruct.main([str(run), *flags]) == 0
    assert read_image(str(out)).shape == (3, rows * ROW + 4, 3 * ROW + 4)


def test_training_images_are_drawn_where_the_evaluation_set_is_gone(run, tmp_path, capsys):
    for name, options in (("unset", ["data.val=null"]), ("gone", [f"data.val={tmp_path / 'gone'}"])):
        config = load(Pretrain, None, [*TINY, *options, "data.label=cls", "data.classes=15"])
        (run / "config.yaml").write_text(to_yaml(config))
        assert reconstruct.main([str(run), "--count", "2", "--out", str(tmp_path / f"{name}.png")]) == 0
    assert "drawing training images" in capsys.readouterr().out
    assert (tmp_path / "unset.png").read_bytes() == (tmp_path / "gone.png").read_bytes()
    with pytest.raises(ConfigError, match=r"data\.val"):
        reconstruct.main([str(run), f"data.val={tmp_path / 'gone'}"])


def test_labels_are_not_needed(run, tmp_path):
    tar(tmp_path / "two.tar", 2)
    config = load(Pretrain, None, [*TINY, "data.label=cls", "data.classes=15"])
    (run / "config.yaml").write_text(to_yaml(config))
    assert reconstruct.main([str(run), f"data.val={tmp_path / 'two.tar'}"]) == 0
    assert read_image(str(run / "reconstruction.png")).shape[1] == 2 * ROW + 4
