"""A discrete VAE to train one's own tokenizer on pixels (BEiT, modeling_discrete_vae.py), and DALL-E's encoder."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import ConfigError, at_least, positive

from ..patches import patchify

if TYPE_CHECKING:
    from ..targets import Target


@dataclass
class DVAEConfig:
    """Convolutions down to one place per patch, a choice of codes there, convolutions back up to pixels."""

    codes: int = 8192  # codes to choose from
    width: int = 512  # channels of a code's vector
    channels: int = 256  # channels of the convolutions
    blocks: int = 1  # residual blocks after the last halving, and before the first doubling
    temperature: float = 0.9  # of the Gumbel softmax: lower is closer to a hard choice
    kl: float = 0.0  # weight of the pull towards using all codes equally

    def check(self, key: str) -> None:
        """Ranges."""
        for name in ("codes", "width", "channels", "temperature"):
            positive(f"{key}.{name}", getattr(self, name))
        at_least(f"{key}.blocks", self.blocks, 0)
        at_least(f"{key}.kl", self.kl, 0.0)


class Residual(nn.Module):
    """x + three convolutions of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]."""
        return x + self.net(x)


class Encoder(nn.Module):
    """What a tokenizer is made of once it is trained: halvings, residual blocks, and a map to codes."""

    def __init__(self, cfg: DVAEConfig, patch: int) -> None:
        super().__init__()
        self.count, self.patch = cfg.codes, patch
        channels, halvings = cfg.channels, patch.bit_length() - 1
        if patch != 1 << halvings or not halvings:
            raise ConfigError("model.patch", patch, "the dVAE halves: it needs a power of two", "use 4, 8 or 16")
        before = [3, *[channels] * (halvings - 1)]
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, channels, 4, 2, 1), nn.ReLU()) for width in before),
            *(Residual(channels) for _ in range(cfg.blocks)),
            nn.Conv2d(channels, cfg.codes, 1),
        )

    @torch.no_grad()
    def codes(self, image: Tensor) -> Tensor:
        """image float [B, 3, S, S], normalised as in training -> int64 [B, N]."""
        x = self.encoder[:-1](image)
        with torch.autocast(image.device.type, enabled=False):  # in bf16 many codes would share the largest logit
            return self.encoder[-1](x.float()).argmax(1).flatten(1)


class DVAE(Encoder):
    """The student: encoder, Gumbel softmax over codes, decoder, and their loss.

    forward takes image float [B, 3, S, S] and target [B, N, P*P*3], its pixels, and returns what target.loss makes of
    all patches, ``loss`` with the KL term added. With task="predict" every place takes its likeliest code, and it
    returns {"prediction": [B, N, P*P*3], "codes": int64 [B, N]}. The patch side P is a power of two: one halving
    each.
    """

    def __init__(self, cfg: DVAEConfig, patch: int, grid: tuple[int, int], target: "Target") -> None:
        super().__init__(cfg, patch)
        self.cfg, self.grid, self.criterion = cfg, grid, target.loss
        channels = cfg.channels
        self.codebook = nn.Embedding(cfg.codes, cfg.width)
        doublings = range(patch.bit_length() - 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(cfg.width, channels, 1),
            *(Residual(channels) for _ in range(cfg.blocks)),
            *(nn.Sequential(nn.ConvTranspose2d(channels, channels, 4, 2, 1), nn.ReLU()) for _ in doublings),
            nn.Conv2d(channels, 3, 1),
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        logits = self.encoder(batch["image"]).float()
        if batch.get("task") == "predict":
            codes = logits.argmax(1)
            picture = self.decoder(self.codebook(codes).permute(0, 3, 1, 2))
            return {"prediction": patchify(picture, self.patch), "codes": codes.flatten(1)}
        chosen = F.gumbel_softmax(logits, self.cfg.temperature, dim=1)
        vectors = torch.einsum("bkhw,kc->bchw", chosen, self.codebook.weight)
        scalars = self.criterion(patchify(self.decoder(vectors), self.patch), batch["target"])
        probability = logits.softmax(1)
        # KL to the uniform choice, per place.
        kl = (probability * (logits.log_softmax(1) + math.log(self.cfg.codes))).sum(1).mean()
        mean = probability.detach().mean((0, 2, 3))
        found = {
            "reconstruction": scalars["loss"],
            "kl": kl,
            "code_perplexity": (-torch.special.xlogy(mean, mean).sum()).exp(),
            "loss": scalars["loss"] + self.cfg.kl * kl,
        }
        return scalars | found

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return [part for half in (self.encoder, self.decoder) for part in half if not isinstance(part, nn.Conv2d)]

    def train_flops_per_image(self) -> float:
        """Matmul FLOPs that a training step executes per image: three times its forward."""
        tokens, cfg = math.prod(self.grid), self.cfg
        residual = 2 * cfg.blocks * (9 + 9 + 1) * cfg.channels**2  # of encoder and decoder, per place
        ends = cfg.channels * (cfg.codes + cfg.width) + cfg.codes * cfg.width
        total, places = float(tokens * (residual + ends)), tokens
        for halving in reversed(range(self.patch.bit_length() - 1)):
            before = 3 if halving == 0 else cfg.channels
            total += places * 16 * cfg.channels * (before + cfg.channels)  # down to these places, and up from them
            places *= 4
        return 3.0 * 2.0 * (total + places * 3 * cfg.channels)


# ------------------------------------------------------------------------------------------------- DALL-E's encoder

DALLE_WIDTHS = (1, 2, 4, 8)  # channels of the four groups, over the first convolution's
DALLE_SHIFT = 0.1  # pixels in [0, 1] are taken to [shift, 1 - shift]


class DallEBlock(nn.Module):
    """x + g * three convolutions of 3 and one of 1 on ReLUs; all named as published."""

    def __init__(self, before: int, after: int, gain: float) -> None:
        super().__init__()
        inner = after // 4
        self.gain = gain
        self.id_path = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.res_path = nn.ModuleDict(
            {
                "conv_1": nn.Conv2d(before, inner, 3, padding=1),
                "conv_2": nn.Conv2d(inner, inner, 3, padding=1),
                "conv_3": nn.Conv2d(inner, inner, 3, padding=1),
                "conv_4": nn.Conv2d(inner, after, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C', h, w]."""
        branch = x
        for convolution in self.res_path.values():
            branch = convolution(F.relu(branch))
        return self.id_path(x) + self.gain * branch


