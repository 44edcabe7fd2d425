"""Another library's model of the same weights, to show that converted weights compute what they did."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from halfseen.config import Model
from halfseen.layouts import LAYOUTS, Layout
from halfseen.models import hierarchical, trunks
from halfseen.models.sizes import resolve
from halfseen.models.swin import SwinConfig
from halfseen.teachers import as_tokens

from .architecture import Architecture

SEED, IMAGES = 0, 2
TOLERANCE = 1e-4  # over the largest output: float32 in another order of sums


@dataclass(frozen=True)
class Proof:
    """What came of comparing two models on random images."""

    witness: str  # the other model, with its library's version; empty: none
    reason: str = ""  # why there is none
    difference: float = 0.0  # largest absolute difference of a token's number
    scale: float = 0.0  # largest absolute number

    @property
    def holds(self) -> bool:
        """Whether the two are equal up to rounding."""
        return bool(self.witness) and self.difference <= TOLERANCE * max(self.scale, 1.0)

    def __str__(self) -> str:
        if not self.witness:
            return f"not shown: {self.reason}"
        verdict = "equal" if self.holds else "NOT EQUAL"
        return f"{verdict} to {self.witness} on {IMAGES} random images: {self.difference:.2g} of {self.scale:.3g}"

    def described(self) -> dict[str, Any]:
        """Plain values for a file's metadata."""
        if not self.witness:
            return {"witness": None, "reason": self.reason}
        seen = {"witness": self.witness, "equal": self.holds, "largest_difference": self.difference}
        return seen | {"largest_value": self.scale, "images": IMAGES, "seed": SEED}


class NoWitness(Exception):
    """No other library has this model; the message says why."""


@torch.no_grad()
def prove(
    architecture: Architecture,
    trunk: nn.Module,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    source: Layout,
) -> Proof:
    """Compare our trunk, which holds the weights, with another library's that takes them under its own names.

    ours, theirs: all the weights under our names and under those of the layout ``source``. Where that is the library's
    own, those very tensors go into it.
    """
    try:
        model, name = witness(architecture, ours, theirs, source)
    except NoWitness as error:
        return Proof("", str(error))
    if not normed(ours):
        trunk.norm = nn.Identity()  # the norm comes after the mean over tokens, which is the classifier's affair
    generator = torch.Generator().manual_seed(SEED)
    size = architecture.image_size
    image = torch.randn(IMAGES, 3, size, size, generator=generator)
    expected, actual = tokens_of(model.eval(), image), trunk.eval()(image)
    if actual.shape != expected.shape:
        return Proof("", f"{name} answers {tuple(expected.shape)}, not {tuple(actual.shape)}")
    return Proof(name, "", float((actual - expected).abs().max()), float(expected.abs().max()))


def normed(ours: Mapping[str, Tensor]) -> bool:
    """Whether the trunk ends in a norm; those of timm that are students always do."""
    return any(name.startswith(("encoder.norm.", "encoder.body.")) for name in ours)


def tokens_of(model: Any, image: Tensor) -> Tensor:
    """Tokens [B, N, D] after the last norm, of either library's model."""
    if hasattr(model, "forward_features"):
        return as_tokens(model.forward_features(image), model.num_features)
    return model(image).last_hidden_state


def witness(
    architecture: Architecture, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: Layout
) -> tuple[nn.Module, str]:
    """A model of another library with the weights, and what to call it. The arguments are those of ``prove``.

    Raises NoWitness.
    """
    model, size = architecture.model, architecture.image_size
    if isinstance(model, Model) and source.name.startswith("transformers"):
        return of_transformers(model, size, theirs, source.name)
    if isinstance(model, hierarchical.TimmConfig):
        made, layout = hierarchical.build(model, size), LAYOUTS["timm_hierarchical"]
    elif isinstance(model, SwinConfig):
        made, layout = of_timm_swin(model, size), LAYOUTS["timm_swin"]
    elif not isinstance(model, Model):
        raise NoWitness(f"no other library has this trunk ({type(model).__name__.removesuffix('Config')})")
    elif model.relative != "none" or not model.key_bias:
        made, layout = of_timm_beit(model, size), LAYOUTS["timm_beit"]
    else:
        made, layout = of_timm(model, size), LAYOUTS["timm"]
    if not normed(ours):
        made.norm = nn.Identity()
    trunk = {name: value for name, value in ours.items() if name.startswith("encoder.")}
    given = dict(theirs) if source is layout else layout.give(trunk)
    own = made.state_dict()
    if missing := sorted(own.keys() - given.keys()):
        raise NoWitness(f"{type(made).__name__} of timm has {missing[:3]}, which these weights lack")
    if other := sorted(key for key, value in own.items() if given[key].shape != value.shape):
        raise NoWitness(f"in {type(made).__name__} of timm {other[:3]} have other shapes")
    made.load_state_dict({key: given[key] for key in own})
    return made, f"timm {version('timm')} {type(made).__name__}"


# Options of ours that timm's plain models have, or that do not matter in evaluation.
PLAIN = {
    *("size", "width", "depth", "heads", "patch", "mlp_ratio", "norm_eps", "drop_path", "drop_path_shape"),
    "attention_dropout",
    *("position", "position_on_class", "class_token", "layer_scale", "qkv_bias"),
}


def require(model: trunks.Section, known: set[str], name: str) -> None:
    """Raise NoWitness if the model has parts that the library's lacks: options not at their defaults nor known."""
    plain = type(model)()
    left = [key for key, value in vars(model).items() if key not in known and value != getattr(plain, key)]
    if left:
        raise NoWitness(f"{name} has no such {', '.join(left)}")


