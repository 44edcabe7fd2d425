"""Weights out of whatever holds them -- a run, a checkpoint, a file -- in one process, without an engine."""

import argparse
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from halfseen.config import ConfigError

from . import folder as layout
from . import stream

# Keys under which published .pth files keep their weights, and their averaged weights.
PLAIN = ("model", "state_dict", "module", "model_state")
# What a wrapper puts before every name: DistributedDataParallel, torch.compile, Lightning and other trainers.
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
AVERAGED = ("model_ema", "state_dict_ema", "ema")
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
DELTA = "halfseen delta"  # how the format of a delta file begins (halfseen/delta.py)


def read_weights(path: Path | str, part: Literal["model", "ema"] = "model") -> dict[str, Tensor]:
    """Weights and saved buffers by name, on the CPU.

    path: a run folder or its checkpoints folder (the newest healthy one counts; of a run in stages, the last stage that
    has begun), one checkpoint, or a .safetensors, .pth, .pt or .bin file. part: ema takes averaged weights where they
    exist, which is for all that was trained. Tied weights appear under each of their names, sharing memory. Only what
    is asked for is read.
    """
    path = Path(path)
    if path.is_dir():
        return read_checkpoint(find_checkpoint(path), part)
    if not path.is_file():
        raise ConfigError("weights", str(path), "there is no such file or folder", "check the path")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        if part != "model":
            raise ConfigError("weights", str(path), f"a .safetensors file has no part {part!r}", "ask for model")
        if header(path).get("format", "").startswith(DELTA):
            fix = "give the file that `halfseen delta apply BASE DELTA WHOLE.safetensors` writes"
            raise ConfigError("weights", str(path), "is a delta: it holds what differs from a base, no whole", fix)
        return unwrapped(load_file(path))
    return _named_tensors(path, _unpickled(path), part)


def header(path: Path) -> dict[str, str]:
    """What a weight file says of itself, text by name; empty where it says nothing. ConfigError for no weight file."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ConfigError("weights", str(path), f"is no .safetensors file: {error}", "name another file") from error
    if path.suffix in WEIGHT_FILES and not zipfile.is_zipfile(path):
        return {}  # older than what we write, and would have to be read whole to be asked
    content = _unpickled(path)
    said = content.get("halfseen") if isinstance(content, Mapping) else None
    return {str(name): str(text) for name, text in said.items()} if isinstance(said, Mapping) else {}


def _unpickled(path: Path) -> Any:
    """What a .pth file holds: plain values and tensors, mapped where its format allows."""
    if path.suffix not in WEIGHT_FILES:
        raise ConfigError("weights", str(path), f"unknown kind of file {path.suffix!r}", "give .safetensors or .pth")
    # Published files carry their training options, an argparse.Namespace: plain values, no code. Only the zip
    # format (torch >= 1.6) can be mapped instead of read.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # bytes that are no pickle can fail in any way
        if needed := code_in(path):
            reason = f"is a pickle that runs code when it is read ({', '.join(needed[:3])}), so it is not"
            raise ConfigError("weights", str(path), reason, SAFE_PATH) from error
        reason = f"cannot be read as weights: {type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError("weights", str(path), reason, "give a state dict saved by torch.save") from error


SAFE_PATH = (
    "if you trust its authors, load it once with their code where nothing is at stake, save "
    "{'model': module.state_dict()} with torch.save or safetensors, and give that file"
)


def code_in(path: Path) -> list[str]:
    """Names that a pickle would import beyond tensors and plain values; empty where that cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file may be anything
        return []


def find_checkpoint(path: Path) -> Path:
    """The healthy checkpoint a folder stands for; ConfigError naming every bad file otherwise."""
    if layout.position_of(path) >= 0 or (path / layout.MANIFEST).exists():
        wrong = layout.faults(path)
        if wrong:
            raise ConfigError("checkpoint", str(path), "is damaged: " + "; ".join(wrong), "use another checkpoint")
        return path
    path = last_stage(path)
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest, passed = layout.newest_healthy(inside)
    if newest is None:
        reason = "holds no healthy checkpoint" + "".join(f"; {line}" for line in passed)
        begun = (path / "config.yaml").is_file() and not passed
        fix = "let the run reach its first save (run.checkpoint_every)" if begun else "name a run or another checkpoint"
        raise ConfigError("checkpoint", str(path), reason, fix)
    for line in passed:
        warnings.warn(f"a newer checkpoint is passed over: {line}", stacklevel=3)
    return newest


def last_stage(run: Path) -> Path:
    """The folder of a run's last stage that has a checkpoint; the run's own folder if it has no stages."""
    begun = [part.parent for part in run.glob("[0-9]*_*/checkpoints") if any(part.glob("img_*"))]
    return max(begun, key=lambda folder: int(folder.name.partition("_")[0]), default=run)


def read_checkpoint(path: Path, part: Literal["model", "ema"]) -> dict[str, Tensor]:
    """Weights of one checkpoint folder, read tensor by tensor from its files."""
    manifest = layout.read_manifest(path)
    kept = stream.stored(path)
    if part == "ema" and not any(key.startswith("ema.") for key in kept):
        raise ConfigError("weights", str(path), "keeps no averaged weights", "ask for the part model")
    keys = stream.names(kept, part)
    wanted = {key: torch.empty(kept[key].shape, dtype=kept[key].dtype) for key in keys.values()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    found = {name: wanted[key] for name, key in keys.items()}
    for alias, name in manifest["meta"].get("aliases", {}).items():
        if name in found:
            found[alias] = found[name]
    return found


def _named_tensors(path: Path, content: Any, part: str) -> dict[str, Tensor]:
    """The weights inside a .pth file's content."""
    if not isinstance(content, Mapping):
        raise ConfigError("weights", str(path), f"holds a {type(content).__name__}", "give a state dict")
    if part == "ema":
        holder = next((key for key in AVERAGED if key in content), None)
        if holder is None:
            raise ConfigError("weights", str(path), f"none of the keys {AVERAGED} is in it", "ask for the part model")
        content = content[holder]
    else:
        content = next((content[key] for key in PLAIN if isinstance(content.get(key), Mapping)), content)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError("weights", str(path), f"holds no tensors, only {list(content)[:5]}", "give a state dict")
    return unwrapped(tensors)


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what stands before all of their names and is no name of a model's own (WRAPPERS)."""
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            return unwrapped({name.removeprefix(wrapper): value for name, value in tensors.items()})
    return tensors
