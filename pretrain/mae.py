"""Masked autoencoder (He et al., 2021): encode visible patches, decode hidden ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import ConfigError, positive
from halfseen.data.masks import split
from halfseen.models import ViT
from halfseen.models.block import Block
from halfseen.models.linear import Linear
from halfseen.models.positions import sincos
from halfseen.models.vit import block_flops, initialise

from .collapse import feature_rank
from .targets import Target


@dataclass
class MAEConfig:
    """Masked autoencoding. The decoder is thrown away after pretraining, but kept in every checkpoint."""

    decoder_width: int = 512  # channels of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder
    decoder_mlp_ratio: float = 4.0  # hidden width of the decoder's MLPs over decoder_width

    @property
    def decoder_hidden(self) -> int:
        """Hidden width of the decoder's MLPs."""
        return round(self.decoder_width * self.decoder_mlp_ratio)

    def check(self, key: str) -> None:
        """Ranges."""
        for name in ("decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp_ratio"):
            positive(f"{key}.{name}", getattr(self, name))
        if self.decoder_width % self.decoder_heads:
            raise ConfigError(
                f"{key}.decoder_heads",
                self.decoder_heads,
                f"does not divide decoder_width={self.decoder_width}",
                "use a divisor, e.g. one head per 32 channels",
            )
        if self.decoder_width % 4:
            raise ConfigError(
                f"{key}.decoder_width",
                self.decoder_width,
                "its sine-cosine table needs a multiple of 4",
                "e.g. 512",
            )


class Decoder(nn.Module):
    """MAE's decoder: predicts patches from the tokens of visible ones.

    forward takes latent [B, prefix + visible, D], the places of visible and hidden patches, int64 [B, visible] and
    [B, hidden], and returns predictions [B, visible + hidden, outputs] in that order; with hidden_only those of hidden
    patches, [B, hidden, outputs], and computes no others from the last attention on.
    """

    def __init__(self, encoder: ViT, cfg: MAEConfig, outputs: int) -> None:
        super().__init__()
        width, hidden, eps = cfg.decoder_width, cfg.decoder_hidden, encoder.cfg.norm_eps
        table = sincos(width, encoder.grid, encoder.prefix)
        self.cfg, self.prefix = cfg, encoder.prefix
        self.embed = Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, cfg.decoder_heads, hidden, eps=eps) for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.pred = Linear(width, outputs)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, hidden: Tensor, hidden_only: bool = False) -> Tensor:
        """See the class.

        Attention does not care for the order of tokens, only positions tell it: leaving hidden tokens at the
        end spares the un-shuffling of the paper.
        """
        first, places = self.pos_embed[:, : self.prefix], self.pos_embed[0, self.prefix :]
        seen = self.embed(latent)
        rows = self.mask_token[0] + places  # a hidden token is its position and nothing else
        unseen = F.embedding(hidden, rows)
        patches = seen[:, self.prefix :] + F.embedding(visible, places)
        x = torch.cat([seen[:, : self.prefix] + first, patches, unseen], dim=1)
        # Their first queries, keys and values are therefore the same in all samples. Making them once saves 3 to 4 %
        # of a float32 step on the CPU; not in bfloat16, where gradients summed over samples would lose bits.
        once = (rows, hidden) if seen.device.type == "cpu" and seen.dtype == torch.float32 else None
        for number, block in enumerate(self.blocks):
            last = hidden.shape[1] if hidden_only and number == len(self.blocks) - 1 else None
            x = block(x, 0, last, once if number == 0 else None)
        return self.pred(self.norm(x if hidden_only else x[:, self.prefix :]))

    def flops(self, visible: int, hidden: int) -> float:
        """Forward matmul FLOPs per image of a training step."""
        cfg, tokens = self.cfg, self.prefix + visible + hidden
        width, inner = cfg.decoder_width, cfg.decoder_hidden
        return (
            2.0 * (visible + self.prefix) * self.embed.in_features * width
            + (cfg.decoder_depth - 1) * block_flops(tokens, width, inner)
            + block_flops(tokens, width, inner, asked=hidden)
            + 2.0 * hidden * width * self.pred.out_features
        )


class MAE(nn.Module):
    """The student: a trunk, a decoder and their loss.

    forward takes image float [B, 3, S, S], mask bool [B, N] with exactly ``hidden`` True per row, and target
    [B, N, ...] as the target makes it, and returns what target.loss makes of the hidden patches. With
    task="predict" no target is needed, and it returns {"prediction": [B, N, target.width],
    "latent": [B, prefix + visible, D]}, latent tokens in ascending order. With task="features" nothing is hidden or
    predicted: {"latent": [B, prefix + N, D]}.
    """

    def __init__(self, encoder: ViT, cfg: MAEConfig, hidden: int, target: Target) -> None:
        super().__init__()
        encoder.check_visible_only()
        self.hidden, self.visible = hidden, encoder.tokens - hidden
        self.cfg, self.criterion = cfg, target.loss
        self.encoder = encoder
        self.decoder = Decoder(encoder, cfg, target.width)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        if batch.get("task") == "features":
            return {"latent": self.encoder(batch["image"])}
        visible, hidden = split(batch["mask"], self.visible)
        latent = self.encoder(batch["image"], index=visible)
        if batch.get("task") == "predict":
            prediction = self.decoder(latent, visible, hidden)
            # Visible patches come first: put every one back where it belongs.
            order = torch.cat([visible, hidden], dim=1).argsort(dim=1)
            return {"prediction": rows_of(prediction, order), "latent": latent}
        prediction = self.decoder(latent, visible, hidden, hidden_only=True)
        scalars = self.criterion(prediction, rows_of(batch["target"], hidden))
        return scalars | {"feature_rank": feature_rank(latent.mean(1))}

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def train_flops_per_image(self) -> float:
        """Matmul FLOPs that a training step executes per image: three times its forward."""
        return 3.0 * (self.encoder.flops(self.visible) + self.decoder.flops(self.visible, self.hidden))


def rows_of(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, ...], index int64 [B, M] -> [B, M, ...]: sample b's tokens index[b]."""
    batch, count, *rest = tokens.shape
    flat = (index + count * torch.arange(batch, device=index.device)[:, None]).flatten()
    return tokens.reshape(batch * count, *rest).index_select(0, flat).view(batch, -1, *rest)
