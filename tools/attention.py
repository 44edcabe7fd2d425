"""``halfseen attention WEIGHTS IMAGE...``: what a trunk's heads look at, as pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import write_png

import halfseen
from halfseen.config import ConfigError
from halfseen.models import ViT
from halfseen.models.attention import Attention

GAP = 4  # white pixels between pictures


def main(argv: Sequence[str]) -> int:
    """Draw one picture per image; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen attention", description=__doc__)
    parser.add_argument("weights", type=Path, help="a run, a checkpoint, or a file that `halfseen export` wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--recipe", help="what describes the trunk of any other weight file")
    parser.add_argument("--block", type=int, default=-1, help="whose heads, from 0; negative: from the end (-1)")
    parser.add_argument("--size", type=int, help="pixels on a side; positions are resampled (as trained)")
    parser.add_argument("--out", type=Path, default=Path("attention"), help="folder for the pictures (attention)")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    arguments = parser.parse_args(list(argv))
    part: Literal["model", "ema"] = "ema" if arguments.ema else "model"
    model = halfseen.load(arguments.weights, recipe=arguments.recipe, image_size=arguments.size, part=part)
    see, augment = halfseen.transforms_for(model), model.described.augment
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.images:
        if not path.is_file():
            raise ConfigError("IMAGE", str(path), "there is no such file", "check the path")
        try:
            image = see(path)
        except ValueError as error:
            raise ConfigError("IMAGE", str(path), str(error).removeprefix(f"{path}: "), "name a picture") from None
        heads, spread = maps(model.encoder, image[None], arguments.block)
        scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (augment.std, augment.mean))
        file = arguments.out / f"{path.stem}.png"
        write_png(sheet(image * scale + shift, [*heads[0], spread[0]]), str(file))
        print(f"{file}: the image, {heads.shape[1]} heads of block {arguments.block % model.encoder.depth}, rollout")
    return 0


@torch.no_grad()
def maps(trunk: ViT, image: Tensor, block: int = -1) -> tuple[Tensor, Tensor]:
    """What is looked at by the class token (without one: by all patches, on average) in images [B, 3, H, W].

    Returns every head of one block, [B, heads, h, w], and the rollout over all blocks, [B, h, w]: each sums to at most
    1 over the patches (what is left goes to prefix tokens).
    """
    if not -trunk.depth <= block < trunk.depth:
        raise ConfigError("--block", block, f"the trunk has {trunk.depth} blocks", f"0 to {trunk.depth - 1}")
    weights = probabilities(trunk, image)
    prefix = trunk.prefix

    def seen(of: Tensor) -> Tensor:
        asking = of[..., 0, :] if trunk.cls_token is not None else of[..., prefix:, :].mean(-2)
        return asking[..., prefix:].unflatten(-1, trunk.grid)

    return seen(weights[block]), seen(rollout(weights))


def probabilities(trunk: ViT, image: Tensor) -> list[Tensor]:
    """What the softmax of every block makes of images [B, 3, H, W]: [B, heads, T, T], rows sum to 1.

    Of a parallel block the heads of all branches. Maps that are mixed across heads are taken before that.
    """
    attentions = [module for module in trunk.modules() if isinstance(module, Attention)]
    branches = trunk.cfg.parallel
    if len(attentions) != len(trunk.blocks) * branches:
        reason = "some of its blocks do not weigh all tokens by a softmax, so there is no such map"
        raise ConfigError("WEIGHTS", trunk.cfg.attention, reason, "use a trunk with model.attention=softmax")
    found: list[Tensor] = []

    def look(attention: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(attention, Attention)
        found.append(attention.probabilities(given[0], named.get("places"), named.get("repetition", 0)))

    hooks = [attention.register_forward_pre_hook(look, with_kwargs=True) for attention in attentions]
    try:
        trunk(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(found[first : first + branches], dim=1) for first in range(0, len(found), branches)]


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Attention followed through all blocks (Abnar and Zuidema, 2020), [B, T, T]; rows sum to 1.

    Heads are averaged, and half of each token is what the residual path carries past the attention.
    """
    total: Tensor | None = None
    for block in weights:
        mean = block.mean(1)
        step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)
        total = step if total is None else step @ total
    assert total is not None, "a trunk has blocks"
    return total


def sheet(image: Tensor, looked: Sequence[Tensor]) -> Tensor:
    """The image [3, H, W] from 0 to 1, then beside it each map [h, w] over it, each to its own maximum: uint8."""
    grey = image.mean(0, keepdim=True).expand(3, -1, -1) * 0.4
    tiles = [image]
    for one in looked:
        heat = F.interpolate((one / one.max().clamp(min=1e-12))[None, None], image.shape[1:], mode="bilinear")[0, 0]
        colour = torch.stack([heat, heat**2, heat**4 * 0.5])  # black, red, yellow
        tiles.append(grey * (1 - heat) + colour)
    padded = [F.pad(tile, (GAP, 0, GAP, GAP), value=1.0) for tile in tiles]
    return (F.pad(torch.cat(padded, dim=2), (0, GAP, 0, 0), value=1.0).clamp(0, 1) * 255).round().to(torch.uint8)
