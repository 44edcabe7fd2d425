"""Segmentation: what the loss counts, what mean IoU is, and a run that learns which pixel is what."""

import json

import pytest
import ranks
import torch
from torchvision.io import encode_png

from halfseen import engines, optim
from halfseen.config import ConfigError, Model
from halfseen.data.pairs import NOTHING
from halfseen.data.writer import ShardWriter
from halfseen.distributed import World
from halfseen.engine_config import Engine
from halfseen.finetune.segment import Evaluations, Overlap, Prepare, Segmenter, main, named_at, slide, starts
from halfseen.finetune.segment_config import Pixels, Segment
from halfseen.models import ViT
from halfseen.recipes import load

SMALL = {"size": "ti", "width": 32, "depth": 4, "heads": 2, "patch": 8}


def make(**pixels):
    torch.manual_seed(0)
    return Segmenter(ViT(Model(**SMALL), 32), Pixels(**{"width": 16} | pixels), 3)


@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_every_pixel_is_named_and_pixels_of_no_class_do_not_count(head):
    student = make(head=head).eval()
    image, target = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    logits = student({"image": image, "task": "predict"})["logits"]
    assert logits.shape == (2, 3, 32, 32)
    target[:, 16:] = NOTHING
    scalars = student({"image": image, "target": target})
    expected = torch.nn.functional.cross_entropy(logits[:, :, :16], target[:, :16])
    torch.testing.assert_close(scalars["loss"], expected)
    hits = (logits.argmax(1) == target)[:, :16].float().mean()
    torch.testing.assert_close(scalars["accuracy"], hits)
    target[:] = NOTHING
    assert student({"image": image, "target": target})["loss"] == 0, "no NaN where nothing counts"


