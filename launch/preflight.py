"""What can be known to be wrong before a job waits in a queue: options, topology, data, disk, cluster."""

import importlib
import importlib.util
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfseen.config import ConfigError
from halfseen.derived import Batches, Spans
from halfseen.recipes import changes

from . import records
from .config import Launch

# File systems that only this machine sees. Its disk may be shared with the nodes or not: nobody can tell from here.
PRIVATE = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs", "f2fs")

SAMPLED = 8  # shards of which one sample is read


@dataclass
class Facts:
    """What pre-flight found out."""

    lines: list[str] = field(default_factory=list)  # to be shown
    total: int = 0  # images of the whole run


def check_run(opened: Any, launch: Launch, module: Any, pending: Sequence[Path] = ()) -> Facts:
    """Check a training stage's config against its resources. Touches no GPU and starts nothing.

    opened: from halfseen.opening.open_run. pending: folders that stages before this one are to fill; what can only be
    made from them is not looked at. Raises ConfigError for the first thing that cannot work.
    """
    from halfseen.distributed import World
    from halfseen.engines import needs

    config, folder = opened.config, opened.folder
    check_packages(needs.package(config.engine), "submitit")
    check_folder(folder, launch)
    check_devices(config, launch)
    batches = [Batches.derive(config.run.global_batch, world, config.run.micro_batch) for world in launch.worlds]
    read = check_data(config, "train")
    if config.data.val and config.data.label != "none":
        check_data(config, "val")
    awaited = awaits(config, pending)
    if awaited:
        return without_parts(config, folder, batches, read, awaited)
    parts = module.parts(config, World(world=launch.worlds[0]), folder)
    facts = describe(folder, parts.train_set.images, read, batches, parts.spans.total)
    facts.lines += check_memory(parts, config, launch)
    if launch.gpu_memory_gib:
        images = max(split.micro for split in batches)
        facts.lines += check_activations(parts, module, config, launch, folder, images)
    facts.lines += check_disk(parts.student, config, folder)
    if config.run.init and Path(config.run.init) in pending:
        facts.lines += [
            "note      options of the model that are not stated are taken from run.init when the job starts"
        ]
    return facts


def awaits(config: Any, pending: Sequence[Path]) -> str:
    """The option that names a folder which is still to be filled; empty if none does.

    run.init is none: weights are read when a run starts, and only their shapes decide about a student.
    """
    for key, value in changes(config).items():
        named = isinstance(value, str) and any(Path(value).is_relative_to(folder) for folder in pending)
        if named and key not in ("run.init", "run.folder"):
            return f"{key}={value}"
    return ""


def without_parts(config: Any, folder: Path, batches: Sequence[Batches], read: str, awaited: str) -> Facts:
    """What can be said of a stage that learns from one which has not run: all but its networks."""
    images = images_of(config, "train").images
    facts = describe(folder, images, read, batches, Spans.derive(config, images, batches[0].total).total)
    facts.lines += [f"note      {awaited} is made by a stage above: model and memory are checked when the job starts"]
    return facts


def describe(folder: Path, images: int, read: str, batches: Sequence[Batches], total: int) -> Facts:
    """Data that can be read, batches and length, as lines to show."""
    lines = [f"run       {folder}", f"data      {images:,} images per epoch; {read}"]
    lines += [f"batch     {split}" for split in batches]
    lines += [f"length    {total:,} images = {total // batches[0].total:,} steps"]
    return Facts(lines, total)


def check_teach(
    config: Any, option: str, source: str, folder: Path, launch: Launch, pending: Sequence[Path]
) -> list[str]:
    """Check what a network's answers need: images, a place, and the network unless a stage above makes it.

    option: the one that names the network; source: its value.
    """
    check_packages("submitit")
    check_folder(folder, launch)
    check_devices(config, launch)
    if not source:
        raise ConfigError(option, "", "names nothing that could be asked", "give it a run folder")
    if not source.startswith("timm:") and Path(source) not in pending and not Path(source).exists():
        raise ConfigError(option, source, "there is no such run or file", "check the path")
    return [f"store     {folder}", f"asks      {source}", f"data      {check_data(config, 'train')}"]


