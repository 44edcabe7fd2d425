"""Reference cases of official implementations: reading one, and comparing numbers with it.

A family of cases is one Family in the FAMILIES of a ``golden_*.py`` file beside this one; that is all
``halfseen conformance`` needs to find it.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from halfseen.config import Model
from halfseen.layouts import Layout

RTOL, ATOL = 1e-4, 2e-5  # outputs and gradients: above the reference's own rounding, below the slips it lists
LOSS_RTOL = 1e-5


@dataclass(frozen=True)
class Case:
    """One case: what the original was given and what it returned."""

    name: str
    meta: dict[str, Any]  # the json file
    state: dict[str, Tensor]  # weights under the original's names
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    teacher: dict[str, Tensor]  # weights of a teacher, where the case has one

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the original class or function."""
        return self.meta["config"]

    @classmethod
    def read(cls, path: Path) -> "Case":
        """A case from its json file and the tensors beside it. A tensor of an unknown kind is an error.

        What our code is given is float32, whatever it is stored as; results stay as they are.
        """
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "in": {}, "out": {}, "state_teacher": {}}
        meta, tensors = json.loads(path.read_text()), path.with_suffix(".safetensors")
        if meta.get("tensors") and not tensors.is_file():
            raise FileNotFoundError(f"{tensors.name}, the case's tensors, is not there")
        for key, value in load_file(tensors).items() if tensors.is_file() else ():
            kind, name = key.split("/", 1)
            if kind not in parts:
                raise ValueError(f"{key} is of no known kind: {sorted(parts)}")
            parts[kind][name] = value.float() if kind != "out" and value.is_floating_point() else value
        return cls(path.stem, meta, *parts.values())


@dataclass(frozen=True)
class Check:
    """One comparison. Passes when |actual - expected| <= atol + rtol * |expected| everywhere."""

    name: str
    actual: Tensor
    expected: Tensor
    rtol: float = RTOL
    atol: float = ATOL

    @property
    def difference(self) -> tuple[float, float]:
        """Largest absolute difference, and the same over the largest expected magnitude."""
        if self.actual.shape != self.expected.shape:
            return math.inf, math.inf
        if not self.expected.numel():
            return 0.0, 0.0
        apart = (self.actual.double() - self.expected.double()).abs().max().item()
        scale = self.expected.double().abs().max().item()
        return apart, apart / scale if scale else (0.0 if apart == 0 else math.inf)

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        if self.actual.shape != self.expected.shape:
            return False
        actual, expected = self.actual.double(), self.expected.double()
        return bool(((actual - expected).abs() <= self.atol + self.rtol * expected.abs()).all())


@dataclass(frozen=True)
class Family:
    """Cases of one kind: those whose name starts with prefix and whose original lies in repo and source."""

    prefix: str
    repo: str
    source: str  # a part of the original's path
    run: Callable[[Case], list[Check]]
    derived: Mapping[str, str] = field(default_factory=dict)  # output that need not be compared -> why


def exact(name: str, actual: Tensor, expected: Tensor) -> Check:
    """A comparison of integers or booleans."""
    return Check(name, actual, expected, rtol=0.0, atol=0.0)


def numbers(
    name: str, actual: Iterable[float], expected: Iterable[float], rtol: float = 1e-9, atol: float = 0.0
) -> Check:
    """A comparison of tables of Python numbers, in double."""
    pair = [torch.tensor(list(values), dtype=torch.float64) for values in (actual, expected)]
    return Check(name, pair[0], pair[1], rtol, atol)


def names(name: str, actual: Collection[str], expected: Collection[str]) -> Check:
    """A comparison of sets of names: the count of those only one side has must be 0."""
    return exact(name, torch.tensor(len(set(actual) ^ set(expected))), torch.tensor(0))


def outputs(case: Case, actual: Mapping[str, Tensor]) -> list[Check]:
    """Compare every output of the case that ``actual`` has, each by the tolerance of its kind."""
    floor, size = residue(case), weighted_size(case, actual)
    checks = []
    for name, expected in case.outputs.items():
        if name not in actual:
            continue
        value = actual[name].detach()
        if not expected.is_floating_point():
            checks.append(exact(f"out/{name}", value, expected))
        elif "loss" in name and not name.startswith("grad"):
            checks.append(Check(f"out/{name}", value, expected, rtol=LOSS_RTOL, atol=LOSS_RTOL * size))
        else:
            atol = ATOL
            if name.startswith("grad") and expected.abs().max().item() < floor:
                atol = max(ATOL, floor)
            checks.append(Check(f"out/{name}", value, expected, atol=atol))
    return checks


