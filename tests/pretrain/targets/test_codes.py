"""Code targets: what a tokenizer is shown, what is compared, what is drawn, what does not fit."""

import pytest
import torch
from torch.nn import functional as F

from halfseen.config import Augment, ConfigError
from halfseen.pretrain.targets.codes import Codes, CodesConfig, cross_entropy
from halfseen.pretrain.tokenizers import Tokenizer

CPU = torch.device("cpu")


class Brightness(torch.nn.Module):
    """A tokenizer one can compute by hand: the brightness of a patch's first pixel, in tenths of 0 .. 1."""

    def __init__(self, patch):
        super().__init__()
        self.patch = patch

    def codes(self, image):
        self.seen = image
        return (image[:, 0, :: self.patch, :: self.patch].flatten(1) * 10).round().long().clamp(0, 9)


def build(patch=8, statistics=((0.0,) * 3, (1.0,) * 3), augment=None, view=0):
    tokenizer = Tokenizer(Brightness(patch), "brightness", 10, patch, None, statistics)
    return Codes(tokenizer, CodesConfig(image_size=view), augment or Augment(), 32, 8, CPU)


def test_the_tokenizer_sees_the_students_image_in_its_own_normalisation():
    augment, statistics = Augment(), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    target = build(statistics=statistics, augment=augment)
    pixels = torch.rand(2, 3, 32, 32)

    def normal(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    codes = target({"image": normal(augment.mean, augment.std)})
    torch.testing.assert_close(target.module.seen, normal(*statistics), rtol=1e-4, atol=1e-5)
    assert codes.shape == (2, 16)
    assert target.width == 10


def test_a_tokenizer_with_a_size_of_its_own_sees_its_own_view():
    target = build(patch=4, view=16)
    batch = {"image": torch.zeros(1, 3, 32, 32), "view": torch.ones(1, 3, 16, 16)}
    assert target(batch).shape == (1, 16)
    assert target.module.seen.shape == (1, 3, 16, 16)
    assert target.module.seen[:, 0].unique().numel() == 1
    assert target({"image": torch.zeros(1, 3, 32, 32)}).shape == (1, 16)  # no view: the image is resized


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"patch": 4}, "image_size=16"),  # any size would do, the student's is the wrong one
        ({"patch": 4, "image_size": 16}, "image_size=16"),  # built for that one
        ({"patch": 8, "image_size": 64}, "another data.image_size"),
    ],
)
def test_another_grid_is_refused_with_the_way_out(options, fix):
    tokenizer = Tokenizer(
        Brightness(options["patch"]), "x", 10, options["patch"], options.get("image_size"), ((0,), (1,))
    )
    with pytest.raises(ConfigError) as refused:
        Codes(tokenizer, CodesConfig(), Augment(), 32, 8, CPU)
    assert refused.value.key == "target.codes.image_size"
    assert fix in refused.value.fix


def test_loss_and_accuracy_count_patches_by_their_weight():
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 3, 10), torch.randint(10, (2, 3))
    plain = cross_entropy(logits, codes)
    torch.testing.assert_close(plain["loss"], F.cross_entropy(logits.view(-1, 10), codes.view(-1)))
    weight = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]])
    half = cross_entropy(logits, codes, weight)
    kept = weight > 0
    torch.testing.assert_close(half["loss"], F.cross_entropy(logits[kept], codes[kept]))
    right = (logits.argmax(-1) == codes).float()
    torch.testing.assert_close(half["accuracy"], right[kept].mean())
    torch.testing.assert_close(plain["accuracy"], right.mean())


def test_perplexity_counts_the_codes_of_the_patches():
    codes = torch.tensor([[0, 1, 2, 3]])
    assert cross_entropy(torch.zeros(1, 4, 10), codes)["target_perplexity"].item() == pytest.approx(4)
    assert cross_entropy(torch.zeros(1, 4, 10), codes * 0)["target_perplexity"].item() == pytest.approx(1)


def test_right_codes_are_green_and_wrong_ones_red():
    target = build()
    image = torch.zeros(1, 3, 32, 32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, :2] = True
    answer = target({"image": image})
    prediction = F.one_hot(answer, 10).float()
    prediction[0, 1] = prediction[0, 1].roll(1)
    sheet = target.picture({"image": image, "mask": mask, "target": answer}, prediction, Augment())
    assert sheet.dtype == torch.uint8
    gap = 4
    column = sheet[:, gap : gap + 32, 2 * gap + 32 : 2 * gap + 64]
    first, second, visible = column[:, 4, 4], column[:, 4, 12], column[:, 12, 4]
    assert first[1] > first[0]
    assert second[0] > second[1]
    assert visible[1] > visible[0] > first[0]  # green too, paler
