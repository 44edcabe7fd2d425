"""For notebooks and other programs: a trained trunk as a feature backbone.

import halfseen
model = halfseen.load("runs/mae_b16")
look = halfseen.transforms_for(model)
features = model.features(look("cat.jpg")[None])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from halfseen import delta, origin
from halfseen.checkpoint import read_weights
from halfseen.checkpoint.read import WEIGHT_FILES
from halfseen.classification import Classifier, Task
from halfseen.config import Augment, ConfigError, Data, Model
from halfseen.data.decode import decode, to_rgb
from halfseen.data.reader import BadSample
from halfseen.data.transforms import evaluation_transform, normalise
from halfseen.layouts import detect
from halfseen.models import ViT
from halfseen.recipes import find_recipe, read_layers
from halfseen.recipes import load as load_config
from halfseen.weights import initialise

Picture = str | Path | bytes | Image.Image | Tensor | np.ndarray


@dataclass
class Described:
    """The sections of a run's config that say what the model is and how it sees images."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    task: Task | None = None  # of a classifier


class Backbone(nn.Module):
    """A trunk, with its classifier if it has one, in evaluation mode; methods are called as timm's models call them.

    Images are float [B, 3, H, W] of ``image_size``, as ``transforms_for`` makes them.
    """

    def __init__(self, encoder: ViT, described: Described, classifier: Classifier | None) -> None:
        super().__init__()
        self.encoder, self.described, self.classifier = encoder, described, classifier
        self.num_features = encoder.width
        self.num_classes = described.data.classes if classifier is not None else 0
        self.image_size = (encoder.grid[0] * encoder.patch, encoder.grid[1] * encoder.patch)
        # As timm's: of each block's map, its channels, pixels from one place to the next, and where it comes from.
        self.feature_info = [
            {"num_chs": encoder.width, "reduction": encoder.patch, "module": f"encoder.blocks.{number}"}
            for number in range(encoder.depth)
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of a classifier, else features [B, D]."""
        return self.forward_head(self.forward_features(images))

    def features(self, images: Tensor, pool: Literal["class", "mean", "head"] | None = None) -> Tensor:
        """One vector per image, [B, D]: the class token, the mean of patches, or what the head reads.

        pool None: what the head reads, and without a head the mean of patches.
        """
        tokens = self.forward_features(images)
        if pool is None or (pool == "head" and self.classifier is not None):
            return self.forward_head(tokens, pre_logits=True)
        if pool == "head":
            raise ValueError("this model has no head: pool is class or mean")
        if pool == "class":
            if self.encoder.cls_token is None:
                raise ValueError("the trunk has no class token: pool is mean")
            return tokens[:, 0]
        return tokens[:, self.encoder.prefix :].mean(1)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the final norm, [B, prefix + N, D]. ValueError for images of another size or type."""
        return self.encoder(self._checked(images))

    def _checked(self, images: Tensor) -> Tensor:
        height, width = self.image_size
        if images.is_floating_point() and images.ndim == 4 and images.shape[1:] == (3, height, width):
            return images
        raise ValueError(
            f"images are float [B, 3, {height}, {width}] as transforms_for(model) makes them, not {images.dtype} "
            f"{tuple(images.shape)}; load(..., image_size=(height, width)) makes a model for another size"
        )

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to class scores [B, K]; with pre_logits, and without a head, to features [B, D]."""
        if self.classifier is None:
            return tokens[:, self.encoder.prefix :].mean(1)
        return self.classifier.pooled(tokens) if pre_logits else self.classifier.scores(tokens)

    def forward_intermediates(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """What chosen blocks (from 0; negative from the end) left of the patches, as maps [B, D, h, w]."""
        depth = self.encoder.depth
        if wrong := [index for index in indices if not -depth <= index < depth]:
            raise ValueError(f"there are no blocks {wrong}, only 0 to {depth - 1}")
        blocks = [index % depth for index in indices]
        layers = self.encoder.trace(self._checked(images), layers=set(blocks)).layers
        shape = self.encoder.grid
        return [layers[block][:, self.encoder.prefix :].transpose(1, 2).unflatten(2, shape) for block in blocks]


def load(
    source: str | Path,
    *,
    recipe: str | Path | None = None,
    change: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    part: Literal["model", "ema"] = "model",
    device: str | torch.device = "cpu",
) -> Backbone:
    """A trained trunk, or a recipe's with random weights, in evaluation mode.

    source: a run folder, a checkpoint, a file that ``halfseen export``, ``convert`` or ``delta apply`` wrote, or a
    recipe (a bundled name or a .yaml). Any other weight file needs a recipe that describes its trunk. change: a delta
    file that was made from source (see halfseen/delta.py), for one of several tasks on one base. image_size: pixels,
    also (height, width); positions are resampled to it. part: ema takes averaged weights. Raises ConfigError.
    """
    path = Path(source)
    if recipe is None and not path.is_dir() and path.suffix not in WEIGHT_FILES:
        try:
            named = find_recipe(str(source))
        except ConfigError as refused:
            raise ConfigError("source", str(source), "is no run, weight file or recipe", refused.fix) from None
        return build(describe(read_yaml(named)), None, image_size).to(device).eval()
    weights = read_weights(path, part)
    if change is not None:
        said, weights = origin.require("change", Path(change)).said, delta.apply(weights, Path(change))
    elif recipe is not None:
        said = read_yaml(find_recipe(str(recipe)))
    else:
        said = origin.require("source", path).said
    return build(describe(said), weights, image_size).to(device).eval()


def build(described: Described, weights: dict[str, Tensor] | None, size: int | tuple[int, int] | None) -> Backbone:
    """The modules, filled with weights of any known layout; a head only where the weights have one."""
    encoder = ViT(described.model, size or described.data.image_size)
    given = detect(weights).take(weights) if weights is not None else None
    headed = described.task is not None and (given is None or "head.weight" in given)
    classifier = Classifier(encoder, described.task, described.data.classes) if headed and described.task else None
    if given is not None:
        student = classifier if classifier is not None else Holder(encoder)
        initialise(student, given, coverage=0.99)
    return Backbone(encoder, described, classifier)


class Holder(nn.Module):
    """A trunk under the name it has in every student."""

    def __init__(self, encoder: ViT) -> None:
        super().__init__()
        self.encoder = encoder


def transforms_for(model: Backbone) -> Callable[[Picture], Tensor]:
    """How a model wants its images: a function from a picture to float [3, H, W], centre-cropped and normalised.

    A picture is a path, encoded bytes, a PIL image, or uint8 pixels: a tensor [3, H, W] or an array [H, W, 3]. The
    function raises ValueError for what is no picture.
    """
    crop, augment = evaluation_transform(model.image_size), model.described.augment

    def see(picture: Picture) -> Tensor:
        image = crop(pixels(picture), Random(0))
        assert isinstance(image, Tensor), "the centre crop makes no second view"
        return normalise(image.unsqueeze(0), augment.mean, augment.std)[0]

    return see


def pixels(picture: Picture) -> Tensor:
    """Any picture as uint8 [3, H, W]."""
    if isinstance(picture, (str, Path)):
        return decoded(Path(picture).read_bytes(), str(picture))
    if isinstance(picture, bytes):
        return decoded(picture, "these bytes")
    if isinstance(picture, Image.Image):  # as the same picture in a file: upright, transparent parts on white
        picture = np.array(to_rgb(ImageOps.exif_transpose(picture)))
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(np.ascontiguousarray(picture))
        picture = picture.permute(2, 0, 1) if picture.ndim == 3 else picture
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture is uint8 [3, H, W], not {picture.dtype} {tuple(picture.shape)}")
    return picture


def decoded(data: bytes, name: str) -> Tensor:
    """An encoded picture as uint8 [3, H, W]; ValueError with its name if it is none."""
    try:
        return decode(data)
    except BadSample as bad:
        raise ValueError(f"{name}: {bad.reason}") from None


# ------------------------------------------------------------------------------------------------ what a run says


def describe(stored: dict[str, Any]) -> Described:
    """The parts of a run's or a recipe's config that matter here; a classifier's task only if there are classes."""
    if stored.get("trunk", "vit") != "vit":
        raise ConfigError("trunk", stored["trunk"], "only a ViT is a backbone here", "use timm for hierarchical trunks")
    data = {name: value for name, value in (stored.get("data") or {}).items() if name in ("image_size", "classes")}
    augment = {name: value for name, value in (stored.get("augment") or {}).items() if name in ("mean", "std")}
    model = {**(stored.get("model") or {}), "drop_path": 0.0, "attention_dropout": 0.0}
    picked = {"model": model, "data": data, "augment": augment}
    described = load_config(Described, None, (), [picked])
    if stored.get("stage", "finetune") in ("finetune", "distill") and described.data.classes:
        task = {**(stored.get("task") or {}), "frozen": "fp32", "recompute_mlp": False}
        described.task = load_config(Tasked, None, (), [{"task": task}]).task
    return described


@dataclass
class Tasked:
    """A config of one section."""

    task: Task = field(default_factory=Task)


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe or a run's config as plain values, its bases included."""
    merged: dict[str, Any] = {}
    for layer in read_layers(path):
        for section, values in layer.items():
            known = merged.get(section)
            merged[section] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    return merged
