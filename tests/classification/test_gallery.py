"""The gallery holds the surest mistakes, and nothing that was right."""

import torch

from halfseen.classification.gallery import Gallery
from halfseen.distributed import World


def test_the_surest_mistakes_come_first_and_right_answers_not_at_all():
    gallery = Gallery(2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    share = torch.tensor([0.9, 0.6, 0.8, 0.7])  # of class 0; the first image is rightly named
    right = torch.tensor([[True, False], [False, True], [False, True], [False, True]])
    batch = {"image": torch.rand(4, 3, 8, 8), "position": torch.arange(4)}
    gallery(batch, torch.stack([share, 1 - share], 1), right)
    assert sorted(entry[1] for entry in gallery.worst) == [2, 3]
    picture = gallery.gather(World())
    assert picture.dtype == torch.uint8
    assert torch.equal(picture, gallery.picture())
    expected = (batch["image"][2] * 255).round().to(torch.uint8)
    assert torch.equal(picture[:, 18:26, 4:12], expected), "the surest one stands first"


def test_without_a_mistake_there_is_one_white_pixel():
    assert Gallery(2, (0.0,) * 3, (1.0,) * 3).picture().shape == (3, 1, 1)