def test_the_pyramid_reads_four_depths_and_every_weight_has_a_gradient():
    student = make()
    assert student.read == [0, 1, 2, 3]
    batch = {"image": torch.randn(1, 3, 32, 32), "target": torch.zeros(1, 32, 32, dtype=torch.int64)}
    student(batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert not [name for name, p in make(train="head").named_parameters() if p.requires_grad and "encoder" in name]
    with pytest.raises(ConfigError, match="reads four depths"):
        Segmenter(ViT(Model(**{**SMALL, "depth": 3}), 32), Pixels(), 3)


def test_mean_iou_is_intersection_over_union_of_classes_that_are_there():
    result = Overlap(torch.tensor([[6, 2, 0], [1, 1, 0], [0, 0, 0]]))
    assert result.iou[:2].tolist() == pytest.approx([6 / 9, 1 / 4])
    assert result.iou[2].isnan()
    assert result.scalars() == {"val/mean_iou": pytest.approx((6 / 9 + 1 / 4) / 2), "val/pixel_accuracy": 0.7}


def test_masks_that_count_from_one_and_classes_beyond_the_last():
    mask = torch.tensor([0, 1, 3, NOTHING], dtype=torch.uint8).view(1, 1, 2, 2)
    batch = {"image": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "view": mask}
    base = ["data.classes=4"]
    plain = Prepare(load(Segment, None, base), torch.device("cpu"))(batch)["target"]
    assert plain.flatten().tolist() == [0, 1, 3, NOTHING]
    from_one = Prepare(load(Segment, None, [*base, "pixels.zero_is_nothing=true"]), torch.device("cpu"))
    assert from_one(batch)["target"].flatten().tolist() == [NOTHING, 0, 2, NOTHING]
    with pytest.raises(ConfigError, match=r"data\.classes=3: a mask holds 3"):
        Prepare(load(Segment, None, ["data.classes=3"]), torch.device("cpu"))(batch)


def test_windows_cover_the_picture_and_overlap_by_their_stride():
    assert starts(8, 8, 5) == [0]
    assert starts(9, 8, 5) == [0, 1]
    assert starts(18, 8, 5) == [0, 5, 10]
    assert starts(19, 8, 5) == [0, 5, 10, 11]
    assert starts(16, 8, 8) == [0, 8]


def test_scores_of_windows_are_averaged_where_they_overlap():
    """A model that says what it sees is not changed by the window; one that knows only its window is averaged."""
    image = torch.arange(3 * 8 * 19.0).view(1, 3, 8, 19)
    assert torch.equal(slide(lambda windows: windows, image, 8, 5), image)
    seen = slide(lambda windows: torch.arange(4.0)[:, None, None, None].expand(4, 2, 8, 8), image, 8, 5)
    assert seen[0, 0, 3].tolist() == [0.0] * 5 + [0.5] * 3 + [1.0] * 2 + [1.5] + [2.0] * 2 + [2.5] * 5 + [3.0]


def test_classes_are_named_at_the_masks_own_size_in_parts():
    scores = torch.randn(1, 5, 6, 7)
    whole = torch.nn.functional.interpolate(scores, (11, 13), mode="bilinear").argmax(1)
    assert all(torch.equal(named_at(scores, (11, 13), most), whole) for most in (1, 2, 5, 16))


def judged(world, shards):
    """The confusion of pixels that one rank of several finds."""
    config = load(Segment, None, [f"data.val={shards}", "data.classes=3", "data.image_size=16", "data.workers=0"])
    torch.manual_seed(0)
    student = Segmenter(ViT(Model(**SMALL), 16), Pixels(width=16), 3)
    groups = optim.groups(student, config.optim)
    engine = engines.create(Engine(device="cpu"), student, config.optim, groups, world, 0)
    return Evaluations(config, shards.parent, world).evaluate(engine).confusion


def test_pictures_of_any_shape_are_judged_once_at_full_size_on_any_number_of_ranks(tmp_path):
    """Seven masks on two ranks: one of them runs out first."""
    shapes = [(20, 30), (16, 16), (40, 24), (16, 50), (33, 17), (8, 8), (24, 25)]
    with ShardWriter(tmp_path / "pairs.tar") as shard:
        for number, shape in enumerate(shapes):
            torch.manual_seed(number)
            mask = torch.randint(0, 3, (1, *shape), dtype=torch.uint8)
            mask[0, 0, 0] = NOTHING
            members = {"png": torch.randint(0, 255, (3, *shape), dtype=torch.uint8), "seg.png": mask}
            shard.write(f"k{number}", {name: encode_png(part).numpy().tobytes() for name, part in members.items()})
    alone = judged(World(), tmp_path / "pairs.tar")
    assert alone.sum() == sum(height * width - 1 for height, width in shapes)
    assert all(torch.equal(found, alone) for found in ranks.run(judged, 2, tmp_path / "pairs.tar"))


def test_a_run_learns_what_is_where_and_can_be_resumed(tmp_path, capsys):
    with ShardWriter(tmp_path / "pairs.tar") as shard:
        for number in range(24):
            mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
            mask[:, :, 8 + number % 16 :] = 1
            mask[:, 30:] = 2
            image = torch.tensor([[200, 10, 10], [10, 200, 10], [10, 10, 200]], dtype=torch.uint8)[mask[0].long()]
            members = {"png": image.permute(2, 0, 1), "seg.png": mask}
            shard.write(f"k{number}", {name: encode_png(part).numpy().tobytes() for name, part in members.items()})
    (tmp_path / "recipe.yaml").write_text("")
    model = [f"model.{name}={value}" for name, value in SMALL.items()]
    options = [
        *(f"data.train={tmp_path / 'pairs.tar'}", f"data.val={tmp_path / 'pairs.tar'}", "data.classes=3"),
        *("data.image_size=32", "data.workers=0", "data.chunk=4", "data.window=8", "engine.device=cpu"),
        *("run.global_batch=8", "run.images=320", "run.checkpoint_every=160", "run.evaluate_every=160"),
        *("optim.lr=3e-3", "optim.warmup=16", "optim.layer_decay=1", "model.drop_path=0", "monitor.tensorboard=false"),
        *("pixels.width=16", "pixels.scale=[1.0,1.5]", f"run.folder={tmp_path / 'run'}"),
    ]
    assert main([str(tmp_path / "recipe.yaml"), *model, *options]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["position"] == 320
    assert found["val/mean_iou"] > 0.6, "chance is below 0.2"
    assert len(found["iou"]) == 3
    assert main([str(tmp_path / "run")]) == 0
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [("data.label=cls", "names no mask"), ("data.classes=300", "2 to 254"), ("augment.jitter=0.4", "only scaled")],
)
def test_refusals(option, message):
    with pytest.raises(ConfigError, match=message):
        load(Segment, None, ["data.classes=4", option])
