"""``halfseen attention WEIGHTS IMAGE...``: what a trunk's heads look at, as pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import write_png

import halfseen
from halfseen.config import ConfigError
from halfseen.models import ViT
from halfseen.models.attention import Attention
from halfseen.models.general import GeneralAttention
from halfseen.models.rotary import rotate

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
        image = see(path)
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
    weights = probabilities(trunk, image)
    own, prefix = weights[block % trunk.depth], trunk.prefix

    def seen(of: Tensor) -> Tensor:
        asking = of[..., 0, :] if trunk.cls_token is not None else of[..., prefix:, :].mean(-2)
        return asking[..., prefix:].unflatten(-1, trunk.grid)

    return seen(own), seen(rollout(weights))


def probabilities(trunk: ViT, image: Tensor) -> list[Tensor]:
    """Attention of every block of a trunk to images [B, 3, H, W]: [B, heads, T, T], rows sum to 1."""
    attentions = [module for module in trunk.modules() if isinstance(module, Attention)]
    for attention in attentions:
        if type(attention) not in (Attention, GeneralAttention) or getattr(attention, "scores_are_seen", False):
            raise refusal("the trunk changes scores between heads or by place, which is not drawn")
    if len(attentions) != len(trunk.blocks):
        raise refusal("blocks of several branches, or without attention over all tokens, are not drawn")
    places = trunk.places()
    found = []
    for number, projected in sorted(trunk.trace(image, qkv=range(trunk.depth)).qkv.items()):
        attention = attentions[number // trunk.cfg.share]
        q, k, _ = attention._heads(projected, 3)
        bias = None
        if places is not None and isinstance(attention, GeneralAttention):
            q, k = (part if places.rotation is None else rotate(part, places.rotation) for part in (q, k))
            bias = attention._bias(places)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        found.append((scores if bias is None else scores + bias).softmax(-1))
    return found


def refusal(reason: str) -> ConfigError:
    """Why this trunk cannot be drawn."""
    return ConfigError("WEIGHTS", "", reason, "use a trunk with one softmax attention per block")


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
