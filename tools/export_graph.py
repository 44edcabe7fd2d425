"""A trunk as one file that runs without this code: ONNX, or torch.export's; checked against the trunk itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.weights import initialise

from .architecture import Architecture, of_file, of_run

SEED = 0
TOLERANCE = 1e-4  # over the largest output: float32 in another order of sums
BATCHES = (1, 3)  # the number of images is left open


class Tokens(nn.Module):
    """The trunk with images as its only argument."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: Tensor) -> Tensor:
        """image float32 [B, 3, S, S], normalised -> tokens after the final norm, [B, prefix + N, D]."""
        return self.trunk(image)


def trunk_of(path: Path, part: Any = "model") -> tuple[Tokens, Architecture]:
    """The trunk of a run, or of a file by `halfseen convert` that says what it is, in evaluation mode."""
    architecture = of_run(path) or of_file(path)
    if architecture is None:
        reason = "does not say what model it is of"
        raise ConfigError(
            "RUN", str(path), reason, "give a run folder, or a file made by `halfseen convert --to halfseen`"
        )
    holder: Any = architecture.build()
    weights = read_weights(path, part)
    if "fc_norm.weight" in weights:  # a classifier that normalises behind the mean: its trunk ends without a norm
        holder.encoder.norm = nn.Identity()
    initialise(holder, weights, coverage=1.0)
    return Tokens(holder.encoder).eval(), architecture


def images(size: int, count: int) -> Tensor:
    """Random images, the same every time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(SEED))


def program(tokens: Tokens, size: int) -> torch.export.ExportedProgram:
    """torch.export's graph, any number of images."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=1 << 16)},)
    return torch.export.export(tokens, (images(size, 2),), dynamic_shapes=shapes)


@torch.no_grad()
def export_torch(tokens: Tokens, size: int, out: Path) -> str:
    """Write torch.export's file; returns what the check of it found."""
    torch.export.save(program(tokens, size), out)
    loaded = torch.export.load(out).module()
    return agree([(tokens(images(size, n)), loaded(images(size, n))) for n in BATCHES], "torch.export", out)


@torch.no_grad()
def export_onnx(tokens: Tokens, size: int, out: Path) -> str:
    """Write an ONNX file (input image, output tokens); returns what the check of it by onnxruntime found."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch.onnx writes with
    except ImportError as error:
        raise ConfigError("--onnx", True, f"{error.name} is not installed", "pip install halfseen[onnx]") from error
    written = torch.onnx.export(
        program(tokens, size), input_names=["image"], output_names=["tokens"], dynamo=True, verbose=False
    )
    assert written is not None, "dynamo=True returns the program"
    written.save(str(out), external_data=False)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    pairs = []
    for count in BATCHES:
        image = images(size, count)
        (found,) = session.run(["tokens"], {"image": image.numpy()})
        pairs.append((tokens(image), torch.from_numpy(found)))
    return agree(pairs, f"onnxruntime {onnxruntime.__version__}", out)


def agree(pairs: list[tuple[Tensor, Tensor]], who: str, out: Path) -> str:
    """What to say of a file that computes the same; one that does not is removed and refused."""
    apart = max(float((expected - actual).abs().max()) for expected, actual in pairs)
    scale = max(float(expected.abs().max()) for expected, _ in pairs)
    if not apart <= TOLERANCE * max(scale, 1.0):
        out.unlink()
        raise RuntimeError(f"{who} computes tokens that differ by {apart:.2g} of {scale:.3g}: the file was removed")
    return f"{who} computes the same tokens: {apart:.2g} of {scale:.3g} apart, for {BATCHES} images"
