"""The receipt: what a run was made of -- config, code, data, machines -- one entry per start."""

import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.recipes import changes
from halfseen.writing import write_whole

SLURM = (
    "job_id",
    "array_job_id",
    "array_task_id",
    "restart_count",
    "job_nodelist",
    "job_partition",
    "job_name",
)


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    rank: int
    host: str
    device: str  # the name of the GPU, or of the CPU


def places(world: World) -> list[Place]:
    """Every rank's place, in rank order, on every rank. Collective."""
    gathered: list[Place] = world.gather_object(here(world)) if world.world > 1 else [here(world)]
    return gathered


def processor() -> str:
    """The CPU's name; its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def here(world: World) -> Place:
    """This rank's place."""
    gpu = world.device.type == "cuda"
    return Place(
        world.rank,
        socket.gethostname(),
        torch.cuda.get_device_name(world.device) if gpu else processor(),
    )


def write_receipt(
    folder: Path, *, config: Any, world: World, fingerprint: str, start: int, ranks: list[Place] | None = None
) -> Path:
    """Append this start to FOLDER/receipt.json; called on rank 0.

    config: the resolved config. fingerprint: of the training data. start: position the run starts or
    continues at. ranks: from ``places``; None records this rank alone. Returns the file's path.
    """
    path = folder / "receipt.json"
    starts = read_receipt(path)["starts"] if path.exists() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "position": start,
            "command": sys.argv,
            "config_changes": changes(config),
            "versions": versions(),
            "source": source(),
            "data": {"fingerprint": fingerprint},
            "topology": topology(world, ranks or [here(world)]),
            "slurm": slurm(),
        }
    )
    write_whole(path, json.dumps({"starts": starts}, indent=2, default=str) + "\n")
    return path


def read_receipt(path: Path) -> dict[str, Any]:
    """A receipt's content; ConfigError if the file is not one."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content["starts"], list):
            raise TypeError("'starts' is not a list")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("receipt.json", str(path), f"is not a receipt: {error}", "move the file away") from error
    return dict(content)


def versions() -> dict[str, str | None]:
    """Python, halfseen, everything halfseen requires, CUDA and the driver."""
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ["halfseen", *requirements()]:
        found[name] = installed(name)
    found["cuda"] = torch.version.cuda
    driver = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", driver.read_text()) if driver.exists() else None
    found["driver"] = match[1] if match else None
    return found


def requirements() -> list[str]:
    """Names of the packages halfseen cannot do without, read from its own metadata."""
    try:
        listed = importlib.metadata.requires("halfseen") or []
    except importlib.metadata.PackageNotFoundError:  # run from a bare checkout
        return ["torch", "torchvision", "numpy", "timm", "webdataset", "omegaconf"]
    return [match[0] for entry in listed if "extra ==" not in entry and (match := re.match(r"[\w.-]+", entry))]


def installed(name: str) -> str | None:
    """The version of an installed package, None if it is missing."""
    if name == "torch":
        return str(torch.__version__)  # with the build's suffix, which the metadata may lack
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source() -> dict[str, Any] | None:
    """Commit of the checkout this code runs from, and whether files differ; None for an installed package.

    Of a snapshot that `halfseen launch` took: those of the checkout at that time.
    """
    root = Path(__file__).resolve().parents[1]
    if (root / "snapshot.json").is_file():
        return dict(json.loads((root / "snapshot.json").read_text()))
    if not (root / ".git").exists():
        return None
    try:
        commit, status = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return {"commit": None, "dirty": None, "reason": reason.strip()}
    return {"commit": commit, "dirty": bool(status)}


def git(root: Path, *arguments: str) -> str:
    """Output of a git command in a checkout."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def topology(world: World, ranks: list[Place]) -> dict[str, Any]:
    """Ranks, nodes and devices."""
    hosts = sorted({place.host for place in ranks})
    return {
        "world": world.world,
        "nodes": len(hosts) if len(ranks) == world.world else None,
        "hosts": hosts,
        "devices": sorted({place.device for place in ranks}),
        "ranks": [asdict(place) for place in ranks],
    }


def slurm() -> dict[str, str] | None:
    """The Slurm job this process belongs to, None outside Slurm."""
    found = {name: os.environ[f"SLURM_{name.upper()}"] for name in SLURM if f"SLURM_{name.upper()}" in os.environ}
    return found if "job_id" in found else None
