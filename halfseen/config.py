"""Typed configuration: the sections that stages share, and how an option is refused.

The engine's section is in halfseen/engine_config.py. halfseen/recipes.py fills them from files and command lines;
``check`` refuses with ConfigError what needs no device to be wrong.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A refused option. The message names the key, the value and the fix."""

    def __init__(self, key: str, value: object, reason: str, fix: str) -> None:
        self.key, self.value, self.reason, self.fix = key, value, reason, fix
        super().__init__(f"{key}={value!r}: {reason}\n  fix: {fix}")

    def __reduce__(self) -> tuple[Any, ...]:  # so that it passes from one process to another
        return type(self), (self.key, self.value, self.reason, self.fix)


# ---------------------------------------------------------------------------------------------------- sections


@dataclass
class Model:
    """The trunk: one ViT whose parts are independent choices (see halfseen/models)."""

    size: Literal["ti", "s", "b", "l", "h", "g"] = "b"  # width, depth, heads, patch; see halfseen/models/sizes.py
    width: int | None = None  # channels D; None takes it from size
    depth: int | None = None  # blocks L; None takes it from size
    heads: int | None = None  # attention heads H; None takes it from size
    patch: int | None = None  # pixels on a patch's side; None takes it from size
    mlp_ratio: float | None = None  # hidden width of the MLP over D; None takes it from size
    stem: Literal["patch", "hmlp", "conv"] = "patch"  # patch: one linear map; hmlp: patch-independent; conv: 3x3s
    stem_norm: Literal["layer", "batch"] = "layer"  # norm inside hmlp and conv stems; batch is hMLP as published
    position: Literal["none", "learned", "sincos"] = "learned"  # absolute position embedding added to patches
    position_on_class: bool = True  # learned/sincos tables have a row for the class token (DeiT III has none)
    relative: Literal["none", "shared", "block"] = "none"  # BEiT's bias on scores: a table for all blocks, or each
    rope: bool = False  # queries and keys turned by row and column (rotary positions)
    rope_base: float = 100.0  # slowest angle of rope is about 1/base per patch
    irpe: Literal["none", "product", "euclidean", "quant", "cross"] = "none"  # iRPE: how offsets fall into buckets
    irpe_on: Literal["q", "k", "v", "qk", "qv", "kv", "qkv"] = "k"  # iRPE: on queries, keys, values
    irpe_mode: Literal["contextual", "bias"] = "contextual"  # iRPE: encodings times query or key, or added as they are
    irpe_shared: bool = True  # iRPE: one table for all heads, else one per head
    irpe_ratio: float = 1.9  # iRPE: c; offsets up to c patches have a bucket each, from 8c on they share one
    # softmax over all tokens; reattention: its maps mixed across heads (DeepViT); strided: keys and values from a
    # strided convolution of the grid; convolutional: a window around each patch (both from how-do-vits-work)
    attention: Literal["softmax", "reattention", "strided", "convolutional"] = "softmax"  # DeepViT's; or over the grid
    attention_stride: int = 2  # strided: keys and values come from a convolution of this kernel and stride
    attention_kernel: int = 3  # convolutional: patches on a side of the window each patch looks at; odd
    attention_dilation: int = 1  # convolutional: patches from one of the window to the next
    attention_padding: Literal["masked", "zero"] = "masked"  # convolutional: places outside get no weight, or score 0
    head_width: int | None = None  # strided, convolutional: channels of a head; None: width / heads
    attention_blocks: list[int] = field(default_factory=list)  # blocks, from 0, whose attention is not softmax; []: all
    attention_dropout: float = 0.0  # probability of dropping a weight of softmax attention or reattention in training
    head_mixing: Literal["none", "linear", "affine"] = "none"  # maps over heads around the softmax; affine: with bias
    class_token: bool = True  # prepend one learned token
    distillation_token: bool = False  # one more learned token after the class token, for a teacher's answer (DeiT)
    registers: int = 0  # extra learned tokens without a meaning (Darcet et al., 2023)
    peg: int = 0  # convolutions that tell positions (PEG, CPVT), one behind each of the first so many blocks
    norm: Literal["layer", "power"] = "layer"  # norm of the blocks and the last one; power: PowerNorm
    norm_place: Literal["pre", "post", "res_post"] = "pre"  # x + f(n(x)); n(x + f(x)), no last norm; x + n(f(x))
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu: gated, hidden width 2/3, so that parameters stay as many
    parallel: int = 1  # branches per block: n attentions side by side, then n MLPs (Three things, eq. 2)
    share: int = 1  # consecutive blocks that share attention and MLP weights (MiniViT); depth must divide by it
    groups: list[int] = field(default_factory=list)  # instead: how many blocks share, group by group, e.g. [1,2,2,1]
    layer_scale: float | None = None  # initial value of the per-channel residual scale; None: no LayerScale
    drop_path: float = 0.0  # probability of dropping a whole sample's residual branch
    drop_path_shape: Literal["linear", "constant"] = "linear"  # ramp from 0 over depth, or the same everywhere
    qkv_bias: bool = True  # bias on q, k and v; strided and convolutional attention have none
    key_bias: bool = True  # with qkv_bias: bias on k too; BEiT has none there
    norm_eps: float = 1e-6  # LayerNorm epsilon

    def check(self, key: str) -> None:
        """Refuse what needs no tensor to be wrong."""
        positive(f"{key}.parallel", self.parallel)
        positive(f"{key}.share", self.share)
        for name in ("drop_path", "attention_dropout"):
            between(f"{key}.{name}", getattr(self, name), 0.0, 0.99)
        for name in ("registers", "peg"):
            at_least(f"{key}.{name}", getattr(self, name), 0)
        for name in ("irpe_ratio", "attention_stride", "attention_kernel", "attention_dilation"):
            positive(f"{key}.{name}", getattr(self, name))
        if not self.rope_base > 1:
            raise ConfigError(f"{key}.rope_base", self.rope_base, "is not above 1", "use e.g. 100")
        positive(f"{key}.norm_eps", self.norm_eps)
        for name in ("width", "depth", "heads", "head_width", "patch", "mlp_ratio"):
            if getattr(self, name) is not None:
                positive(f"{key}.{name}", getattr(self, name))


