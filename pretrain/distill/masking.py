"""Masked image modelling beside distillation: the student sees a masked image, the teacher the whole one.

Masks, targets and heads are those of pretraining; what is added is that the trunk's tokens serve both.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError
from halfseen.data.masks import split
from halfseen.models import ViT
from halfseen.models.swin import Swin
from halfseen.models.vit import Trace
from halfseen.teachers import Layers

from .. import masks, targets
from ..config import Objective, Pretrain
from ..mae import Decoder, rows_of
from ..mim import Compared, MIMConfig
from ..simmim import SimMIM, in_units
from ..targets import Target
from .config import Distill


def as_pretraining(config: Distill) -> Pretrain:
    """The pretraining whose masks and targets a joint student shares."""
    mim = config.mim
    return Pretrain(
        trunk=config.trunk,
        model=config.model,
        swin=config.swin,
        data=config.data,
        augment=config.augment,
        objective=Objective(mim.form, mae=mim.mae),
        mask=mim.mask,
        target=mim.target,
        run=config.run,
    )


class HiddenPatches(nn.Module):
    """What a joint student has to predict hidden patches with; thrown away after training.

    The student calls ``see`` for the trunk's tokens, ``scalars`` for their loss, and ``alike`` for those of the
    teacher's tokens that stand beside its own.
    """

    def __init__(self, weight: float, hidden: int, tokens: int, target: Target) -> None:
        """weight: of the loss. hidden: patches hidden in each of ``tokens``, at most."""
        super().__init__()
        self.weight, self.hidden, self.visible, self.target = weight, hidden, tokens - hidden, target

    def see(self, encoder: Any, batch: dict[str, Any], layers: Layers) -> Trace:
        """The trunk's tokens and chosen blocks, of the masked image."""
        raise NotImplementedError

    def alike(self, tokens: Tensor, batch: dict[str, Any]) -> Tensor:
        """Of the teacher's patch tokens [B, N, ...] those that the student has, too."""
        raise NotImplementedError

    def scalars(self, tokens: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The weighted loss of the trunk's last tokens [B, M, D], loss_mim, and what else the target measures.

        The batch holds mask bool [B, N], True = hidden, and hidden_target [B, N, ...].
        """
        found = self.predicted(tokens, batch)
        rest = {f"mim_{name}": value for name, value in found.items() if name != "loss"}
        return {"loss_mim": self.weight * found["loss"]} | rest

    def predicted(self, tokens: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the target makes of the predictions; the arguments are those of ``scalars``."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return []

    def flops(self, encoder: Any) -> float:
        """Forward matmul FLOPs per image, the trunk's included."""
        raise NotImplementedError


class Replaced(HiddenPatches):
    """BEiT's and SimMIM's way: all tokens through the trunk, hidden ones replaced; one linear map predicts."""

    def __init__(self, encoder: ViT, weight: float, hidden: int, target: Target) -> None:
        super().__init__(weight, hidden, encoder.tokens, target)
        self.prefix = encoder.prefix
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.width))
        self.head = nn.Linear(encoder.width, target.width)
        for tensor in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(tensor, std=0.02)
        nn.init.zeros_(self.head.bias)

    def see(self, encoder: ViT | Swin, batch: dict[str, Any], layers: Layers) -> Trace:
        """See HiddenPatches."""
        return encoder.trace(batch["image"], batch["mask"], self.mask_token, layers=layers.hidden, qkv=layers.qkv)

    def alike(self, tokens: Tensor, batch: dict[str, Any]) -> Tensor:
        """All of them, [B, N, ...]: what stands for a hidden patch is to become what the teacher saw there."""
        return tokens

    def predicted(self, tokens: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See HiddenPatches."""
        compared = Compared.of(batch["mask"], self.hidden, self.visible, "image")
        prediction = self.head(compared.rows(tokens[:, self.prefix :]))
        return self.target.loss(prediction, compared.rows(batch["hidden_target"]), compared.weight)

    def flops(self, encoder: ViT | Swin) -> float:
        """See HiddenPatches."""
        return encoder.flops() + 2.0 * self.hidden * self.head.weight.numel()


class ReplacedUnits(Replaced):
    """SimMIM's way on a Swin, whose hidden units are places of its last stage or finer; see pretrain/simmim.py."""

    def __init__(self, encoder: Swin, weight: float, hidden: int, target: Target, unit: int) -> None:
        alone = SimMIM(encoder, MIMConfig("trunk"), hidden, target, unit)  # for its parts, and what it refuses
        HiddenPatches.__init__(self, weight, hidden, hidden + alone.visible, target)
        assert alone.mask_token is not None, "something is hidden"
        self.mask_token, self.head = alone.mask_token, alone.head
        self.unit, self.stride, self.grid = unit, encoder.stride, encoder.grid

    def predicted(self, tokens: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See HiddenPatches."""
        compared = Compared.of(batch["mask"], self.hidden, self.visible, "image")
        prediction = compared.rows(in_units(self.head(tokens), self.stride, self.unit, self.grid))
        return self.target.loss(prediction, compared.rows(batch["hidden_target"]), compared.weight)

    def flops(self, encoder: ViT | Swin) -> float:
        """See HiddenPatches."""
        return encoder.flops() + 2.0 * encoder.tokens * self.head.weight.numel()


class LeftOut(HiddenPatches):
    """MAE's way: visible patches alone through the trunk; a decoder predicts the hidden ones."""

    def __init__(self, encoder: ViT, config: Pretrain, weight: float, hidden: int, target: Target) -> None:
        super().__init__(weight, hidden, encoder.tokens, target)
        encoder.check_visible_only()
        self.decoder = Decoder(encoder, config.objective.mae, target.width)

    def see(self, encoder: ViT, batch: dict[str, Any], layers: Layers) -> Trace:
        """See HiddenPatches."""
        visible = split(batch["mask"], self.visible)[0]
        return encoder.trace(batch["image"], index=visible, layers=layers.hidden, qkv=layers.qkv)

    def alike(self, tokens: Tensor, batch: dict[str, Any]) -> Tensor:
        """Visible ones, [B, visible, ...], in ascending order."""
        return rows_of(tokens, split(batch["mask"], self.visible)[0])

    def predicted(self, tokens: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See HiddenPatches."""
        visible, hidden = split(batch["mask"], self.visible)
        prediction = self.decoder(tokens, visible, hidden, hidden_only=True)
        return self.target.loss(prediction, rows_of(batch["hidden_target"], hidden))

    def blocks(self) -> list[nn.Module]:
        """See HiddenPatches."""
        return list(self.decoder.blocks)

    def flops(self, encoder: ViT) -> float:
        """See HiddenPatches."""
        return encoder.flops(self.visible) + self.decoder.flops(self.visible, self.hidden)


def create(config: Distill, encoder: Any, device: torch.device) -> HiddenPatches | None:
    """What a config hides; None if nothing. The target, with a tokenizer or teacher of its own, is on the device."""
    if not config.mim.weight:
        return None
    pretraining = as_pretraining(config)
    try:
        hidden = masks.hidden(pretraining)
        if not hidden:
            raise ConfigError("mask.kind", config.mim.mask.kind, "hides nothing", "use another, or mim.weight=0")
        if config.mim.target.codes.store.folder:
            reason = "only `halfseen pretrain` reads stored codes; here the tokenizer is asked"
            raise ConfigError("target.codes.store.folder", config.mim.target.codes.store.folder, reason, "leave it out")
        target = targets.create(pretraining, device)
        if isinstance(encoder, Swin):
            return ReplacedUnits(encoder, config.mim.weight, hidden, target, pretraining.patch)
        if config.mim.form == "mim":
            return Replaced(encoder, config.mim.weight, hidden, target)
        if config.mim.mask.kind not in masks.EVEN:
            reason = "visible patches alone are encoded, equally many of every image"
            raise ConfigError("mask.kind", config.mim.mask.kind, reason, f"use one of {masks.EVEN}, or mim.form=mim")
        return LeftOut(encoder, pretraining, config.mim.weight, hidden, target)
    except ConfigError as refused:  # by code of pretraining, which knows its own sections
        key = f"mim.{refused.key}" if refused.key.startswith(("mask.", "target.")) else refused.key
        raise ConfigError(key, refused.value, refused.reason, refused.fix) from refused


def host(config: Distill) -> masks.HostDraw | None:
    """Draws masks in the loader's workers; None where the device draws them, or nothing is hidden."""
    return masks.host(as_pretraining(config)) if config.mim.weight else None


class Masks:
    """Adds mask and hidden_target to a prepared batch, from (seed, position) and the image as the student has it."""

    def __init__(self, config: Distill, target: Target) -> None:
        self.seed, self.target = config.run.seed, target
        self.draw = masks.create(as_pretraining(config))

    def __call__(self, prepared: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
        """batch: as the loader gave it, with position int64 [B], and mask where its workers drew that."""
        device = prepared["image"].device
        if "mask" in batch:
            mask = batch["mask"].to(device, non_blocking=True)
        else:
            mask = self.draw(self.seed, batch["position"].to(device, non_blocking=True))
        return prepared | {"mask": mask, "hidden_target": self.target(prepared)}
