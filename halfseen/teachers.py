"""A frozen network that a student learns from: any timm model, or the trunk and head of an own run."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.checkpoint import read_weights
from halfseen.classification import Classifier, Task
from halfseen.config import ConfigError, at_least
from halfseen.models import trunks
from halfseen.models.vit import Trace
from halfseen.origin import config_of

Section = TypeVar("Section")
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and deviation per channel, of values in [0, 1]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
TIMM = "timm:"


@dataclass
class TeacherConfig:
    """Who teaches, and how it is run."""

    source: str = ""  # timm:NAME, or a run folder or checkpoint of halfseen
    weights: str = "pretrained"  # of a timm model: pretrained (timm fetches them), random, or a file
    classes: int = 0  # of a timm model's head, for weights=random or a file; 0: as timm has it
    part: Literal["model", "ema"] = "model"  # of an own run: its weights, or their average
    image_size: int = 0  # pixels the teacher sees: the student's view, resized; 0: as the student sees it
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # autocast type of its forward
    channels_last: bool = False  # memory format of images and weights; for convolutional teachers on GPUs
    compile: bool = False  # torch.compile its trunk; not where layers of it are recorded
    micro_batch: int = 0  # most images in one pass of the teacher; 0: the student's micro-batch

    def check(self, key: str) -> None:
        """Ranges, and a name where one is needed."""
        for name in ("classes", "image_size", "micro_batch"):
            at_least(f"{key}.{name}", getattr(self, name), 0)
        if self.source == TIMM:
            raise ConfigError(f"{key}.source", self.source, "names no model", "e.g. timm:regnety_160.deit_in1k")


@dataclass(frozen=True)
class Layers:
    """Blocks to record, by their number in the network from 0 on; each use of a shared block counts."""

    qkv: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seen:
    """A teacher's answer to B images; ordinary tensors without gradients."""

    logits: Tensor | None  # float32 [B, K]; None: the teacher has no head
    features: Tensor  # [B, N, D] patch tokens, or the places of a map, after the last norm, row by row
    qkv: tuple[Tensor, ...] = ()  # of each recorded block [B', N', 3D]; B' is B, or B x windows, sample by sample
    hidden: tuple[Tensor, ...] = ()  # of each recorded block its output [B, P + N, D]; prefix tokens first, as in qkv
    prefix: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, P, D] tokens before the patches, as features


@dataclass(frozen=True)
class Source:
    """A teacher's network and what is known of it."""

    module: nn.Module
    name: str
    statistics: Statistics  # of the images it was trained on
    image_size: int  # pixels it is built for
    licence: str