def weighted_size(case: Case, actual: Mapping[str, Tensor]) -> float:
    """What size a sum of results times random weights has; 0 where the case's loss is no such sum.

    Its terms have either sign, so that the sum itself may come out near 0; its rounding does not.
    """
    weight = case.inputs.get("loss_weight")
    if weight is None:
        return 0.0
    results = [value.detach() for value in actual.values() if value.shape == weight.shape]
    return max(((result.double() * weight.double()).norm().item() for result in results), default=0.0)


def residue(case: Case) -> float:
    """The size below which a whole gradient is nothing but rounding.

    A bias before a BatchNorm in training has gradient 0; either side computes it as the sum of terms as large
    as the other gradients, with float32's rounding of those. It must stay as small, no more.
    """
    sizes = [value.abs().max().item() for name, value in case.outputs.items() if name.startswith("grad/")]
    return 4e-6 * max(sizes, default=0.0)


def gradients(student: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Every gradient under the original's name, as ``grad/NAME``.

    A parameter that trains and took no part has gradient 0: the original multiplies a loss of weight 0 out, and we
    leave it out.
    """
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    return {f"grad/{name}": value for name, value in layout.give(grads).items()}


def load(student: nn.Module, case: Case, layout: Layout) -> None:
    """Give the student the case's weights, every one, through the converter."""
    student.load_state_dict(layout.take(case.state))


def in_double(case: Case) -> Case:
    """The case's weights and inputs in float64.

    For gradients through a batch norm, which divides by small deviations: ours then adds no rounding of its own, and
    what is left to tolerate is the original's.
    """
    state = {name: exactly(value) for name, value in case.state.items()}
    return dataclasses.replace(case, state=state, inputs={name: exactly(value) for name, value in case.inputs.items()})


def exactly(value: Tensor) -> Tensor:
    """A tensor in float64 if it holds real numbers, else as it is."""
    return value.detach().double() if value.is_floating_point() else value


# Options of many originals that change no stored number, unless one was drawn with them, which then shows.
IDLE = (
    *("drop_rate", "attn_drop_rate", "drop_path_rate", "proj_drop_rate", "drop_block_rate", "drop", "dropout"),
    *("use_checkpoint", "init_scale", "init_std", "pretrained", "seed", "batch", "batch_size"),
)


def refuse_unknown(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ValueError for an option that is on and that this code would silently leave out."""
    unknown = {key: value for key, value in config.items() if key not in (*known, *IDLE) and value}
    if unknown:
        raise ValueError(f"the case sets {unknown}, which this family does not read")


TRUNK = (
    *("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "qkv_bias", "norm_layer"),
)


def trunk(config: Mapping[str, Any], **parts: Any) -> Model:
    """Our Model for the arguments that the originals' ViTs share; parts: what else the family knows."""
    if config.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans={config['in_chans']}: only RGB")
    return Model(
        width=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        mlp_ratio=whole_ratio(config["embed_dim"], config.get("mlp_ratio", 4.0)),
        qkv_bias=config.get("qkv_bias", True),
        norm_eps=epsilon(config.get("norm_layer", "LayerNorm eps=1e-6")),
        **parts,
    )


def whole_ratio(width: int, ratio: float) -> float:
    """A ratio whose hidden width is whole: the originals cut ``width * ratio``, our sizes round it."""
    return int(width * ratio) / width


def epsilon(norm: str) -> float:
    """The epsilon in ``LayerNorm eps=1e-6``, or in how Python prints a LayerNorm class and its arguments."""
    if "LayerNorm" not in norm:
        raise ValueError(f"norm_layer={norm!r} is no LayerNorm")
    found = re.search(r"eps=([0-9.e-]+)", norm)
    return float(found[1]) if found else 1e-5  # PyTorch's


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the case's images."""
    size = config["img_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def number_in(text: str, pattern: str) -> float:
    """The number that a case's own words state, e.g. the strength in ``label smoothing 0.1``."""
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"the case does not say {pattern!r}")
    return float(found[1])