def check_memory(parts: Any, config: Any, launch: Launch) -> list[str]:
    """Refuse weights, gradients and moments that no device can hold; the lines to show."""
    parameters, trained, needed = needed_by(parts, config, launch)
    stated = launch.gpu_memory_gib
    if stated and needed > stated * 2**30:
        raise ConfigError(
            "launch.gpu_memory_gib",
            stated,
            f"weights, gradients and moments alone take {needed / 2**30:.1f} GiB on each GPU",
            "shard them (engine.name, engine.zero_stage; `halfseen recipes` lists engine/...), or use more GPUs",
        )
    more = "" if stated else "; launch.gpu_memory_gib=80 compares that and the activations with a GPU of 80 GiB"
    return [
        f"model     {parameters:,} parameters, {trained:,} of them train",
        f"memory    {needed / 2**30:.3g} GiB a device for weights, gradients, moments{more}",
    ]


def needed_by(parts: Any, config: Any, launch: Launch) -> tuple[int, int, int]:
    """Parameters, those that train, and bytes on a device before the first activation, at the worst number of ranks."""
    from halfseen.engines import needs

    from . import memory

    weights = list(parts.student.parameters())
    parameters, trained = sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)
    needed = max(needs.memory(config.engine, parameters, trained, world) for world in launch.worlds)
    return parameters, trained, needed + memory.beside(parts.prepare, parts.student)


def check_activations(parts: Any, module: Any, config: Any, launch: Launch, folder: Path, images: int) -> list[str]:
    """Count what a step keeps of its images, and warn where that exceeds the stated memory; the lines to show.

    A warning, not a refusal: torch.compile, buffers of an engine and the allocator are not in the count.
    """
    from . import memory

    fixed = needed_by(parts, config, launch)[2] + memory.casts(parts.student, config.engine)
    each = memory.count(module, config, folder).per_image(config.engine)
    stated = (launch.gpu_memory_gib or 0) * 2**30
    total = fixed + images * each
    lines = [
        f"          + {each / 2**20:.3g} MiB for each of {images:,} images at once: "
        f"about {total / 2**30:.3g} of {stated / 2**30:g} GiB"
    ]
    if total > stated:
        most = int((stated - fixed) / each)
        fit = f"about run.micro_batch={most} fits" if most > 0 else "not one image fits"
        lines += [f"warning   that is more than a GPU has: {fit}; or use engine.recompute=true, or a sharding engine"]
    return lines


def check_disk(student: Any, config: Any, folder: Path) -> list[str]:
    """Refuse more checkpoints than the disk holds; the lines to show."""
    from halfseen.engines import needs

    parameters = sum(weight.numel() for weight in student.parameters())
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    size = needs.checkpoint(config.engine, parameters, trained)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, wanted = shutil.disk_usage(place).free, size * (config.run.keep + 1)
    kept = sum(file.stat().st_size for file in folder.glob("checkpoints/img_*/*"))
    if wanted > free + kept:
        raise ConfigError(
            "run.keep",
            config.run.keep,
            f"{config.run.keep} checkpoints and one being written take {wanted / 2**30:.3g} GiB, "
            f"{free / 2**30:.3g} GiB are free at {place}",
            "lower it, free space, or use another run.folder",
        )
    gib = [number / 2**30 for number in (size, wanted, free)]
    return [f"disk      {gib[0]:.3g} GiB a checkpoint, {gib[1]:.3g} at most; {gib[2]:,.0f} are free"]


