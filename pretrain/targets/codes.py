"""Targets that are codes: which entry of a frozen tokenizer's codebook each patch is (BEiT, BEiT v2)."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from halfseen.config import Augment, ConfigError, at_least
from halfseen.teachers import AUTOCAST, renormalisation

from ..pictures import covered, sheet
from ..store import StoreConfig
from ..tokenizers import Tokenizer
from .average import average

RIGHT, WRONG = (0.1, 0.7, 0.2), (0.8, 0.1, 0.1)  # colours of a patch whose code was told, and was not


@dataclass
class CodesConfig:
    """A frozen tokenizer."""

    tokenizer: str = ""  # a run of objective vqkd or dvae, a checkpoint of one, or VQ-KD's or DALL-E's weights
    image_size: int = 0  # pixels of the tokenizer's own resize of the student's crop; 0: it sees the student's image
    heads: int = 0  # of a VQ-KD file: attention heads of its trunk; 0: as the file tells, else one per 64 channels
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast type of its trunk; codes are chosen in fp32
    store: StoreConfig = field(default_factory=StoreConfig)

    def check(self, key: str) -> None:
        """Ranges."""
        at_least(f"{key}.image_size", self.image_size, 0)
        at_least(f"{key}.heads", self.heads, 0)


class Codes:
    """The tokenizer's code of each patch; cross-entropy over its codebook.

    One of a family, see pretrain/targets: width is the number of codes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        cfg: CodesConfig,
        augment: Augment,
        image_size: int,
        patch: int,
        device: torch.device,
    ) -> None:
        self.cfg, self.patch, self.device = cfg, patch, device
        self.width = tokenizer.codes
        refuse_other_grid(tokenizer, cfg.image_size or image_size, image_size // patch)
        self.module = tokenizer.module.requires_grad_(False).eval().to(device)
        statistics = (augment.mean, augment.std)
        self.scale, self.shift = renormalisation(statistics, tokenizer.statistics, device)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """batch["view"] float [B, 3, S', S'] if the tokenizer has its own, else batch["image"] -> int64 [B, N].

        A batch without the view it should have (whole images, as ``halfseen reconstruct`` shows them) is resized.
        """
        size = self.cfg.image_size
        view = batch.get("view", batch["image"]) if size else batch["image"]
        if size and view.shape[-1] != size:
            view = F.interpolate(view, (size, size), mode="bicubic", antialias=True)
        dtype = AUTOCAST.get(self.cfg.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.module.codes(torch.addcmul(self.shift, view.float(), self.scale))

    def loss(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """See cross_entropy."""
        return cross_entropy(prediction, target, weight)

    def picture(self, batch: dict[str, Any], prediction: Tensor, augment: Augment) -> Tensor:
        """See drawn."""
        return drawn(batch, prediction, self.patch, augment)


def drawn(batch: dict[str, Any], prediction: Tensor, patch: int, augment: Augment) -> Tensor:
    """Masked image, where the likeliest code is the right one (green) or is not (red), and the image.

    uint8 [3, height, width]; visible patches, which are not asked for in training, are drawn paler.
    """
    masked, original = covered(batch["image"], batch["mask"], patch, augment.mean, augment.std)
    grid = [side // patch for side in original.shape[2:]]
    right = (prediction.argmax(-1) == batch["target"]).view(-1, 1, *grid)
    green, red = (original.new_tensor(colour).view(1, 3, 1, 1) for colour in (RIGHT, WRONG))
    told: Tensor = torch.where(right, green, red)
    told = torch.where(batch["mask"].view(-1, 1, *grid), told, 0.5 * told + 0.5)
    return sheet([masked, F.interpolate(told, scale_factor=patch), original])


def cross_entropy(logits: Tensor, codes: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """loss: cross-entropy of logits [..., K] for codes int64 [...] of patches that count, in float32.

    accuracy: share told right. target_perplexity: how many codes the patches have among them, counted by their entropy.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), codes.flatten(), reduction="none").view(codes.shape)
    with torch.no_grad():
        right = logits.argmax(-1) == codes
        one = logits.new_full((codes.numel(),), 1 / codes.numel())
        share = logits.new_zeros(logits.shape[-1]).index_add_(0, codes.flatten(), one)  # bincount waits for the device
        perplexity = (-torch.special.xlogy(share, share).sum()).exp()
    return {"loss": average(loss, weight), "accuracy": average(right, weight), "target_perplexity": perplexity}


def refuse_other_grid(tokenizer: Tokenizer, image_size: int, side: int) -> None:
    """Raise ConfigError unless the tokenizer makes side x side codes of images of image_size pixels."""
    if image_size == side * tokenizer.patch and tokenizer.image_size in (None, image_size):
        return
    key = "target.codes.image_size"
    built = "" if tokenizer.image_size is None else f", built for {tokenizer.image_size}"
    reason = f"{tokenizer.name} has a code per {tokenizer.patch} pixels{built}; the student has {side} x {side} patches"
    fits = side * tokenizer.patch
    if tokenizer.image_size in (None, fits):
        raise ConfigError(key, image_size, reason, f"set {key}={fits}")
    raise ConfigError(key, image_size, reason, "use a tokenizer with as many patches, or another data.image_size")
