"""Small models of each hierarchical family of timm."""

from timm.models import Nest, register_model


@register_model
def nest_for_tests(pretrained=False, img_size=224, num_classes=1000, drop_path_rate=0.0, **entry):
    """A NesT small enough to train here; timm lets nobody change the sizes of its own."""
    sizes = {"embed_dims": (8, 16, 32), "num_heads": (1, 1, 2), "depths": (1, 2, 1)}
    return Nest(img_size, num_classes=num_classes, drop_path_rate=drop_path_rate, **sizes)


# Name, pixels on the side of its images, what makes it small.
FAMILIES = {
    "swin": ("swin_tiny_patch4_window7_224", 64, {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}),
    "nest": ("nest_for_tests", 64, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}),
    "twins_svt": ("twins_svt_small", 64, {"embed_dims": [8, 8, 16, 16], "depths": [1, 2, 1, 1], "num_heads": [1] * 4}),
    "twins_pcpvt": ("twins_pcpvt_small", 64, {"embed_dims": [8, 8, 16, 16], "depths": [1] * 4, "num_heads": [1] * 4}),
    "tnt": ("tnt_s_patch16_224", 64, {"embed_dim": 32, "inner_dim": 8, "depth": 2, "num_heads_outer": 2}),
}