@dataclass
class Source:
    """One set of shards in a mixture."""

    shards: str = ""  # folder, glob, brace pattern, URL, pipe: command, or embedded:NAME
    weight: float = 1.0  # relative share of positions this source fills; ignored when it is the only one


@dataclass
class Data:
    """Where images come from and how their order is made (see halfseen/data)."""

    train: list[Source] = field(default_factory=list)  # a plain string or list of strings is accepted too
    val: str | None = None  # shards of the evaluation set; None: no evaluation
    label: str = "cls"  # where a label is: a member's extension (text integer), json:KEY, folder, or none
    classes: int = 0  # number of classes; 0 where labels are not used
    image_size: int = 224  # pixels on a side after cropping
    eval_crop: float | None = None  # evaluation: shown share of the shorter side; None: 0.875, above 224 px 1
    workers: int = 4  # loader processes per rank; 0 reads in the training process
    prefetch: int = 4  # micro-batches each worker keeps ready
    chunk: int = 256  # consecutive samples that stay together until the window shuffle
    window: int = 2048  # samples of one lane permuted among each other; lanes x window are mixed
    lanes: int = 64  # parallel streams; a multiple of the world size keeps each chunk on one rank
    repeats: int = 1  # repeated augmentation: each image this many times in a row, augmented differently
    limit: int = 0  # use only the first N samples of each source; 0: all
    decode: Literal["auto", "pillow"] = "auto"  # auto: simplejpeg where it can, Pillow for the rest
    max_pixels: int = 100_000_000  # an image that claims more pixels than this counts as bad
    bad_limit: float = 0.001  # share of bad samples, since the run began, above which it stops; 10 pass always, 0: none
    cache: str | None = None  # folder on local disk for remote shards; required for remote shards
    cache_gib: float = 0.0  # evict least recently used shards above this size in GiB; 0: never

    def check(self, key: str) -> None:
        """Ranges."""
        for name in ("image_size", "prefetch", "chunk", "window", "lanes", "repeats", "max_pixels"):
            positive(f"{key}.{name}", getattr(self, name))
        for name in ("workers", "limit", "classes"):
            at_least(f"{key}.{name}", getattr(self, name), 0)
        between(f"{key}.bad_limit", self.bad_limit, 0.0, 1.0)
        if self.eval_crop is not None:
            between(f"{key}.eval_crop", self.eval_crop, 0.1, 1.0)
        at_least(f"{key}.cache_gib", self.cache_gib, 0.0)
        for number, source in enumerate(self.train):
            if not source.shards:
                raise ConfigError(f"{key}.train[{number}].shards", "", "is empty", "name a folder or a pattern of tars")
            if not source.weight > 0:
                raise ConfigError(f"{key}.train[{number}].weight", source.weight, "is not positive", "use a weight > 0")


