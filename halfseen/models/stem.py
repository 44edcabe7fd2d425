"""Stems: from pixels to tokens.

The patch and hMLP stems see one patch at a time, so they work on patches [..., 3, P, P] wherever those come
from: the whole image, or only the patches an encoder is shown. Every kernel equals its stride there, so each
convolution is a matrix product on rearranged pixels; the weights keep the shapes and names of the published
convolutions.
"""

import torch
from torch import Tensor, nn

from halfseen.config import ConfigError

from .linear import linear
from .norm import norm_of

# Patch side -> kernel (= stride) of each step of the hMLP stem. 16 is the published one.
HMLP_FACTORS: dict[int, tuple[int, ...]] = {
    8: (2, 2, 2),
    14: (7, 2),
    16: (4, 2, 2),
    28: (7, 2, 2),
    32: (4, 2, 4),
}


def cut(image: Tensor, patch: int) -> Tensor:
    """View an image as its patches: [B, 3, h*P, w*P] -> [B, h, w, 3, P, P], nothing copied."""
    batch, channels, height, width = image.shape
    tiles = image.view(batch, channels, height // patch, patch, width // patch, patch)
    return tiles.permute(0, 2, 4, 1, 3, 5)


class PatchwiseStem(nn.Module):
    """A stem whose tokens depend on one patch each; subclasses say how, in tokens()."""

    patch: int

    def forward(self, image: Tensor, index: Tensor | None = None) -> Tensor:
        """image [B, 3, h*P, w*P] -> tokens [B, h*w, D]; index int64 [B, M]: those alone, [B, M, D]."""
        patches = cut(image, self.patch)
        if index is None:
            return self.tokens(patches).flatten(1, 2)
        sample = torch.arange(len(image), device=image.device)[:, None]
        across = patches.shape[2]
        return self.tokens(patches[sample, index // across, index % across])

    def tokens(self, patches: Tensor) -> Tensor:
        """patches [..., 3, P, P] -> tokens [..., D]."""
        raise NotImplementedError


class PatchStem(PatchwiseStem):
    """One linear map per patch (ViT)."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, patch)

    def initialise(self) -> None:
        """As the linear map it is; the bias keeps the convolution's default, as in MAE."""
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))

    def tokens(self, patches: Tensor) -> Tensor:
        """patches [..., 3, P, P] -> tokens [..., D]."""
        return linear(patches.flatten(-3), self.proj.weight.flatten(1), self.proj.bias)

    def flops(self) -> float:
        """Forward matmul FLOPs per token."""
        return 2.0 * self.proj.weight.numel()


class HMLPStem(PatchwiseStem):
    """Hierarchical MLP stem (Three things, 2022): growing sub-patches, never across a patch's border.

    Steps of convolution, norm, GELU; no GELU after the last norm. With BatchNorm in training mode tokens mix
    through the batch statistics.
    """

    def __init__(self, width: int, patch: int, norm: str, eps: float) -> None:
        super().__init__()
        if patch not in HMLP_FACTORS:
            raise ConfigError(
                "model.patch",
                patch,
                "the hmlp stem is not defined for this patch side",
                f"use one of {sorted(HMLP_FACTORS)}",
            )
        if width % 4:
            raise ConfigError("model.width", width, "the hmlp stem starts from width/4 channels", "use a multiple of 4")
        self.patch, self.factors = patch, HMLP_FACTORS[patch]
        steps: list[nn.Module] = []
        before = 3
        for number, factor in enumerate(self.factors):
            last = number == len(self.factors) - 1
            after = width if last else width // 4
            steps += [nn.Conv2d(before, after, factor, factor), norm_of(norm, after, eps)]
            steps += [] if last else [nn.GELU()]
            before = after
        self.proj = nn.Sequential(*steps)

    def initialise(self) -> None:
        """The convolutions keep PyTorch's default, as published."""

    def tokens(self, patches: Tensor) -> Tensor:
        """patches [..., 3, P, P] -> tokens [..., D]."""
        x = patches.movedim(-3, -1)
        for module in self.proj:
            x = _convolve(x, module) if isinstance(module, nn.Conv2d) else module(x)
        return x.flatten(-3)

    def flops(self) -> float:
        """Forward matmul FLOPs per token."""
        convolutions = [module for module in self.proj if isinstance(module, nn.Conv2d)]
        total, places = 0.0, 1
        for convolution, factor in zip(reversed(convolutions), reversed(self.factors)):
            total += 2.0 * convolution.weight.numel() * places
            places *= factor * factor
        return total


def _convolve(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A convolution whose kernel is its stride, channels-last: [..., H, W, C] -> [..., H/k, W/k, C']."""
    k = convolution.kernel_size[0]
    x = x.unflatten(-2, (-1, k)).unflatten(-4, (-1, k))  # [..., H/k, k, W/k, k, C]
    x = x.transpose(-4, -3).flatten(-3)  # [..., H/k, W/k, k*k*C]
    # Rearranging the weight, not the activations, keeps channels contiguous: fewer and longer copies.
    return linear(x, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)


class ConvStem(nn.Module):
    """Overlapping 3x3 convolutions of stride 2, one per halving (Graham et al., LeViT): P = 16 takes four.

    Tokens see beyond their patch, so an encoder of visible patches cannot use it.
    """

    def __init__(self, width: int, patch: int, norm: str, eps: float) -> None:
        super().__init__()
        count = patch.bit_length() - 1
        if patch < 2 or patch != 1 << count:
            raise ConfigError("model.patch", patch, "the conv stem halves: it needs a power of two", "use 8, 16 or 32")
        if width % (1 << (count - 1)):
            raise ConfigError(
                "model.width",
                width,
                f"the conv stem starts from width/{1 << (count - 1)} channels",
                "change model.width",
            )
        steps: list[nn.Module] = []
        before = 3
        for number in range(count):
            after = width >> (count - 1 - number)
            steps += [nn.Conv2d(before, after, 3, 2, 1, bias=False), norm_of(norm, after, eps)]
            steps += [nn.GELU()] if number < count - 1 else []
            before = after
        self.proj = nn.Sequential(*steps)

    def initialise(self) -> None:
        """The convolutions keep PyTorch's default."""

    def forward(self, image: Tensor, index: Tensor | None = None) -> Tensor:
        """image [B, 3, h*P, w*P] -> tokens [B, h*w, D]."""
        if index is not None:
            raise ValueError("the conv stem cannot run on some patches only: its kernels overlap")
        x = image
        for module in self.proj:
            if isinstance(module, nn.Conv2d):
                x = module(x)
            else:
                x = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x.flatten(2).transpose(1, 2)

    def flops(self) -> float:
        """Forward matmul FLOPs per token."""
        convolutions = [module for module in self.proj if isinstance(module, nn.Conv2d)]
        return sum(2.0 * conv.weight.numel() * 4**number for number, conv in enumerate(reversed(convolutions)))


def stem_of(kind: str, width: int, patch: int, norm: str, eps: float) -> PatchStem | HMLPStem | ConvStem:
    """The stem a config names."""
    if kind == "patch":
        return PatchStem(width, patch)
    return (HMLPStem if kind == "hmlp" else ConvStem)(width, patch, norm, eps)
