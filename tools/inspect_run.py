"""``halfseen inspect RUN_OR_CHECKPOINT``: what it holds, what wrote it, and whether every file is sound."""

import argparse
import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.table import Table

from halfseen.checkpoint import folder as layout
from halfseen.checkpoint import stream
from halfseen.checkpoint.read import last_stage
from halfseen.config import ConfigError
from halfseen.recipes import changes, load

from .terminal import console

STAGES = {
    "pretrain": ("halfseen.pretrain.config", "Pretrain"),
    "distill": ("halfseen.pretrain.distill.config", "Distill"),
    "finetune": ("halfseen.finetune.config", "Finetune"),
}


def main(argv: Sequence[str]) -> int:
    """Print the report; returns 0 if there is a sound checkpoint, else 1."""
    parser = argparse.ArgumentParser(prog="halfseen inspect", description=__doc__)
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run folder or one checkpoint in it")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, not only modules")
    arguments = parser.parse_args(list(argv))
    place = arguments.path.absolute()  # a folder is asked for its name, which "." has not
    checkpoints = find(place)
    if checkpoints[0].parents[1].parent == place:
        print(f"stage       {checkpoints[0].parents[1].name}, the last with a checkpoint; each is a run of its own")
    faults = {path: layout.faults(path) for path in checkpoints}
    sound = next((path for path in checkpoints if not faults[path]), None)
    if sound is not None:
        describe(sound)
        tensors = stream.stored(sound)
        console().print(tensor_table(tensors.values()) if arguments.tensors else module_table(tensors.values()))
    health(faults, sound)
    return 0 if sound is not None else 1


def find(path: Path) -> list[Path]:
    """The checkpoints a path stands for, newest first; of a run in stages, the last stage that has any.

    Raises ConfigError if there is none.
    """
    if layout.position_of(path) >= 0 or (path / layout.MANIFEST).exists():
        found = [path] if path.is_dir() else []
    else:
        found = layout.listed(last_stage(path) / "checkpoints") or layout.listed(path)
    if not found:
        raise ConfigError(
            "RUN_OR_CHECKPOINT",
            str(path),
            "holds no checkpoint",
            "name a run folder, or checkpoints/img_... in it; a run without checkpoints starts from its beginning",
        )
    return found


def describe(path: Path) -> None:
    """Where the run stood and what wrote the checkpoint."""
    manifest = layout.read_manifest(path)
    meta, versions = manifest["meta"], manifest["versions"]
    plain = stored_options(meta)
    position, batch = manifest["position"], plain.get("run", {}).get("global_batch")
    steps = f" = {position // batch:,} steps of {batch:,}" if batch else ""
    written = datetime.fromtimestamp((path / layout.MANIFEST).stat().st_mtime, tz=timezone.utc)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"checkpoint  {path}")
    print(f"position    {position:,} images{steps}")
    print(f"written     {manifest.get('written') or written.isoformat(timespec='seconds')}")
    print(f"engine      {meta.get('engine', 'not recorded')} on {manifest['world']} ranks")
    print(f"versions    {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(f"files       {len(manifest['files'])}, {gib(size)}")
    if "fingerprint" in meta:
        print(f"data        fingerprint {meta['fingerprint'][:12]}")
    for line in config_lines(plain):
        print(line)


def stored_options(meta: dict[str, Any]) -> dict[str, Any]:
    """The run's config as it stands in the checkpoint; empty where none does."""
    plain = yaml.safe_load(meta.get("config", ""))
    return plain if isinstance(plain, dict) else {}


def config_lines(plain: dict[str, Any]) -> Iterator[str]:
    """The options that differ from the defaults of their stage."""
    if not plain:
        yield "config      not recorded"
        return
    stage = plain.get("stage")
    yield f"config      stage {stage}, and what differs from its defaults:"
    if stage not in STAGES:
        yield f"  not shown: this version knows the stages {', '.join(STAGES)}"
        return
    module, name = STAGES[stage]
    try:
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.yaml").write_text(yaml.safe_dump(plain))
            config = load(getattr(importlib.import_module(module), name), Path(folder) / "config.yaml")
    except ConfigError as error:
        yield f"  not shown, this version refuses it: {error}"
        return
    yield from (f"  {key} = {value}" for key, value in changes(config).items())


def health(faults: dict[Path, list[str]], sound: Path | None) -> None:
    """One line per checkpoint, and one per bad file."""
    print("health      every file's size and digest against the manifest")
    for path, wrong in faults.items():
        print(f"  {path.name}  {'damaged' if wrong else 'healthy'}")
        for line in wrong:
            print(f"    {line}")
    for path in sorted(next(iter(faults)).parent.glob(f"{layout.PARTIAL}*")):
        print(f"  {path.name}  unfinished: being written, or left by a crash; never read")
    if sound is None:
        print("no checkpoint is healthy")


def module_table(tensors: Iterable[stream.Stored]) -> Table:
    """Numbers and bytes of weights, averages and optimizer state, module by module."""
    rows: dict[str, dict[str, list[stream.Stored]]] = defaultdict(lambda: defaultdict(list))
    for tensor in tensors:
        kind, _, name = tensor.key.partition(".")
        name = name.rpartition(".")[0] if kind == "optim" else name  # without the slot
        rows[module_of(name) if kind != "scaler" else "loss scale"][kind].append(tensor)
    table = Table("module", "weights", "type", *(f"{what} bytes" for what in ("weight", "optimizer", "average")))
    for column in table.columns[1:]:
        column.justify = "right"
    total: dict[str, list[stream.Stored]] = defaultdict(list)
    for module, kinds in rows.items():
        table.add_row(module, *cells(kinds))
        for kind, listed in kinds.items():
            total[kind] += listed
    table.add_section()
    table.add_row("all", *cells(total))
    return table


def cells(kinds: dict[str, list[stream.Stored]]) -> list[str]:
    """A row's numbers."""
    weights = [*kinds.get("model", []), *kinds.get("buffer", [])]
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights})
    sizes = [
        sum(tensor.size for tensor in listed) for listed in (weights, kinds.get("optim", []), kinds.get("ema", []))
    ]
    return [f"{sum(tensor.count for tensor in weights):,}", " ".join(types), *(f"{size:,}" for size in sizes)]


def module_of(name: str) -> str:
    """The module a row stands for: one block, or one part of the student."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[: min(2, max(1, len(parts) - 1))])


def tensor_table(tensors: Iterable[stream.Stored]) -> Table:
    """Every tensor: key, shape, type, bytes and in how many files' pieces it lies."""
    table = Table("tensor", "shape", "type", "bytes", "pieces")
    for column in table.columns[3:]:
        column.justify = "right"
    for tensor in tensors:
        kind = str(tensor.dtype).removeprefix("torch.")
        table.add_row(tensor.key, str(list(tensor.shape)), kind, f"{tensor.size:,}", str(len(tensor.pieces)))
    return table


def gib(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 28 else f"{size / 2**20:.2f} MiB"
