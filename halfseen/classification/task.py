"""What a classification stage learns: the head, the loss, what trains."""

from dataclasses import dataclass
from typing import Literal

from halfseen import selection
from halfseen.config import ConfigError, at_least, between, positive


@dataclass
class Task:
    """Classification: what the head reads, what the loss is, what trains. Classes come from data.classes."""

    # class: that token after the final norm; mean: of patches, then a norm; norm_mean: of patches after the final norm
    pool: Literal["class", "mean", "norm_mean"] = "mean"  # what the head reads, see above
    loss: Literal["ce", "bce"] = "ce"  # ce: soft-target cross entropy; bce: binary per class (DeiT III)
    smoothing: float = 0.1  # share of the target spread over all classes; needs loss=ce
    head_std: float = 2e-5  # standard deviation of the new head's weights
    train: str = "all"  # all, attention, mlp, head, norms, bias, last:K or lora, or some joined by +; the head always
    train_positions: bool = True  # attention and mlp train position tables too, as DeiT's list does
    strict_official: bool = False  # DeiT's own choice by substring: of parallel attentions only the first trains
    lora_rank: int = 8  # rank of the maps that train=lora adds
    lora_alpha: float = 16.0  # their result is scaled by lora_alpha / lora_rank
    frozen: Literal["fp32", "bf16"] = "fp32"  # type in which frozen linear maps are kept; bf16 needs that precision
    recompute_mlp: bool = False  # recompute a frozen MLP's first product in the backward instead of keeping it
    keep_best: bool = False  # best.safetensors in the run folder: the weights of the best evaluation so far
    mix_stride: int = 0  # mixup and cutmix pair the images at p and p + stride; 0: from run.global_batch

    def check(self, key: str) -> None:
        """Ranges, and options that do not go together."""
        between(f"{key}.smoothing", self.smoothing, 0.0, 0.999)
        positive(f"{key}.head_std", self.head_std)
        positive(f"{key}.lora_rank", self.lora_rank)
        positive(f"{key}.lora_alpha", self.lora_alpha)
        at_least(f"{key}.mix_stride", self.mix_stride, 0)
        selection.check(f"{key}.train", self.train)
        if self.loss == "bce" and self.smoothing:
            raise ConfigError(
                f"{key}.smoothing",
                self.smoothing,
                "loss=bce takes every class above 0 for present, so smoothing would mark all of them",
                f"set {key}.smoothing=0, or {key}.loss=ce",
            )
        if self.strict_official and self.train not in ("attention", "mlp"):
            raise ConfigError(
                f"{key}.strict_official",
                True,
                f"DeiT has no choice called {self.train}",
                f"{key}.train=attention or mlp",
            )
        if self.recompute_mlp and self.train == "all":
            raise ConfigError(
                f"{key}.recompute_mlp",
                True,
                "no MLP is frozen",
                f"{key}.train=attention, or engine.recompute=true for whole blocks",
            )
