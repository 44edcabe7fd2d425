"""The processes of a run: who they are (torchrun, submitit, Slurm or alone) and what they agree on."""

import os
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from halfseen.config import ConfigError

# A rank may wait this long for another one: long enough for rank 0 to index shards or verify a checkpoint.
PATIENCE = timedelta(minutes=30)

# Ports for jobs whose scheduler names none: below the range from which Linux hands out ports (32768).
PORTS = range(15_000, 30_000)

# Names a folder that all ranks see. There rank 0 tells the others which free port the system gave it, so two jobs on
# one node never meet. `halfseen launch` sets it; a bare srun has none and computes a port from the job's number.
MEETING = "HALFSEEN_MEETING"


@dataclass
class World:
    """This process among the run's processes. Every method works without a process group too."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # gloo, for flags and objects; tensors on the device use the default group
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes logs and manifests."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank (host only; the device keeps working)."""
        if self.group is not None:
            dist.barrier(self.group)

    def largest(self, value: int) -> int:
        """The largest value any rank gave. A host message: it does not wait for the device."""
        if self.group is None:
            return value
        agreed = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, self.group)
        return int(agreed)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all of them."""
        return bool(self.largest(int(bool(flag))))

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks, as a new tensor on its own device."""
        total = tensor.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def gather_object(self, value: Any) -> list[Any]:
        """Every rank's value in rank order, on every rank. The value must pickle."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, self.group)
        return gathered

    def stop(self) -> None:
        """Leave the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.group = None


@dataclass(frozen=True)
class Place:
    """What a launcher tells a process about itself."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    attempt: str = field(default="", compare=False)  # job, step and restart; differs whenever a rendezvous does


def place(environment: dict[str, str]) -> Place | None:
    """Read torchrun's variables, else submitit's local ones, else Slurm's; None when the process is alone."""
    get = environment.get
    if get("RANK") is not None and get("WORLD_SIZE") is not None:
        found = Place(
            _number(environment, "RANK"),
            _number(environment, "WORLD_SIZE"),
            _number(environment, "LOCAL_RANK", "0"),
            get("MASTER_ADDR", "127.0.0.1"),
            _number(environment, "MASTER_PORT", "0"),
        )
        if found.world > 1 and not found.port:
            raise ConfigError("MASTER_PORT", "", "is not set although WORLD_SIZE > 1", "launch with torchrun")
    elif get("SUBMITIT_LOCAL_GLOBALID") is not None:
        found = Place(
            _number(environment, "SUBMITIT_LOCAL_GLOBALID"),
            _number(environment, "SUBMITIT_LOCAL_NTASKS"),
            _number(environment, "SUBMITIT_LOCAL_LOCALID"),
            "127.0.0.1",
            port_of(f"submitit {get('SUBMITIT_LOCAL_JOB_ID', '')}"),
            f"local-{get('SUBMITIT_LOCAL_JOB_ID', '')}",
        )
    elif get("SLURM_STEP_NUM_TASKS") is not None and get("SLURM_PROCID") is not None:
        # Only srun sets SLURM_STEP_NUM_TASKS: a plain python in a batch script or an salloc shell is alone.
        nodes = get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST") or "127.0.0.1"
        found = Place(
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_STEP_NUM_TASKS"),
            _number(environment, "SLURM_LOCALID", "0"),
            get("MASTER_ADDR") or first_host(nodes),
            _number(environment, "MASTER_PORT", "0")
            or port_of(f"slurm {get('SLURM_JOB_ID', '')}.{get('SLURM_STEP_ID', '')}"),
            f"{get('SLURM_JOB_ID', '')}.{get('SLURM_STEP_ID', '')}.{get('SLURM_RESTART_COUNT', '0')}",
        )
    else:
        return None
    if not 0 <= found.rank < found.world:
        raise ConfigError("RANK", found.rank, f"is not within 0..{found.world - 1}", "launch with torchrun or srun")
    return found


def _number(environment: dict[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not re.fullmatch(r"-?\d+", text):
        raise ConfigError(name, text, "is not a whole number", "launch with torchrun or srun, which set it")
    return int(text)


def first_host(nodes: str) -> str:
    """The first name in a Slurm node list such as ``gpu[007-012,40],login``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert match  # every part is optional
    return match[1] + (match[2] or "") + (match[3] or "")


def port_of(job: str) -> int:
    """A port that every process of a job computes alike and that differs between the jobs of one node."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def start(device: str) -> World:
    """Join the run's processes; ``device`` is auto, cpu or cuda.

    gloo on the CPU, nccl on CUDA, each with a gloo group for host messages. One process gets none.
    """
    found = place(dict(os.environ))
    local_rank = found.local_rank if found else 0
    chosen = choose_device(device, local_rank)
    if found is None or found.world == 1:
        return World(device=chosen)
    folder = os.environ.get(MEETING)
    meeting = Path(folder) / f"meeting-{found.attempt}" if folder and found.attempt else None
    store = meet(meeting, found) if meeting else None
    dist.init_process_group(
        "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=None if store else f"tcp://{_bracketed(found.address)}:{found.port}",
        store=store,
        rank=found.rank,
        world_size=found.world,
        timeout=PATIENCE,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    group = cast(Any, dist.new_group(backend="gloo", timeout=PATIENCE))
    if meeting and found.rank == 0:
        meeting.unlink(missing_ok=True)  # the new group needed every rank, so all have read it
    return World(found.rank, found.world, local_rank, chosen, group)


def meet(file: Path, found: Place, patience: timedelta = PATIENCE) -> dist.TCPStore:
    """The store through which the ranks find each other: rank 0 opens it on a free port and says which in a file.

    The system chooses the port in the moment of opening it, so there is no clash to try again after. ConfigError
    if the file never appears.
    """
    if found.rank == 0:
        store = dist.TCPStore(found.address, 0, found.world, True, PATIENCE, wait_for_workers=False)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(f"{store.port}\n")
        os.replace(partial, file)
        return store
    deadline, pause = time.monotonic() + patience.total_seconds(), 0.1
    while not file.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                MEETING,
                str(file.parent),
                f"rank 0 did not say its port there within {patience}",
                "look at rank 0's log; if it runs, this node does not see the same folder: put the run on a shared one",
            )
        os.listdir(file.parent)  # makes a network file system look again
        time.sleep(pause)
        pause = min(2.0, 1.2 * pause)  # hundreds of ranks may ask one file server
    return dist.TCPStore(found.address, int(file.read_text()), found.world, False, PATIENCE)


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@contextmanager
def started(device: str) -> Iterator[World]:
    """``start`` for the length of a with block."""
    world = start(device)
    try:
        yield world
    except BaseException:
        # Leaving a group may wait for all of its ranks, and this one ends alone; its exit is what frees the others.
        if world.world == 1:
            world.stop()
        raise
    world.stop()


def choose_device(device: str, local_rank: int) -> torch.device:
    """This rank's device. A launcher that shows each process one GPU of its own is respected."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("engine.device", device, "no CUDA device is visible", "use engine.device=cpu or auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count and count > 1:
        raise ConfigError(
            "engine.device",
            "cuda",
            f"local rank {local_rank} has no GPU: {count} are visible",
            f"start {count} ranks a node",
        )
    chosen = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(chosen)
    return chosen


def one_process_group(world: World) -> None:
    """Give a lone process the group that sharding needs: in memory, without a port."""
    if not dist.is_initialized():
        backend = "gloo" if world.device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