@dataclass
class Augment:
    """What is done to a training image; everything is drawn from (seed, position)."""

    crop_scale: tuple[float, float] = (0.2, 1.0)  # random resized crop: share of the area, lowest and highest
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # width over height of the crop
    simple_crop: bool = False  # instead: shorter side to the size, 4 reflected pixels around it, a crop of the size
    flip: float = 0.5  # probability of a left-right flip
    three_augment: bool = False  # one of greyscale, solarisation, Gaussian blur, before the jitter (DeiT III)
    jitter: float = 0.0  # colour jitter strength (brightness, contrast, saturation); 0: off
    randaugment: str = ""  # timm's string, e.g. rand-m9-mstd0.5-inc1; empty: off
    erase: float = 0.0  # probability of random erasing (pixel noise)
    mixup: float = 0.0  # Beta parameter of mixup; 0: off
    cutmix: float = 0.0  # Beta parameter of cutmix; 0: off
    mix_probability: float = 1.0  # share of batches that are mixed at all
    switch_probability: float = 0.5  # share of mixed batches that use cutmix when both are on
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # subtracted after scaling to [0, 1], per channel RGB
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # divided by, per channel RGB

    def check(self, key: str) -> None:
        """Ranges."""
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"{key}.crop_scale", self.crop_scale, "is not 0 < low <= high <= 1", "e.g. [0.2, 1.0]")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ConfigError(f"{key}.crop_ratio", self.crop_ratio, "is not 0 < low <= high", "e.g. [0.75, 1.3333]")
        for name in ("flip", "erase", "mix_probability", "switch_probability"):
            between(f"{key}.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("jitter", "mixup", "cutmix"):
            at_least(f"{key}.{name}", getattr(self, name), 0.0)
        if not min(self.std) > 0:
            raise ConfigError(f"{key}.std", self.std, "divides a channel, so all must be > 0", "use [1, 1, 1] for none")

    def refuse(self, names: Sequence[str], reason: str) -> None:
        """Raise ConfigError for the first of some options that is on: a stage that lacks it would ignore it."""
        for name in names:
            if value := getattr(self, name):
                raise ConfigError(f"augment.{name}", value, reason, f"set augment.{name}={str(type(value)()).lower()}")


@dataclass
class Optim:
    """Optimizer and schedule; the rate is set at every step from the images consumed."""

    name: Literal["adamw", "lamb", "lars", "sgd"] = "adamw"
    base_lr: float | None = 1.5e-4  # rate per base_batch images: lr = base_lr x global_batch / base_batch
    base_batch: int = 256  # images the base rate refers to
    lr: float | None = None  # absolute rate; set base_lr to null when this is given
    min_lr: float = 0.0  # absolute rate at the end of the schedule
    warmup: str = "40ep"  # duration of the linear ramp from warmup_lr
    warmup_lr: float = 0.0  # absolute rate at the first image
    schedule: Literal["cosine", "constant", "steps", "timm", "beit"] = "cosine"  # past the warm-up (timm's: from 0 on)
    drops: list[str] = field(default_factory=list)  # steps: durations from the start at which the rate drops, [700ep]
    drop: float = 0.1  # steps: what the rate is multiplied by at each of drops
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW and LAMB moments
    eps: float | None = None  # AdamW and LAMB denominator; None: 1e-8 for AdamW, 1e-6 for LAMB as in timm and apex
    momentum: float = 0.9  # LARS and SGD
    weight_decay: float = 0.05  # decoupled decay of tensors with two or more axes
    decay_tokens: bool = True  # decay class, mask and position tensors too (MAE pretraining does)
    no_decay: list[str] = field(default_factory=list)  # more tensors without decay, by the last part of their names
    layer_decay: float = 1.0  # each block's rate is this times the next one's; 1: off
    clip: float | None = None  # largest gradient norm; None: no clipping

    def check(self, key: str) -> None:
        """One rate, sane ranges."""
        if (self.lr is None) == (self.base_lr is None):
            raise ConfigError(
                f"{key}.lr",
                self.lr,
                f"exactly one of {key}.lr and {key}.base_lr must be set (base_lr is {self.base_lr})",
                f"set the other to null, e.g. {key}.base_lr=null {key}.lr=1e-3",
            )
        for name in ("lr", "base_lr", "clip", "eps"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{key}.{name}", getattr(self, name), "is not positive", "use a number > 0, or null")
        for name, decays in (("betas", self.betas), ("momentum", (self.momentum,))):
            if not all(0 <= decay < 1 for decay in decays):
                raise ConfigError(f"{key}.{name}", getattr(self, name), "is outside [0, 1)", "e.g. betas=[0.9,0.95]")
        between(f"{key}.layer_decay", self.layer_decay, 0.01, 1.0)
        between(f"{key}.drop", self.drop, 0.0, 1.0)
        positive(f"{key}.base_batch", self.base_batch)
        self._check_drops(key)
        for name in ("min_lr", "warmup_lr", "weight_decay"):
            at_least(f"{key}.{name}", getattr(self, name), 0.0)

    def _check_drops(self, key: str) -> None:
        """Drops belong to schedule=steps, which has no other end."""
        steps = self.schedule == "steps"
        if steps != bool(self.drops):
            reason = f"goes with {key}.schedule=steps, and neither without the other"
            fix = f"set both, {key}.schedule=steps {key}.drops=[700ep], or neither"
            raise ConfigError(f"{key}.drops", self.drops, reason, fix)
        if steps and self.min_lr:
            reason = f"means nothing where {key}.drop says how far the rate falls"
            raise ConfigError(f"{key}.min_lr", self.min_lr, reason, "leave it at 0")
        for text in self.drops:
            duration(f"{key}.drops", text, epoch=1, total=100, batch=1)  # each says a time; Spans knows which

    def peak(self, global_batch: int) -> float:
        """The absolute rate after the warm-up."""
        return self.lr if self.lr is not None else (self.base_lr or 0.0) * global_batch / self.base_batch


@dataclass
class Run:
    """The run itself. Durations: plain images, or 10k / 1.5M / 300ep, or N% of run.images where said."""

    folder: str = ""  # where config, logs and checkpoints live; an existing run there is resumed
    seed: int = 0  # with a position, decides order, crops, masks, mixing
    images: str = "800ep"  # duration of the run
    global_batch: int = 4096  # images per update over all ranks
    micro_batch: int | None = None  # most images one device holds at once; None: the whole share of a rank
    checkpoint_every: str = "20ep"  # duration between checkpoints; one is always written at the end
    keep: int = 3  # newest checkpoints kept; the last healthy one is never deleted
    async_save: bool = True  # write checkpoints beside the training; False waits until each is on disk
    stall_minutes: float = 20.0  # no step for so long: dump stacks and exit; above the longest evaluation; 0: off
    log_every: str = "100 steps"  # duration between log lines; N steps is accepted here
    evaluate_every: str = "1ep"  # duration between evaluations (stages that evaluate)
    picture_every: str = "5%"  # duration between pictures in TensorBoard; 0: never
    init: str | None = None  # weights to start from: a run folder, a checkpoint, or a .safetensors/.pth file
    init_part: Literal["model", "ema"] = "model"  # of a run or checkpoint: its weights, or their averages
    init_coverage: float = 0.9  # least share of the trunk's weights that init must fill
    init_grid: list[int] = field(default_factory=list)  # patches down and across init's position tables; []: found out

    def check(self, key: str) -> None:
        """Ranges."""
        between(f"{key}.seed", self.seed, 0, 2**63 - 1)
        positive(f"{key}.global_batch", self.global_batch)
        positive(f"{key}.keep", self.keep)
        at_least(f"{key}.stall_minutes", self.stall_minutes, 0.0)
        if self.micro_batch is not None:
            positive(f"{key}.micro_batch", self.micro_batch)
        between(f"{key}.init_coverage", self.init_coverage, 0.0, 1.0)
        if self.init_grid and (len(self.init_grid) != 2 or min(self.init_grid) < 1):
            raise ConfigError(f"{key}.init_grid", self.init_grid, "is not two numbers above 0", "e.g. [14,28]")


@dataclass
class Alarm:
    """A scalar that must stay within bounds; looked at whenever the run logs."""

    scalar: str = ""  # its name in metrics.jsonl, e.g. dead_codes or feature_rank
    below: float | None = None  # alarm when its mean since the last log is below this
    above: float | None = None  # or above this
    after: str = "0"  # duration from the start without an alarm: images, or N% of run.images
    stop: bool = False  # end the run, else warn once

    def check(self, key: str) -> None:
        """A name, and at least one bound."""
        if not self.scalar or (self.below is None and self.above is None):
            raise ConfigError(key, self.scalar, "names no scalar or no bound", "e.g. {scalar: feature_rank, below: 2}")
        duration(f"{key}.after", self.after, total=100)


@dataclass
class Monitor:
    """What is reported, and where."""

    tensorboard: bool = True  # write event files
    histograms: bool = False  # weight histograms with each picture
    peak_tflops: float | None = None  # of one device, for MFU; None: bf16 peak of known GPUs (in fp32 too), else no MFU
    wait_warning: float = 0.1  # share of time spent waiting for data above which the run says it is loader-bound
    alarms: list[Alarm] = field(default_factory=list)  # scalars to keep within bounds

    def check(self, key: str) -> None:
        """Each alarm's own."""
        for number, alarm in enumerate(self.alarms):
            alarm.check(f"{key}.alarms[{number}]")


# ---------------------------------------------------------------------------------------------------- checks


def positive(key: str, value: float) -> None:
    """Raise ConfigError unless value > 0."""
    if not value > 0:
        raise ConfigError(key, value, "is not positive", "use a number > 0")


def at_least(key: str, value: float, least: float) -> None:
    """Raise ConfigError unless value >= least."""
    if not value >= least:
        raise ConfigError(key, value, f"is below {least}", f"use a number >= {least}")


def between(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(key, value, f"is outside [{low}, {high}]", f"use a number from {low} to {high}")


# ---------------------------------------------------------------------------------------------------- durations

_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(k|m|ep|%|steps?)?\s*", re.IGNORECASE)


def duration(
    key: str, text: str, *, epoch: int | None = None, total: int | None = None, batch: int | None = None
) -> int:
    """Images in a duration: ``12800``, ``500k``, ``10M``, ``300ep``, ``5%`` (of total), ``100 steps``.

    epoch: images in one pass over the data. total: images of the run. batch: global batch. Each is needed only by
    its own unit. Raises ConfigError for anything else, and for a unit that makes no sense where it stands.
    """
    match = _DURATION.fullmatch(str(text))
    if not match:
        raise ConfigError(key, text, "is not a duration", "use images (12800, 500k, 10M), epochs (300ep) or 5%")
    number, unit = float(match[1]), (match[2] or "").lower()
    scale = {"": 1, "k": 1_000, "m": 1_000_000, "ep": epoch, "%": total and total / 100}.get(unit, batch)
    if scale is None:
        raise ConfigError(key, text, f"has no meaning here: the unit {unit!r} is not known yet", "say it in images")
    return round(number * scale)