class Teacher:
    """A frozen network in evaluation mode; ``load`` makes one."""

    def __init__(
        self, source: Source, cfg: TeacherConfig, student: Statistics, device: torch.device, key: str = "teacher"
    ) -> None:
        memory = torch.channels_last if cfg.channels_last else torch.contiguous_format
        module: Any = source.module.requires_grad_(False).eval().to(device)
        self.module = module.to(memory_format=memory)
        self.source, self.cfg, self.device, self.key = source, cfg, device, key
        trunk = getattr(module, "encoder", module)
        self.width = int(getattr(trunk, "width", 0) or trunk.num_features)
        self.prefix = int(getattr(trunk, "prefix", getattr(trunk, "num_prefix_tokens", 0)))
        self.classes = int(getattr(module, "classes", getattr(module, "num_classes", 0)))
        self.scale, self.shift = renormalisation(student, source.statistics, device)
        if cfg.compile:
            compile_trunk(self.module)

    def __str__(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return (
            f"{self.source.name}: {count:,} parameters, {self.classes} classes, {self.source.image_size} px, "
            f"{self.cfg.precision}; licence: {self.source.licence}"
        )

    def digest(self) -> str:
        """Identity of the weights; see digest_of."""
        return digest_of(self.module)

    def check(self, classes: int | None = None, layers: Layers | None = None) -> None:
        """Raise ConfigError unless the teacher knows so many classes (None: no matter) and has these layers."""
        if classes is not None and self.classes != classes:
            known = f"{self.classes} classes" if self.classes else "no classification head"
            raise ConfigError(
                f"{self.key}.source",
                self.source.name,
                f"has {known}, the data {classes} classes",
                "use a teacher trained on the same classes, or fine-tune it on them first",
            )
        wanted = (*layers.qkv, *layers.hidden) if layers else ()
        if wanted and self.cfg.compile:
            raise ConfigError(f"{self.key}.compile", True, "a compiled teacher records no layers", "use compile=false")
        depth = depth_of(self.module)
        if wanted and not all(0 <= layer < depth for layer in wanted):
            has = f"{depth} self-attention blocks" if depth else "no self-attention blocks to record"
            raise ConfigError(
                f"{self.key}.source",
                self.source.name,
                f"has {has}, and the layers {sorted(set(wanted))} are asked for",
                "correct the layer lists, or learn from its logits only",
            )

    def logits(self, image: Tensor) -> Tensor:
        """Scores float32 [B, K] of images float [B, 3, S, S] that are normalised for the student."""
        logits = self.look(image).logits
        if logits is None:
            raise ConfigError(f"{self.key}.source", self.source.name, "has no head", "use a fine-tuned model")
        return logits

    def features(self, image: Tensor) -> Tensor:
        """Patch tokens after the last norm, [B, N, D] in the teacher's precision, of the same images."""
        return self.look(image).features

    def look(self, image: Tensor, layers: Layers | None = None) -> Seen:
        """Scores, features, and what is recorded of the given layers, in one pass; image as for ``logits``."""
        with torch.inference_mode():
            parts = [self._look(part, layers or Layers()) for part in image.split(self.cfg.micro_batch or len(image))]
        # Copies, because a tensor made under inference_mode may not be kept for a backward.
        return join(parts)

    def _look(self, image: Tensor, layers: Layers) -> Seen:
        image = torch.addcmul(self.shift, image.float(), self.scale)
        if image.shape[-1] != self.source.image_size:
            image = F.interpolate(image, (self.source.image_size,) * 2, mode="bicubic", antialias=True)
        if self.cfg.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        dtype = AUTOCAST.get(self.cfg.precision)
        autocast: AbstractContextManager[Any] = nullcontext()
        if dtype:
            autocast = torch.autocast(self.device.type, dtype)
        with autocast:
            seen = (own_answer if hasattr(self.module, "encoder") else timm_answer)(self.module, image, layers)
        prefix, features = seen.features.tensor_split([self.prefix], dim=1)
        return Seen(seen.logits, features, seen.qkv, seen.hidden, prefix)


def digest_of(module: nn.Module) -> str:
    """Identity of a network's weights: SHA-256 over every name and value."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def renormalisation(here: Statistics, there: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift [3, 1, 1] that take an image normalised by ``here`` to one normalised by ``there``."""
    mean, spread, mean_there, spread_there = (
        torch.tensor(list(values), dtype=torch.float64).view(3, 1, 1) for values in (*here, *there)
    )
    scale, shift = spread / spread_there, (mean - mean_there) / spread_there
    return scale.float().to(device), shift.float().to(device)


def join(parts: list[Seen]) -> Seen:
    """The answers to consecutive images as one; new tensors."""
    first = parts[0]
    logits = None if first.logits is None else torch.cat([cast(Tensor, part.logits) for part in parts])
    qkv = tuple(torch.cat(tensors) for tensors in zip(*(part.qkv for part in parts)))
    hidden = tuple(torch.cat(tensors) for tensors in zip(*(part.hidden for part in parts)))
    prefix = torch.cat([part.prefix for part in parts])
    return Seen(logits, torch.cat([part.features for part in parts]), qkv, hidden, prefix)


# ------------------------------------------------------------------------------------------------- answers


def compile_trunk(module: Any) -> None:
    """Compile what an answer without recorded layers calls; a module's own call would not be it."""
    if hasattr(module, "encoder"):
        module.encoder.compile()
    else:
        module.forward_features = torch.compile(module.forward_features)


def own_answer(module: Any, image: Tensor, layers: Layers) -> Seen:
    """What an own network says, prefix tokens included: a Classifier, or a bare trunk as ``encoder``."""
    if layers.qkv or layers.hidden:
        trace = module.encoder.trace(image, layers=layers.hidden, qkv=layers.qkv)
    else:
        trace = Trace(module.encoder(image))
    logits = module.scores(trace.tokens).float() if isinstance(module, Classifier) else None
    # Where a classifier's norm comes after its mean, it is the tokens' norm too.
    tokens = module.fc_norm(trace.tokens) if isinstance(module, Classifier) else trace.tokens
    qkv, hidden = (trace.qkv[layer] for layer in layers.qkv), (trace.layers[layer] for layer in layers.hidden)
    return Seen(logits, tokens, tuple(qkv), tuple(hidden))


def timm_answer(module: Any, image: Tensor, layers: Layers) -> Seen:
    """What a timm model says, prefix tokens included.

    Its blocks are recorded by hooks, which a frozen and unsharded network may have.
    """
    qkv: list[Tensor] = []
    hidden: list[Tensor] = []
    handles = []
    for block in recordable(module) if layers.qkv or layers.hidden else ():
        handles.append(block.attn.qkv.register_forward_hook(lambda _, __, output: qkv.append(output)))
        handles.append(block.register_forward_hook(lambda _, __, output: hidden.append(output)))
    try:
        features = module.forward_features(image)
    finally:
        for handle in handles:
            handle.remove()
    logits = module.forward_head(features).float() if module.num_classes else None
    tokens = as_tokens(features, module.num_features)
    states = tuple(as_tokens(hidden[layer], hidden[layer].shape[-1]) for layer in layers.hidden)
    return Seen(logits, tokens, tuple(qkv[layer] for layer in layers.qkv), states)


def as_tokens(features: Tensor, width: int) -> Tensor:
    """[B, N, D] of tokens, of a map [B, h, w, D] or of a map [B, D, h, w]."""
    if features.ndim == 3:
        return features
    return features.flatten(1, 2) if features.shape[-1] == width else features.flatten(2).transpose(1, 2)


def recordable(module: nn.Module) -> list[Any]:
    """Blocks whose attention calls one fused qkv map, in the network's order."""
    attending = (part for part in module.modules() if hasattr(part, "attn"))
    return [part for part in attending if isinstance(getattr(part.attn, "qkv", None), nn.Linear)]


def depth_of(module: nn.Module) -> int:
    """Blocks that can be recorded; in an own trunk each use of a shared block counts."""
    return module.encoder.depth if hasattr(module, "encoder") else len(recordable(module))  # type: ignore[union-attr,return-value]


# ------------------------------------------------------------------------------------------------- loading


def load(
    cfg: TeacherConfig, *, student: Statistics, image_size: int, device: torch.device, key: str = "teacher"
) -> Teacher:
    """The teacher a config names, frozen, on the device.

    student: mean and deviation by which the images it will be shown are normalised. image_size: pixels of the
    student's view. key: where the section stands, for messages.
    """
    if not cfg.source:
        raise ConfigError(f"{key}.source", "", "names no teacher", "e.g. timm:regnety_160.deit_in1k, or a run folder")
    size = cfg.image_size or image_size
    source = from_timm(cfg, size, key) if cfg.source.startswith(TIMM) else from_run(cfg, size, key)
    return Teacher(source, cfg, student, device, key)


def from_timm(cfg: TeacherConfig, image_size: int, key: str) -> Source:
    """A timm model, built for the given size where its family can be."""
    import timm

    name = cfg.source.removeprefix(TIMM)
    pretrained = cfg.weights == "pretrained"
    if pretrained:
        refuse_out_of_reach(name, f"{key}.source", f"{key}.weights")
    head: dict[str, Any] = {"num_classes": cfg.classes} if cfg.classes else {}
    try:
        try:
            model = timm.create_model(name, pretrained=pretrained, img_size=image_size, **head)
        except TypeError:  # families without a fixed grid take any size and have no such argument
            model = timm.create_model(name, pretrained=pretrained, **head)
    except Exception as error:  # timm and its hub raise many kinds; all mean that there is no such teacher
        reason = f"timm cannot make it: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise ConfigError(
            f"{key}.source", cfg.source, reason, f"see timm.list_models(); without a network give {key}.weights=FILE"
        ) from error
    if not pretrained and cfg.weights != "random":
        try:
            given = read_weights(cfg.weights)
        except ConfigError as refused:
            raise ConfigError(f"{key}.weights", cfg.weights, refused.reason, refused.fix) from refused
        fill(model, given, f"{key}.weights", cfg.weights)
    facts: Any = model.pretrained_cfg
    statistics = (facts["mean"], facts["std"])
    return Source(model, cfg.source, statistics, image_size, f"{facts.get('license') or 'not stated'} (timm)")


