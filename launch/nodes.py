"""``halfseen launch nodes``: a job of a minute that reports what the nodes really have."""

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from halfseen import distributed, signals
from halfseen.distributed import World

from . import records, slurm

ROUNDS = 5  # all-reduces that are timed, after one that is not
PATIENCE = 30.0  # seconds a file or a signal may take to arrive


def main(argv: Sequence[str]) -> int:
    """``python -m halfseen.launch.task FOLDER`` ends up here on every rank; argv: the folder."""
    folder = Path(argv[0])
    with signals.Signals() as asked, distributed.started("auto") as world:
        found = {
            "rank": world.rank,
            "host": socket.gethostname(),
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "all_reduce_gb_s": bandwidth(world),
            "file_seconds": shared_file(folder, world),
            "signal_seconds": delivered(world, asked),
        }
        rows = world.gather_object(found)
        if world.main:
            (folder / "nodes.json").write_text(json.dumps(rows, indent=1) + "\n")
            print("\n".join(report(rows)), flush=True)
    return 0


def bandwidth(world: World) -> float | None:
    """Gigabytes a second that an all-reduce moves over each rank's link; None for one rank."""
    if world.world == 1:
        return None
    size = 64 << 20 if world.device.type == "cuda" else 4 << 20
    tensor = torch.ones(size // 4, device=world.device)
    began = 0.0
    for number in range(ROUNDS + 1):
        if number == 1:
            wait(world)
            began = time.perf_counter()
        dist.all_reduce(tensor)
    wait(world)
    seconds = (time.perf_counter() - began) / ROUNDS
    return round(2 * (world.world - 1) / world.world * size / seconds / 1e9, 3)


def wait(world: World) -> None:
    """Until every rank's device has nothing left to do."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.barrier()


def shared_file(folder: Path, world: World) -> float | None:
    """Seconds until this rank sees what rank 0 has written; None if it never does: the folder is not shared."""
    path = folder / f"seen-{records.attempt()}"
    world.barrier()
    began = time.perf_counter()
    if world.main:
        path.write_text("here\n")
    while not path.exists():
        if time.perf_counter() - began > PATIENCE:
            break
        if folder.is_dir():
            os.listdir(folder)  # makes a network file system look again
        time.sleep(0.005)
    seconds = round(time.perf_counter() - began, 3) if path.exists() else None
    world.barrier()
    if world.main:
        path.unlink()
    return seconds


def delivered(world: World, asked: signals.Signals) -> float | None:
    """Seconds until SIGUSR2 through Slurm reaches this rank; None if it does not, or outside Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    world.barrier()
    began = time.perf_counter()
    if world.main:
        slurm.cancel(job, "USR2")
    while not asked.number and time.perf_counter() - began < PATIENCE:
        time.sleep(0.005)
    return round(time.perf_counter() - began, 3) if asked.number else None


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The findings, the worst rank of each."""
    hosts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        hosts.setdefault(row["host"], []).append(row)
    lines = [
        f"{host}: ranks {[row['rank'] for row in mine]}, {mine[0]['device']}, {mine[0]['cores']} cores a rank, "
        f"{mine[0]['memory_gib']} GiB"
        for host, mine in hosts.items()
    ]
    speed = rows[0]["all_reduce_gb_s"]
    lines.append(f"all-reduce: {speed} GB/s over each rank's link" if speed else "all-reduce: one rank, not measured")
    blind = [row["rank"] for row in rows if row["file_seconds"] is None]
    if blind:
        lines.append(f"shared folder: ranks {blind} never saw a file of rank 0: the folder is NOT shared with them")
    else:
        lines.append(f"shared folder: a file is seen after {max(row['file_seconds'] for row in rows)} s at most")
    deaf = [row["rank"] for row in rows if row["signal_seconds"] is None]
    if "SLURM_JOB_ID" not in os.environ:
        lines.append("signals: no Slurm, not tried")
    elif deaf:
        lines.append(f"signals: USR2 does NOT reach ranks {deaf}: they lose what came after the last checkpoint")
    else:
        lines.append(f"signals: USR2 reaches every rank within {max(row['signal_seconds'] for row in rows)} s")
    return lines
