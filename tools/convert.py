"""``halfseen convert IN OUT --to LAYOUT``: weights under the names of another project, with a report and a proof."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import halfseen
from halfseen.checkpoint import read_weights
from halfseen.checkpoint.folder import MANIFEST
from halfseen.checkpoint.read import find_checkpoint
from halfseen.config import ConfigError, Model
from halfseen.layouts import LAYOUTS, Layout, detect
from halfseen.weights import initialise

from .architecture import IDLE, Architecture, of_file, of_run, of_weights
from .witness import NoWitness, Proof, prove, transformers_options

# Layouts in which what a pretraining predicts is not called as a classifier is.
PREDICTING = ("simmim", "beit", "beit2", "timm_beit", "transformers_beit_mim")


@dataclass(frozen=True)
class Conversion:
    """Converted weights, and what became of every tensor. Names are ours."""

    source: Layout
    destination: Layout
    weights: dict[str, Tensor]  # under the destination's names
    mapped: dict[str, int] = field(default_factory=dict)  # value untouched -> bytes
    resized: dict[str, int] = field(default_factory=dict)  # position tables resampled to another grid -> bytes
    new: dict[str, int] = field(default_factory=dict)  # the trunk has it, nobody gave it -> bytes
    unused: dict[str, int] = field(default_factory=dict)  # no place in the destination -> bytes
    covered: float | None = None  # share of the trunk's numbers that were given; None: the trunk is not known

    def counts(self) -> dict[str, dict[str, int]]:
        """Tensors and bytes of each kind."""
        kinds = {kind: getattr(self, kind) for kind in ("mapped", "resized", "new", "unused")}
        return {kind: {"tensors": len(found), "bytes": sum(found.values())} for kind, found in kinds.items()}

    def __str__(self) -> str:
        lines = [f"{self.source.name} -> {self.destination.name}: {len(self.weights)} tensors"]
        for kind, count in self.counts().items():
            shown = modules(getattr(self, kind)) if kind != "mapped" else ""
            lines.append(
                f"  {kind:<8}{count['tensors']:>5} tensors{count['bytes'] / 2**20:>10.2f} MiB  {shown}".rstrip()
            )
        covered = "the trunk is not known" if self.covered is None else f"{self.covered:.1%} of the trunk was given"
        return "\n".join([*lines, f"coverage  {covered}"])


def modules(names: Iterable[str]) -> str:
    """Names by their leading modules, a few of them."""
    listed = sorted({".".join(name.split(".")[:2]) for name in names})
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def convert(weights: Mapping[str, Tensor], source: Layout, destination: Layout) -> Conversion:
    """Weights of one layout in another's names. Raises ConfigError if they are not in the source's."""
    found = detect(weights)
    if (found.name == "halfseen") != (source.name == "halfseen"):
        raise ConfigError("--from", source.name, f"these names are {found.name}'s", f"use --from {found.name}")
    return place(source.take(weights), source, destination)


def place(ours: Mapping[str, Tensor], source: Layout, destination: Layout, stage: str = "") -> Conversion:
    """Weights under our names in the destination's, values untouched. stage: of the run they come from.

    What a pretraining predicts are no classes: elsewhere its head would be taken for a classifier's. It is left out,
    and the mask token that tells it, but where both have a place of their own.
    """
    kept = dict(ours)
    told = "mask_token" in ours and destination.name in PREDICTING
    if (stage == "pretrain" or "mask_token" in ours) and destination.name != "halfseen" and not told:
        kept = {name: value for name, value in ours.items() if not name.startswith(("head.", "mask_token"))}
    placed = destination.from_ours(set(kept))
    sizes = {name: value.numel() * value.element_size() for name, value in ours.items()}
    return Conversion(
        source,
        destination,
        destination.give(kept),
        mapped={name: size for name, size in sizes.items() if name in placed},
        unused={name: size for name, size in sizes.items() if name not in placed},
    )


def fit(
    ours: dict[str, Tensor], architecture: Architecture, image_size: int, coverage: float, result: Conversion
) -> Conversion:
    """The conversion checked against a real trunk, and moved to another size of image where that is asked for.

    Raises ConfigError if less than ``coverage`` of the trunk is given.
    """
    holder = architecture.build(image_size)
    given = {name: value for name, value in ours.items() if name.startswith("encoder.")}
    # A trunk whose tokens are pooled before the norm ends without one.
    wanted = {
        name for name in holder.state_dict() if not name.startswith("encoder.norm.") or "encoder.norm.weight" in ours
    }
    report = initialise(holder, given, coverage=0.0)
    own = {name: value for name, value in holder.state_dict().items() if name in wanted}
    sizes = {name: value.numel() * value.element_size() for name, value in own.items()}
    new = {name: size for name, size in sizes.items() if name in report.new}
    covered = 1 - sum(own[name].numel() for name in new) / sum(value.numel() for value in own.values())
    if covered < coverage:
        lacking = [f"{name} ({why})" for name, why in report.new.items() if name in new]
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        reason = f"only {covered:.1%} of the trunk is given; lacking: {', '.join(lacking[:3])}{more}"
        raise ConfigError("--coverage", coverage, reason, "give whole weights, or lower it if this is meant")
    moved = {name: own[name] for name in report.resized if name in own}
    if not moved:
        return replace(result, new=new, covered=covered)
    again = place(ours | moved, result.source, result.destination, architecture.stage)
    resized = {name: again.mapped.pop(name) for name in moved if name in again.mapped}
    return replace(again, resized=resized, new=new, covered=covered)


def refuse_unplaced(result: Conversion, coverage: float) -> None:
    """Raise ConfigError if less than ``coverage`` of the given trunk has a place in the destination."""
    unplaced = {name: size for name, size in result.unused.items() if name.startswith("encoder.")}
    placed = sum(size for name, size in result.mapped.items() if name.startswith("encoder."))
    if unplaced and placed < coverage * (placed + sum(unplaced.values())):
        reason = f"{result.destination.what} has no place for {modules(unplaced)}"
        raise ConfigError("--to", result.destination.name, reason, "use another layout, or a lower --coverage")


def refuse_stemless(ours: Mapping[str, Tensor], coverage: float) -> None:
    """Raise ConfigError for blocks without a stem, whatever trunk they are of."""
    blocks = [name for name in ours if name.startswith(("encoder.blocks.", "encoder.layers."))]
    stem = any(name.startswith(("encoder.patch_embed", "encoder.stem.")) for name in ours)
    if blocks and not stem and coverage > 0:
        reason = "blocks are given and no stem (patch_embed): these weights are a part of a trunk"
        raise ConfigError("IN", blocks[0], reason, "give whole weights, or --coverage 0 if this is meant")


def write(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A .safetensors file, or a .pth file with the weights under ``model`` as the originals have them.

    metadata: text that says what this is; in a .pth file under ``halfseen``.
    """
    # Tied weights share memory, which safetensors refuses to guess about: each name gets its own copy.
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            save_file(copies, unfinished, {"format": "pt", **(metadata or {})})
        else:
            torch.save({"model": copies} | ({"halfseen": dict(metadata)} if metadata else {}), unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_config(architecture: Architecture, result: Conversion, path: Path) -> None:
    """The config.json that transformers wants beside a model.safetensors; for a layout of its alone."""
    kind = result.destination.what.removeprefix("transformers' ")
    model = architecture.model
    # A ViTMAE's config also says what its decoder is, which an architecture here does not.
    if (
        not result.destination.name.startswith("transformers")
        or kind.startswith("ViTMAE")
        or not isinstance(model, Model)
    ):
        return
    pooled = "encoder.norm.weight" not in result.mapped
    try:
        options = transformers_options(model, architecture.image_size, result.destination.name, pooled)
    except NoWitness as error:
        raise ConfigError("--to", result.destination.name, str(error), "use another layout") from error
    if "head.weight" in result.mapped:
        count = len(
            next(value for name, value in result.weights.items() if name in ("classifier.weight", "lm_head.weight"))
        )
        if kind == "BeitForMaskedImageModeling":
            options["vocab_size"] = count
        else:
            options["id2label"] = {str(number): f"LABEL_{number}" for number in range(count)}
    path.write_text(json.dumps({"architectures": [kind]} | options, indent=2) + "\n")


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the manifest (which holds its files' digests) of a checkpoint."""
    file = find_checkpoint(path) / MANIFEST if path.is_dir() else path
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 22):
            found.update(part)
    return found.hexdigest()


def known(path: Path, ours: Mapping[str, Tensor], arguments: argparse.Namespace) -> Architecture | ConfigError:
    """The trunk these weights belong to, or why it is not known."""
    beside = path.with_name("config.json") if path.is_file() else path / "config.json"
    try:
        options: dict[str, Any] = json.loads(beside.read_text()) if beside.is_file() else {}
        return of_run(path) or of_file(path) or of_weights(ours, options, arguments.heads, arguments.image_size)
    except ConfigError as error:
        return error


def main(argv: Sequence[str]) -> int:
    """Convert one file; returns the exit code: 1 if the proof fails."""
    arguments = parse(argv)
    source_path, out = arguments.source, arguments.destination
    if out.suffix not in (".safetensors", ".pth"):
        raise ConfigError("OUT", str(out), "is no kind of file known here", "end it in .safetensors or .pth")
    weights = read_weights(source_path, arguments.part)
    source = LAYOUTS[arguments.layout] if arguments.layout else detect(weights)
    destination = LAYOUTS[arguments.to]
    result = convert(weights, source, destination)
    refuse_unplaced(result, arguments.coverage)
    ours = source.take(weights)
    refuse_stemless(ours, arguments.coverage)
    architecture = known(source_path, ours, arguments)
    described = {"halfseen": halfseen.__version__, "layout": destination.name, "converted_from": source.name}
    described |= {"source": source_path.name, "source_sha256": digest(source_path), "part": arguments.part}
    if isinstance(architecture, Architecture):
        placed = place(ours, source, destination, architecture.stage)
        size = arguments.image_size or architecture.image_size
        result = fit(ours, architecture, size, arguments.coverage, placed)
        # Of our own weights what is proven is the file to be written, of others' what was read.
        theirs, layout = (placed.weights, destination) if source.name == "halfseen" else (weights, source)
        proof = Proof("", "not asked for") if arguments.no_proof else prove_it(architecture, ours, theirs, layout)
        described |= replace(architecture, image_size=size).described()
    elif arguments.image_size or (arguments.heads and architecture.key != "IN"):
        raise architecture
    else:
        proof = Proof("", f"{architecture.reason} ({architecture.fix})")
        if architecture.key == "--heads":  # no shape depends on them
            alone = of_weights(ours, {}, 1, None)
            result = fit(ours, alone, alone.image_size, arguments.coverage, result)
    described |= {"coverage": json.dumps(result.counts()), "proof": json.dumps(proof.described())}
    refused = bool(proof.witness) and not proof.holds
    if not refused:
        if out.name == "model.safetensors" and isinstance(architecture, Architecture):
            write_config(replace(architecture, image_size=size), result, out.with_name("config.json"))
        write(result.weights, out, described)
    print(f"{result}\nproof     {proof}")
    print("nothing was written: the two models differ" if refused else f"wrote {out}")
    return int(refused)


def prove_it(
    architecture: Architecture, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], layout: Layout
) -> Proof:
    """The weights in our trunk, against the same weights, under the names of a layout, in another library's."""
    holder: Any = architecture.build()
    idle = {f"encoder.{name}" for name in IDLE}
    trunk = {name: value for name, value in ours.items() if name.startswith("encoder.") and name not in idle}
    if strange := sorted(trunk.keys() - holder.state_dict().keys()):
        return Proof("", f"the weights have {strange[:3]}, which no trunk known here has")
    initialise(holder, trunk, coverage=0.0)
    return prove(architecture, holder.encoder, ours, theirs, layout)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="halfseen convert", description=__doc__)
    parser.add_argument(
        "source", type=Path, metavar="IN", help="a run folder, a checkpoint, .safetensors, .pth or .bin"
    )
    parser.add_argument("destination", type=Path, metavar="OUT", help=".safetensors or .pth")
    names = "; ".join(f"{layout.name}: {layout.what}" for layout in LAYOUTS.values())
    parser.add_argument("--from", dest="layout", choices=sorted(LAYOUTS), help=f"found out if not given. {names}")
    parser.add_argument("--to", required=True, choices=sorted(LAYOUTS))
    parser.add_argument("--part", default="model", choices=("model", "ema"), help="of a run: weights or their average")
    parser.add_argument("--image-size", type=int, help="pixels: resample position tables to it (the source's)")
    parser.add_argument("--heads", type=int, help="attention heads, where nothing else tells")
    parser.add_argument("--coverage", type=float, default=1.0, help="least share of the trunk that must be given (1.0)")
    parser.add_argument("--no-proof", action="store_true", help="do not run the weights in another library's model")
    return parser.parse_args(list(argv))