def timm_options(model: Model, image_size: int) -> dict[str, Any]:
    """The options that timm's VisionTransformer and Beit both have."""
    from timm.layers import LayerNorm

    size = resolve(model)
    return {
        "img_size": image_size,
        "patch_size": size.patch,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": size.mlp_ratio,
        "qkv_bias": model.qkv_bias,
        "init_values": model.layer_scale,
        "norm_layer": partial(LayerNorm, eps=model.norm_eps),
        "num_classes": 0,
    }


def of_timm(model: Model, image_size: int) -> nn.Module:
    """timm's VisionTransformer, with DeiT's distillation token where there is one."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

    require(model, PLAIN | {"registers", "parallel", "distillation_token"}, "timm's VisionTransformer")
    on_class = model.position_on_class and model.class_token
    if model.registers and on_class:
        raise NoWitness("registers have positions in timm's VisionTransformer where the class token has one")
    options = timm_options(model, image_size) | ({"block_fn": ParallelThingsBlock} if model.parallel > 1 else {})
    if model.distillation_token:
        if not on_class or model.registers:
            raise NoWitness("timm's VisionTransformerDistilled has positions on both its tokens, and no registers")
        return VisionTransformerDistilled(**options)
    pooling = {"global_pool": "token" if model.class_token else "avg", "fc_norm": False}
    options |= pooling | {"class_token": model.class_token, "reg_tokens": model.registers}
    options |= {"no_embed_class": not on_class, "pos_embed": "none" if model.position == "none" else "learn"}
    return VisionTransformer(**options)


def of_timm_beit(model: Model, image_size: int) -> nn.Module:
    """timm's Beit."""
    from timm.models.beit import Beit

    require(model, PLAIN | {"relative", "key_bias"}, "timm's Beit")
    if not model.class_token or model.key_bias:
        raise NoWitness("timm's Beit always has a class token, and no bias on keys")
    return Beit(
        **timm_options(model, image_size),
        use_abs_pos_emb=model.position != "none",
        use_rel_pos_bias=model.relative == "block",
        use_shared_rel_pos_bias=model.relative == "shared",
        global_pool="token",
    )


def of_timm_swin(model: SwinConfig, image_size: int) -> nn.Module:
    """timm's SwinTransformer."""
    from timm.layers import LayerNorm
    from timm.models.swin_transformer import SwinTransformer

    known = {"size", "width", "depths", "heads", "patch", "window", "mlp_ratio", "qkv_bias", "drop_path", "norm_eps"}
    require(model, known, "timm's SwinTransformer")
    width, depths, heads, _ = model.resolved()
    norm: Any = partial(LayerNorm, eps=model.norm_eps)
    return SwinTransformer(
        img_size=image_size,
        patch_size=model.patch,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        window_size=model.window,
        mlp_ratio=model.mlp_ratio,
        qkv_bias=model.qkv_bias,
        norm_layer=norm,
        num_classes=0,
    )


def transformers_options(model: Model, image_size: int, layout: str, pooled: bool) -> dict[str, Any]:
    """The options of transformers' ViTConfig or BeitConfig. pooled: no norm after the trunk. Raises NoWitness."""
    require(model, PLAIN | {"relative", "key_bias"}, "transformers")
    size = resolve(model)
    options: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": size.patch,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.hidden,
        "layer_norm_eps": model.norm_eps,
    }
    if "beit" not in layout:
        on_class = model.class_token and model.position_on_class
        if model.layer_scale is not None or model.position == "none" or not on_class:
            raise NoWitness("transformers' ViT has a class token, positions on all tokens, and no LayerScale")
        return {"model_type": "vit", "qkv_bias": model.qkv_bias} | options
    own = {
        "use_mask_token": True,
        "use_shared_relative_position_bias": model.relative == "shared",
        "use_relative_position_bias": model.relative == "block",
        "use_absolute_position_embeddings": model.position != "none",
        "use_mean_pooling": pooled,
        "layer_scale_init_value": model.layer_scale or 0.0,
    }
    return {"model_type": "beit"} | options | own


def of_transformers(model: Model, image_size: int, theirs: Mapping[str, Tensor], layout: str) -> tuple[nn.Module, str]:
    """transformers' ViTModel or BeitModel, reading the given file's own names."""
    try:
        import transformers
    except ImportError as error:
        raise NoWitness("transformers is not installed") from error
    root, kind = ("beit.", "Beit") if "beit" in layout else ("vit.", "ViT")
    kept = ("embeddings.", "encoder.", "layernorm.", "pooler.")
    names = {name: name.removeprefix(root) for name in theirs if not name.endswith("mask_token")}
    trunk = {short: theirs[name] for name, short in names.items() if short.startswith(kept)}
    options = transformers_options(model, image_size, layout, pooled="layernorm.weight" not in trunk)
    config = getattr(transformers, f"{kind}Config")(**options | {"use_mask_token": False})
    made = getattr(transformers, f"{kind}Model")
    with tempfile.TemporaryDirectory() as folder:  # only the library's own loader knows its names of all versions
        config.save_pretrained(folder)
        copies = {name: value.clone().contiguous() for name, value in trunk.items()}
        save_file(copies, Path(folder) / "model.safetensors", {"format": "pt"})
        read, told = made.from_pretrained(folder, output_loading_info=True)
    missing = [name for name in told["missing_keys"] if "pooler" not in name]
    if missing:
        raise NoWitness(f"{made.__name__} of transformers also has {missing[:3]}")
    return read, f"transformers {version('transformers')} {made.__name__}"