class DallE(nn.Module):
    """DALL-E's encoder (openai/DALL-E, encoder.py): pixels to logits over codes, one place per 8 x 8 pixels."""

    def __init__(self, width: int = 256, blocks: int = 2, codes: int = 8192) -> None:
        super().__init__()
        gain = 1 / (len(DALLE_WIDTHS) * blocks) ** 2
        self.patch, self.count = 1 << (len(DALLE_WIDTHS) - 1), codes
        self.input = nn.Conv2d(3, width, 7, padding=3)
        self.groups = nn.ModuleList()
        before = width
        for factor in DALLE_WIDTHS:
            after = factor * width
            self.groups.append(
                nn.Sequential(*(DallEBlock(before if n == 0 else after, after, gain) for n in range(blocks)))
            )
            before = after
        self.output = nn.Conv2d(before, codes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """image float [B, 3, S, S] in [0, 1] -> logits float32 [B, codes, S/8, S/8]."""
        x = self.input((1 - 2 * DALLE_SHIFT) * image + DALLE_SHIFT)
        for number, group in enumerate(self.groups):
            x = group(x if number == 0 else F.max_pool2d(x, 2))
        with torch.autocast(image.device.type, enabled=False):  # as in Encoder.codes
            return self.output(F.relu(x.float()))

    @torch.no_grad()
    def codes(self, image: Tensor) -> Tensor:
        """image float [B, 3, S, S] in [0, 1] -> int64 [B, N]."""
        return self(image).argmax(1).flatten(1)
