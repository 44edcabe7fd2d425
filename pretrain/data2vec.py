"""data2vec for images (Baevski et al., 2022): at hidden patches, predict what the student's average makes of them."""

from typing import Any

from torch import Tensor

from halfseen.models import ViT

from .mim import MIM, MIMConfig
from .targets.features import Average


class Data2Vec(MIM):
    """MIM whose target comes from its own averaged weights (beit/engine_for_cyclical.py).

    The engine keeps the average (engine.ema) and, before each step, runs this student under it with task="teach":
    evaluation mode, nothing hidden. Its answer {"target": float32 [B, N, D]} joins the batch that it is trained on.
    """

    learns_from_average = True

    def __init__(self, encoder: ViT, cfg: MIMConfig, hidden: int, target: Average) -> None:
        super().__init__(encoder, cfg, hidden, target)
        self.average = target

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """As MIM, and the task "teach"."""
        if batch.get("task") != "teach":
            return super().forward(batch)
        blocks = self.average.blocks
        seen = self.encoder.trace(batch["image"], layers=blocks)
        return {"target": self.average.of([seen.layers[block][:, self.encoder.prefix :] for block in blocks])}
