"""The registry of sizes, and the refusal of sizes that cannot be built."""

import pytest

from halfseen.config import ConfigError, Model
from halfseen.models import SIZES, resolve


def test_sizes_are_the_published_ones():
    shapes = {name: (s.width, s.depth, s.heads, s.patch, s.hidden) for name, s in SIZES.items()}
    assert shapes == {
        "ti": (192, 12, 3, 16, 768),
        "s": (384, 12, 6, 16, 1536),
        "b": (768, 12, 12, 16, 3072),
        "l": (1024, 24, 16, 16, 4096),
        "h": (1280, 32, 16, 14, 5120),
        "g": (1408, 40, 16, 14, 6144),
    }


def test_overrides_win_over_the_named_size():
    size = resolve(Model(size="h", width=64, depth=3, heads=2, patch=8, mlp_ratio=2.0))
    assert (size.width, size.depth, size.heads, size.patch, size.hidden) == (64, 3, 2, 8, 128)


@pytest.mark.parametrize(
    ("model", "key"),
    [(Model(size="s", heads=5), "model.heads"), (Model(size="s", share=5), "model.share")],
)
def test_impossible_sizes_are_refused(model, key):
    with pytest.raises(ConfigError) as refused:
        resolve(model)
    assert refused.value.key == key
