"""Feature targets: what the teacher says, brought to the student's grid, whitened, compared."""

import pytest
import timm
import torch
from torch.nn import functional as F

from halfseen import teachers
from halfseen.config import Augment, ConfigError, Model
from halfseen.models import ViT
from halfseen.pretrain.feature_distillation import FDConfig, FeatureDistillation
from halfseen.pretrain.targets.features import Distance, Features, FeaturesConfig, mean_of, resized, whitened

IMAGENET = Augment()
MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small random teacher's weights in a file, so that two loads are the same network."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, img_size=64).state_dict(), path)
    return str(path)


def features(weights, grid=(4, 4), image_size=64, prefix=0, **options):
    teacher = teachers.TeacherConfig(source=f"timm:{MODEL}", weights=weights, precision="fp32", image_size=64)
    cfg = FeaturesConfig(teacher=teacher, **options)
    loaded = teachers.load(
        teacher,
        student=(IMAGENET.mean, IMAGENET.std),
        image_size=64,
        device=torch.device("cpu"),
        key="target.features.teacher",
    )
    return Features(loaded, cfg, grid, image_size // grid[0], torch.zeros(1, 3, image_size, image_size), prefix)


def network(weights):
    model = timm.create_model(MODEL, img_size=64)
    model.load_state_dict(torch.load(weights))
    return model.eval()


def renormalised(image):
    """What the teacher sees: timm's tiny ViT was trained with mean and deviation 0.5."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    return (image * std + mean - 0.5) / 0.5


@torch.no_grad()
def test_the_answer_is_the_teachers_patch_tokens_after_its_norm(weights):
    image = torch.randn(2, 3, 64, 64)
    target = features(weights)
    answer = target({"image": image})
    expected = network(weights).forward_features(renormalised(image))
    assert target.width == 192
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, expected[:, 1:], rtol=1e-4, atol=1e-4)
    with_class = features(weights, prefix=1, whiten=True)({"image": image})
    torch.testing.assert_close(with_class, F.layer_norm(expected, (192,)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_are_averaged_without_the_last_norm(weights):
    image = torch.randn(1, 3, 64, 64)
    answer = features(weights, layers=[3, 11])({"image": image})
    model, states = network(weights), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: states.append(output))
    model.forward_features(renormalised(image))
    torch.testing.assert_close(answer, (states[3] + states[11])[:, 1:] / 2, rtol=1e-4, atol=1e-4)


def test_another_grid_is_refused_with_advice_or_resampled(weights):
    with pytest.raises(ConfigError, match="sees 4 x 4 patches of 64 pixels, the student 8 x 8") as refused:
        features(weights, grid=(8, 8))
    assert "image_size=128" in refused.value.fix
    assert "target.features.resize=true" in refused.value.fix
    assert features(weights, grid=(8, 8), resize=True)({"image": torch.randn(1, 3, 64, 64)}).shape == (1, 64, 192)
    assert features(weights, grid=(2, 2), resize=True)({"image": torch.randn(1, 3, 64, 64)}).shape == (1, 4, 192)


def test_resampling_keeps_what_is_linear_over_the_grid_and_averages_where_it_coarsens():
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert torch.equal(resized(tokens, (4, 4), (4, 4)), tokens)
    finer = resized(tokens, (4, 4), (8, 8)).view(8, 8)
    torch.testing.assert_close(finer[2:-2, 2:-2].diff(dim=1), torch.full((4, 3), 0.5))
    assert resized(torch.randn(1, 256, 1), (16, 16), (2, 2)).abs().max() < 0.5  # noise averages out


def test_whitened_tokens_have_mean_zero_and_variance_one():
    tokens = whitened(torch.randn(2, 5, 64) * 3 + 7)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 5), rtol=0, atol=1e-4)
    layers = [torch.randn(2, 3, 8) for _ in range(3)]
    torch.testing.assert_close(mean_of(layers), sum(layers) / 3)
    torch.testing.assert_close(mean_of(layers, each=True), sum(whitened(layer) for layer in layers) / 3)


def test_distances_are_the_published_ones():
    prediction, target = torch.randn(4, 6, 8, dtype=torch.float64), 3 * torch.randn(4, 6, 8, dtype=torch.float64)
    cosine = (prediction * target).sum(-1) / prediction.norm(dim=-1) / target.norm(dim=-1)
    apart = (prediction - target).abs()
    torch.testing.assert_close(Distance("cosine")(prediction, target), 1 - cosine)
    torch.testing.assert_close(Distance("mse")(prediction, target), apart.square().mean(-1))
    expected = torch.where(apart < 2, apart.square() / 4, apart - 1).mean(-1)
    torch.testing.assert_close(Distance("smooth_l1", beta=2.0)(prediction, target), expected)


def test_curves_show_a_collapse(weights):
    target = features(weights)
    answer = target({"image": torch.randn(2, 3, 64, 64)})
    sound = target.loss(answer, answer)
    assert sound["loss"].abs() < 1e-5
    torch.testing.assert_close(sound["cosine"], torch.tensor(1.0))
    assert sound["prediction_variance"] == sound["target_variance"] > 0
    collapsed = target.loss(answer[:1, :1].expand_as(answer), answer)
    assert collapsed["prediction_variance"] < 1e-6 * sound["prediction_variance"]


def test_weights_of_patches_count(weights):
    target = features(weights)
    prediction, answer = torch.randn(2, 3, 192), torch.randn(2, 3, 192)
    weight = torch.zeros(2, 3)
    weight[0, 1] = 1.0
    alone = target.loss(prediction[:1, 1:2], answer[:1, 1:2])
    torch.testing.assert_close(target.loss(prediction, answer, weight)["loss"], alone["loss"])


def test_feature_distillation_compares_every_token_and_the_class_token(weights):
    torch.manual_seed(0)
    for class_token in (True, False):
        target = features(weights, prefix=int(class_token), whiten=True, loss="smooth_l1")
        trunk = ViT(Model(width=32, depth=2, heads=2, patch=16, registers=1), 64)
        student = FeatureDistillation(trunk, FDConfig(class_token=class_token), target)
        batch = {"image": torch.randn(2, 3, 64, 64), "mask": torch.zeros(2, 16, dtype=torch.bool)}
        batch["target"] = target(batch)
        tokens = trunk(batch["image"])
        compared = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1) if class_token else tokens[:, 2:]
        expected = F.smooth_l1_loss(student.head(compared), batch["target"], beta=2.0)
        torch.testing.assert_close(student(batch)["loss"], expected)
        prediction = student(batch | {"task": "predict"})["prediction"]
        assert prediction.shape == (2, 16, 192)
        assert target.picture(batch, prediction, IMAGENET).shape == (3, 2 * 68 + 4, 3 * 68 + 4)


def test_a_class_token_that_is_not_there_is_refused(weights):
    trunk, target = ViT(Model(width=32, depth=2, heads=2, patch=16, class_token=False), 64), features(weights, prefix=1)
    with pytest.raises(ConfigError, match=r"objective\.fd\.class_token"):
        FeatureDistillation(trunk, FDConfig(), target)


def test_clips_projection_goes_on_every_token():
    torch.manual_seed(0)
    teacher = teachers.load(
        teachers.TeacherConfig("timm:test_vit", "random", precision="fp32"),
        student=((0.5,) * 3, (0.5,) * 3),
        image_size=64,
        device=torch.device("cpu"),
    )
    image = torch.randn(2, 3, 64, 64)
    plain, projected = (
        Features(teacher, FeaturesConfig(project=project), (4, 4), 16, image[:1]) for project in (False, True)
    )
    expected = teacher.module.head(plain({"image": image}))
    torch.testing.assert_close(projected({"image": image}), expected)
    assert projected.width == teacher.module.head.out_features
    assert not projected({"image": image}).requires_grad
    teacher.module.head = torch.nn.Identity()
    with pytest.raises(ConfigError, match="no linear map"):
        Features(teacher, FeaturesConfig(project=True), (4, 4), 16, image[:1])
    with pytest.raises(ConfigError, match="last block"):
        FeaturesConfig(project=True, layers=[1]).check("target.features")
