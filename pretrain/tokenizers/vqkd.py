"""VQ-KD, BEiT v2's tokenizer: codes from which a small decoder can tell a teacher's features (Peng et al., 2022)."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import Model, positive
from halfseen.models import ViT

from ..collapse import feature_rank
from ..initial import initialise_trunk, narrow
from .quantizer import Quantizer, QuantizerConfig

if TYPE_CHECKING:
    from ..targets import Target


@dataclass
class VQKDConfig:
    """A tokenizer learned from a teacher: trunk, codebook, decoder. The decoder is of no use afterwards."""

    decoder_width: int = 768  # channels of the decoder
    decoder_depth: int = 3  # blocks of the decoder; 1 uses more of the codebook
    decoder_heads: int = 12  # attention heads of the decoder
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def check(self, key: str) -> None:
        """Ranges."""
        for name in ("decoder_width", "decoder_depth", "decoder_heads"):
            positive(f"{key}.{name}", getattr(self, name))


class CodeStem(nn.Module):
    """The stem of a trunk over code vectors: one linear map, kept as the 1 x 1 convolution that was published."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(before, width, 1)

    def forward(self, vectors: Tensor, index: Tensor | None = None) -> Tensor:
        """vectors [B, N, C] -> tokens [B, N, D]."""
        return F.linear(vectors, self.proj.weight.flatten(1), self.proj.bias)

    def flops(self) -> float:
        """Forward matmul FLOPs per token."""
        return 2.0 * self.proj.weight.numel()


class Decoder(ViT):
    """The trunk's kind of network over code vectors [B, N, C] instead of an image."""

    def __init__(self, cfg: Model, grid: tuple[int, int], before: int) -> None:
        super().__init__(replace(cfg, patch=1, stem="patch"), grid)
        self.patch_embed = CodeStem(before, self.width)  # type: ignore[assignment]

    def _check_image(self, image: Tensor) -> None:
        """Anything that the stem takes."""


class Coder(nn.Module):
    """What a tokenizer is made of once it is trained: trunk, projection to code vectors, codebook."""

    def __init__(self, encoder: ViT, cfg: QuantizerConfig) -> None:
        super().__init__()
        width = encoder.width
        self.encoder = encoder
        self.project = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, cfg.width))
        self.quantizer = Quantizer(cfg)
        self.count = cfg.codes

    def vectors(self, image: Tensor) -> Tensor:
        """What is quantised: [B, N, C], not yet of length 1. In float32 from the trunk's tokens on."""
        tokens = self.encoder(image)[:, self.encoder.prefix :]
        with torch.autocast(image.device.type, enabled=False):
            return self.project(tokens.float())

    @torch.no_grad()
    def codes(self, image: Tensor) -> Tensor:
        """image float [B, 3, S, S], normalised as in training -> int64 [B, N]."""
        return self.quantizer.nearest(F.normalize(self.vectors(image), dim=-1))


class VQKD(Coder):
    """The student: a tokenizer, a decoder that tells a teacher's features from its codes, and their loss.

    forward takes image float [B, 3, S, S], target [B, N, ...] of every patch as the target makes it, and position int64
    [B], and returns what target.loss makes of all patches, ``loss`` with the commitment added. With task="predict" it
    returns {"prediction": [B, N, target.width], "codes": int64 [B, N]}.
    """

    def __init__(self, encoder: ViT, cfg: VQKDConfig, target: "Target", seed: int = 0) -> None:
        super().__init__(encoder, cfg.quantizer)
        self.cfg, self.criterion, self.seed = cfg, target.loss, seed
        model = replace(
            encoder.cfg,
            width=cfg.decoder_width,
            depth=cfg.decoder_depth,
            heads=cfg.decoder_heads,
            mlp_ratio=encoder.size.mlp_ratio,
        )
        self.decoder = Decoder(model, encoder.grid, cfg.quantizer.width)
        width = self.decoder.width
        self.predict = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, target.width))
        for trunk in (self.encoder, self.decoder):
            initialise_trunk(trunk)
        for head in (self.project, self.predict):
            narrow(head)

    @property
    def starts_from(self) -> int:
        """Images whose tokens make the first codebook; 0: none are needed, or there is one (run.init)."""
        return self.cfg.quantizer.start_images if self.quantizer.untouched else 0

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See the class."""
        vectors = self.vectors(batch["image"])
        codewords, codes, commitment = self.quantizer(vectors, batch.get("position"))
        prediction = self.predict(self.decoder(codewords)[:, self.decoder.prefix :])
        if batch.get("task") == "predict":
            return {"prediction": prediction, "codes": codes}
        scalars = self.criterion(prediction, batch["target"])
        found = {"reconstruction": scalars["loss"], "commitment": commitment, "loss": scalars["loss"] + commitment}
        return scalars | found | self.quantizer.scalars() | {"feature_rank": feature_rank(vectors.mean(1))}

    @torch.no_grad()
    def begin(self, batch: dict[str, Any]) -> None:
        """Make the first codebook from the tokens of a batch of ``starts_from`` images."""
        self.quantizer.start(self.vectors(batch["image"]), self.seed)

    def stepped(self, skipped: Tensor) -> None:
        """After each update (see halfseen/engines): the codebook follows. Collective."""
        self.quantizer.stepped(skipped)

    def blocks(self) -> list[nn.Module]:
        """Units to shard, recompute and compile."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def train_flops_per_image(self) -> float:
        """Matmul FLOPs that a training step executes per image: three times its forward; the search for codes once."""
        maps = [part for head in (self.project, self.predict) for part in head if isinstance(part, nn.Linear)]
        heads = 2.0 * sum(part.weight.numel() for part in maps)
        search = 2.0 * self.quantizer.codebook.numel()
        trunks = self.encoder.flops() + self.decoder.flops()
        return 3.0 * (trunks + self.encoder.tokens * heads) + self.encoder.tokens * search