def check_devices(config: Any, launch: Launch) -> None:
    """Refuse ranks without a device, and devices without a rank."""
    if config.engine.device == "cuda" and not launch.gpus_per_node:
        raise ConfigError("launch.gpus_per_node", 0, "engine.device=cuda needs GPUs", "e.g. launch.gpus_per_node=8")
    if launch.gpus_per_node and launch.tasks > launch.gpus_per_node and config.engine.device != "cpu":
        raise ConfigError(
            "launch.tasks_per_node",
            launch.tasks,
            f"is more than gpus_per_node={launch.gpus_per_node}: ranks would share a GPU",
            f"use {launch.gpus_per_node}, or leave it out",
        )
    if launch.cluster != "slurm" and launch.gpus_per_node:
        import torch

        if torch.cuda.device_count() < launch.gpus_per_node:
            raise ConfigError(
                "launch.gpus_per_node",
                launch.gpus_per_node,
                f"this machine has {torch.cuda.device_count()}",
                f"use launch.gpus_per_node={torch.cuda.device_count()}",
            )


def check_data(config: Any, part: str) -> str:
    """Read one sample of some shards of the training or evaluation set, spread over all of them; what was found.

    A bad sample or two are for the run to replace; where all that are looked at are bad, the set is refused.
    """
    from halfseen.data.reader import BadSample, Reader

    reader, read, shards, bad = Reader(images_of(config, part)), 0, 0, ""
    good = 0
    try:
        for number, source in enumerate(reader.images.sources):
            filled = [shard for shard, count in enumerate(source.counts) if count]
            shards += len(filled)
            for shard in filled[:: max(1, len(filled) // SAMPLED)][:SAMPLED]:
                read += 1
                try:
                    reader.read(number, shard, 0)
                    good += 1
                except BadSample as error:
                    bad = bad or str(error)
    finally:
        reader.close()
    if bad and not good:
        raise ConfigError(f"data.{part}", getattr(config.data, part), bad, "see `halfseen shards check`")
    return f"{shards} shards indexed, a sample of {read} read" + (f", {read - good} bad: {bad}" if bad else "")


def images_of(config: Any, part: str) -> Any:
    """The training or evaluation set, with labels where the stage reads classes from them."""
    from halfseen import data

    classes = config.stage not in ("pretrain", "segment")
    return data.open_set(config.data if classes else replace(config.data, label="none", classes=0), part)


def check_folder(folder: Path, launch: Launch) -> None:
    """Refuse a run folder that cannot be written, or that other nodes cannot see."""
    there = [folder / name for name in ("", "checkpoints", "tensorboard") if (folder / name).exists()]
    for place in (records.where(folder), *there):
        probe = place / f".probe-{uuid.uuid4().hex}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            reason = f"{place} cannot be written: {error.strerror}"
            raise ConfigError("run.folder", str(folder), reason, "name one on a shared disk of yours") from error
    kind = file_system(folder)
    if launch.cluster == "slurm" and kind in PRIVATE:
        raise ConfigError(
            "run.folder",
            str(folder),
            f"lies in this machine's memory ({kind}): the nodes do not see it",
            "name a folder on the shared file system",
        )


def disk_note(folder: Path) -> list[str]:
    """A line of warning if the folder may be this machine's own."""
    kind = file_system(folder)
    if kind not in DISKS:
        return []
    return [
        f"note      {folder} lies on a {kind} disk; if the nodes do not mount it, the job ends at once without a log"
    ]


def file_system(folder: Path) -> str:
    """Type of the file system a folder lies on, empty where the system does not tell."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    found = ("", "")
    for line in mounts.read_text().splitlines():
        _, place, kind = line.split()[:3]
        place = place.replace("\\040", " ")
        if folder.absolute().is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]


def check_packages(*names: str) -> None:
    """Refuse to queue what this Python cannot import; the job uses the same one unless launch.python says otherwise."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError("launch", name, f"the package {name} is not installed", f"pip install {name}")


def check_python(launch: Launch) -> None:
    """Refuse a launch.python whose first word does not exist here; a container's comes through srun_args."""
    first = launch.python.split()[0] if launch.python else ""
    if first and os.sep in first and not Path(first).exists() and not launch.srun_args:
        raise ConfigError("launch.python", launch.python, "there is no such program", "name one the nodes have")
