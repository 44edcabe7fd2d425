"""What can be known to be wrong before a job waits in a queue: options, topology, data, disk, cluster."""

import importlib
import importlib.util
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfseen.config import Batches, ConfigError

from . import records, slurm
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


def check_run(stage: str, opened: Any, launch: Launch, module: Any) -> Facts:
    """Check a training stage's config against its resources. Touches no GPU and starts nothing.

    opened: from halfseen.stage.open_run. Raises ConfigError for the first thing that cannot work.
    """
    from halfseen.distributed import World
    from halfseen.engines import needs

    config, folder = opened.config, opened.folder
    facts = Facts()
    check_packages(needs.package(config.engine), "submitit")
    check_folder(folder, launch)
    check_devices(config, launch)
    batches = [Batches.derive(config.run.global_batch, world, config.run.micro_batch) for world in launch.worlds]
    parts = module.parts(config, World(world=launch.worlds[0]), folder)
    readable = check_data(parts.train_set)
    if config.data.val and config.data.label != "none":
        from halfseen import data

        check_data(data.open_set(config.data, "val"))
    facts.total = parts.spans.total
    facts.lines += [f"run       {folder}", f"data      {parts.train_set.images:,} images per epoch; {readable}"]
    facts.lines += [f"batch     {split}" for split in batches]
    facts.lines += [f"length    {facts.total:,} images = {facts.total // batches[0].total:,} steps"]
    facts.lines += check_size(parts.student, config, launch, folder)
    return facts


def check_size(student: Any, config: Any, launch: Launch, folder: Path) -> list[str]:
    """Parameters against the GPU's memory and the disk; the lines to show."""
    from halfseen.engines import needs

    parameters = sum(weight.numel() for weight in student.parameters())
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    needed = max(needs.memory(config.engine, parameters, trained, world) for world in launch.worlds)
    stated = launch.gpu_memory_gib
    if stated and needed > stated * 2**30:
        raise ConfigError(
            "launch.gpu_memory_gib",
            stated,
            f"weights, gradients and moments alone take {needed / 2**30:.1f} GiB on each GPU",
            "shard them (engine.name, engine.zero_stage; `halfseen recipes` lists engine/...), or use more GPUs",
        )
    size = needs.checkpoint(config.engine, parameters, trained)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, wanted = shutil.disk_usage(place).free, size * (config.run.keep + 1)
    kept = sum(file.stat().st_size for file in folder.glob("checkpoints/img_*/*"))
    if wanted > free + kept:
        raise ConfigError(
            "run.keep",
            config.run.keep,
            f"{config.run.keep} checkpoints and one being written take {wanted / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free at {place}",
            "lower it, free space, or use another run.folder",
        )
    of = f" of {stated:g} GiB" if stated else ""
    return [
        f"model     {parameters:,} parameters, {trained:,} of them train",
        f"memory    {needed / 2**30:.3g} GiB{of} a device for weights, gradients, moments; activations come on top",
        f"disk      {size / 2**30:.3g} GiB a checkpoint, {wanted / 2**30:.3g} at most; {free / 2**30:,.0f} are free",
    ]


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


def check_data(images: Any) -> str:
    """Read one sample of some shards, spread over all of them; what was done, in words."""
    from halfseen.data.reader import Reader

    reader, read, shards = Reader(images), 0, 0
    try:
        for number, source in enumerate(images.sources):
            filled = [shard for shard, count in enumerate(source.counts) if count]
            shards += len(filled)
            for shard in filled[:: max(1, len(filled) // SAMPLED)][:SAMPLED]:
                reader.read(number, shard, 0)
                read += 1
    finally:
        reader.close()
    return f"{shards} shards indexed, a sample of {read} read"


def check_folder(folder: Path, launch: Launch) -> None:
    """Refuse a run folder that cannot be written, or that other nodes cannot see."""
    probe = records.where(folder) / f".probe-{uuid.uuid4().hex}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            "run.folder", str(folder), f"cannot be written: {error.strerror}", "name one on a shared disk of yours"
        ) from error
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


def check_cluster(script: str, launch: Launch) -> None:
    """Let Slurm judge the batch script: partition, account, limits, nodes."""
    if launch.cluster == "slurm":
        slurm.judge(script, launch)


def check_python(launch: Launch) -> None:
    """Refuse a launch.python whose first word does not exist here; a container's comes through srun_args."""
    first = launch.python.split()[0] if launch.python else ""
    if first and os.sep in first and not Path(first).exists() and not launch.srun_args:
        raise ConfigError("launch.python", launch.python, "there is no such program", "name one the nodes have")
