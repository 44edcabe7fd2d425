"""``halfseen export RUN OUT``: weights as one file, in little memory; or the trunk as a graph that runs alone."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch

import halfseen
from halfseen.checkpoint import stream
from halfseen.checkpoint.folder import read_manifest
from halfseen.checkpoint.read import find_checkpoint
from halfseen.config import ConfigError

from . import export_graph

PARTS = {
    "encoder": "the trunk alone, its names without `encoder.`",
    "student": "everything that was trained, and its saved buffers",
    "ema": "the student, averaged weights where they were kept",
    "encoder-ema": "the trunk, averaged",
}

# torch's types in the words of the safetensors format.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def main(argv: Sequence[str]) -> int:
    """Export one file; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="halfseen export",
        description=__doc__,
        epilog="Tied weights are written under each of their names, so the file loads strictly.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder (its newest healthy checkpoint) or one")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write: .safetensors, .onnx or .pt2")
    said = "; ".join(f"{part}: {what}" for part, what in PARTS.items())
    parser.add_argument("--part", default="encoder", choices=PARTS, help=f"{said} (encoder)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--onnx", action="store_true", help="the trunk as ONNX, checked by onnxruntime")
    form.add_argument("--torch-export", action="store_true", help="the trunk as torch.export's .pt2, checked too")
    arguments = parser.parse_args(list(argv))
    suffix = ".onnx" if arguments.onnx else ".pt2" if arguments.torch_export else ".safetensors"
    if arguments.out.suffix != suffix:
        raise ConfigError("OUT", str(arguments.out), f"is no {suffix} file", f"end its name in {suffix}")
    if arguments.out.exists() and not arguments.force:
        raise ConfigError("OUT", str(arguments.out), "exists already", "name another file, or add --force")
    if suffix != ".safetensors":
        return graph(arguments)
    if not arguments.run.is_dir():
        raise ConfigError("RUN", str(arguments.run), "is no folder", "name a run folder or one of its checkpoints")
    checkpoint = find_checkpoint(arguments.run)
    tensors = choose(checkpoint, arguments.part)
    write(checkpoint, tensors, arguments.out, arguments.part)
    count = sum(tensor.count for tensor in tensors.values())
    print(f"{checkpoint}: {arguments.part}, {len(tensors)} tensors, {count:,} numbers\nwrote {arguments.out}")
    return 0


def graph(arguments: argparse.Namespace) -> int:
    """Export the trunk as a graph; returns the exit code."""
    if not arguments.part.startswith("encoder"):
        raise ConfigError("--part", arguments.part, "a graph is of the trunk alone", "use encoder or encoder-ema")
    part = "ema" if arguments.part == "encoder-ema" else "model"
    tokens, architecture = export_graph.trunk_of(arguments.run, part)
    write_graph = export_graph.export_onnx if arguments.onnx else export_graph.export_torch
    said = write_graph(tokens, architecture.image_size, arguments.out)
    size = architecture.image_size
    print(f"image float32 [B, 3, {size}, {size}], normalised -> tokens [B, N, {tokens.trunk.width}]")
    print(f"{said}\nwrote {arguments.out}")
    return 0


def choose(checkpoint: Path, part: str) -> dict[str, stream.Stored]:
    """The tensors of a part by the names they get in the file."""
    kept = stream.stored(checkpoint)
    averaged = part in ("ema", "encoder-ema")
    if averaged and not any(key.startswith("ema.") for key in kept):
        raise ConfigError("--part", part, f"{checkpoint} keeps no averaged weights", "use --part encoder or student")
    keys = stream.names(kept, "ema" if averaged else "model")
    aliases = read_manifest(checkpoint)["meta"].get("aliases", {})
    keys |= {alias: keys[name] for alias, name in aliases.items() if name in keys}
    if part.startswith("encoder"):
        keys = {name.removeprefix("encoder."): key for name, key in keys.items() if name.startswith("encoder.")}
    if not keys:
        raise ConfigError("--part", part, f"{checkpoint} holds no such weights", "use --part student")
    return {name: kept[key] for name, key in keys.items()}


def write(checkpoint: Path, tensors: dict[str, stream.Stored], out: Path, part: str) -> None:
    """Write the file and put it in place whole. Holds one stored piece of one tensor at a time."""
    # Wide types first, as the safetensors library does: every tensor is then aligned to its own type.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(header(checkpoint, ordered, part))
            for _, tensor in ordered:
                copy(checkpoint, tensor, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)


def header(checkpoint: Path, ordered: list[tuple[str, stream.Stored]], part: str) -> bytes:
    """Length of the JSON (8 bytes, little-endian), then the JSON: name -> type, shape, first and last byte."""
    manifest = read_manifest(checkpoint)
    described = {"format": "pt", "halfseen": halfseen.__version__, "part": part}
    described |= {"position": str(manifest["position"]), "config": str(manifest["meta"].get("config", ""))}
    entries: dict[str, object] = {"__metadata__": described}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.size
        entries[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy(checkpoint: Path, tensor: stream.Stored, file: BinaryIO) -> None:
    """Append one tensor's bytes, row-major and little-endian."""
    written = 0
    for band in stream.bands(checkpoint, tensor):
        if band.numel():
            written += file.write(band.reshape(-1).view(torch.uint8).numpy().data)
    if written != tensor.size:
        raise OSError(f"{checkpoint}: {tensor.key} has {written:,} bytes instead of {tensor.size:,}")
