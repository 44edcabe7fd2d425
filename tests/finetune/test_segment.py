"""Segmentation: what the loss counts, what mean IoU is, and a run that learns which pixel is what."""

import json

import pytest
import torch
from torchvision.io import encode_png

from halfseen.config import ConfigError, Model, load
from halfseen.data.pairs import NOTHING
from halfseen.data.writer import ShardWriter
from halfseen.finetune.segment import Overlap, Prepare, Segmenter, main
from halfseen.finetune.segment_config import Pixels, Segment
from halfseen.models import ViT

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
