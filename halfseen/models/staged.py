"""What trunks of several resolutions have in common when mask tokens stand in for hidden patches (SimMIM)."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from halfseen.config import ConfigError

from .vit import Trace

Hide = Callable[[Tensor], Tensor]  # from what leaves a stem, [B, h, w, C], to what enters the first block


class Staged(nn.Module):
    """Images to the tokens of the last stage; what a subclass adds is ``encode``.

    patch and stride are pixels on the side of a place of the stem and of the last stage, stem_width and width their
    channels; grid and tokens count the places of the last stage, prefix the tokens before them.
    """

    # What only ViTs have.
    dist_token = None
    pos_embed = None

    cfg: Any
    image_size: int  # pixels on a side
    patch: int
    stride: int
    stem_width: int
    width: int
    grid: tuple[int, int]
    tokens: int
    prefix: int = 0
    depth: int

    def encode(self, image: Tensor, hide: Hide) -> Tensor:
        """image [B, 3, S, S] -> tokens after the final norm [B, prefix + N, C]; ``hide`` stands behind the stem."""
        raise NotImplementedError

    def forward(self, image: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """image float [B, 3, S, S] -> tokens of the last stage after the final norm, [B, prefix + N, C].

        mask bool [B, K*K], True = hidden, on any grid whose cells are whole places of the stem: those are replaced by
        mask_token [1, 1, C'] (C' channels of the stem). Before it their pixels take the mean colour, because the
        kernels of some stems reach into the neighbours.
        """
        if mask is None or mask_token is None:
            return self.encode(image, lambda places: places)
        grey = image.new_zeros(1, 1, image.shape[1])
        seen = hide_places(image.permute(0, 2, 3, 1), mask, grey).permute(0, 3, 1, 2)
        return self.encode(seen, lambda places: hide_places(places, mask, mask_token))

    def trace(
        self,
        image: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        *,
        layers: Collection[int] = (),
        qkv: Collection[int] = (),
    ) -> Trace:
        """The tokens alone. Raises ConfigError if what single blocks compute is asked for."""
        if layers or qkv:
            fix = "learn from scores and features alone, or use trunk=vit or trunk=swin"
            raise ConfigError("trunk", type(self).__name__, "does not tell what its blocks compute", fix)
        return Trace(self(image, mask, mask_token))

    def flops(self) -> float:
        """Forward matmul and convolution FLOPs per image (a multiply-add is 2), counted on tensors without values."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            twin = type(self)(self.cfg, self.image_size).eval()
            twin(torch.zeros(1, 3, self.image_size, self.image_size))
        return float(counter.get_total_flops())


def hide_places(x: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """x [B, h, w, C] with token [1, 1, C] where mask bool [B, K*K] is True; K divides h and w."""
    side = round(mask.shape[1] ** 0.5)
    cell = x.shape[1] // side
    hidden = mask.view(-1, side, side).repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    return torch.where(hidden[..., None], token.to(x.dtype), x)