def refuse_out_of_reach(name: str, key: str, weights_key: str) -> None:
    """Raise ConfigError at once if a model's weights lie on a hub that does not answer, and not in its cache here.

    timm would try for most of a minute before it gives up, on every rank.
    """
    import timm
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    facts = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if facts is None or not facts.hf_hub_id or constants.HF_HUB_OFFLINE:
        return
    repository = repo_folder_name(repo_id=facts.hf_hub_id.partition("@")[0], repo_type="model")
    if any(Path(constants.HF_HUB_CACHE, repository, "snapshots").glob("*/*")):
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except OSError as error:  # refused, unknown host, too late; or an answer that is an error
        if isinstance(error, urllib.error.HTTPError) and error.code < 500:
            return
        reason = f"its weights are not in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} does not answer: {error}"
        fix = f"give {weights_key}=FILE, or fill that cache where there is a network"
        raise ConfigError(key, f"{TIMM}{name}", reason, fix) from error


def from_run(cfg: TeacherConfig, image_size: int, key: str) -> Source:
    """The trunk, and the head where there is one, of a run of any stage."""
    path = Path(cfg.source)
    config = config_of(path)
    if config is None or not path.is_dir():
        raise ConfigError(
            f"{key}.source", cfg.source, "is no run folder or checkpoint", f"name one, or {TIMM}NAME with {key}.weights"
        )
    plain = yaml.safe_load(config.read_text())
    if image_size != plain["data"]["image_size"]:
        raise ConfigError(
            f"{key}.image_size",
            image_size,
            f"the run {path} was trained on {plain['data']['image_size']} px",
            f"set {key}.image_size to that: the view is then resized for the teacher",
        )
    weights = read_weights(path, cfg.part)
    encoder = trunks.build(trunks.section_in(plain), image_size)
    module: nn.Module
    if "task" in plain and "head.weight" in weights:  # a head without a task predicts targets, not classes
        module = Classifier(encoder, section(Task, plain["task"]), len(weights["head.weight"]))
    else:
        module = nn.Module()
        module.encoder = encoder
    fill(module, {name: weights[name] for name in weights if name in module.state_dict()}, f"{key}.source", cfg.source)
    augment = plain["augment"]
    return Source(module, cfg.source, (augment["mean"], augment["std"]), image_size, "your own run's")


def section(schema: type[Section], plain: Mapping[str, Any]) -> Section:
    """A config section from its plain values."""
    return cast(Section, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain)))


def fill(module: nn.Module, weights: Mapping[str, Tensor], key: str, value: str) -> None:
    """Load every weight of a teacher; ConfigError when one is missing or of another shape: a teacher must be whole."""
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        reason = "does not fit: " + " ".join(str(error).split())[:300]
        raise ConfigError(key, value, reason, "give the weights of exactly this model") from error
