"""Writing, finding and loading the checkpoints of a run."""

import dataclasses
import errno
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

import halfseen
from halfseen.config import ConfigError
from halfseen.distributed import PATIENCE, World

from . import folder as layout
from .stretch import Stretch

Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of one run, on a file system that all ranks see. Making it, saving and loading are collective.

    asynchronous: ``save`` returns once the state is copied to host memory; a thread writes and publishes it. One
    save is in flight at a time: whatever comes next waits for it, and raises if it failed.
    """

    def __init__(self, folder: Path, keep: int, world: World, asynchronous: bool = False) -> None:
        self.folder, self.keep, self.world, self.asynchronous = Path(folder), keep, world, asynchronous
        # The thread's messages must never meet the training thread's: it has a group of its own.
        group = world.group
        if asynchronous and group is not None:
            group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        self.writers = dataclasses.replace(world, group=group)
        self.stager = stager(world.device) if asynchronous else None
        self.flight: threading.Thread | None = None
        self.failure: BaseException | None = None

    # ------------------------------------------------------------------------------------------ write

    def save(self, position: int, engine_state: dict[str, Tensor], meta: dict[str, Any]) -> Path:
        """Write a checkpoint and publish it whole; nothing that exists is touched before it is on disk.

        meta: plain JSON values, returned by ``load``; ``aliases`` in it maps other names of tied weights. The
        returned folder exists when this returns, or, if asynchronous, when ``wait`` does.
        """
        self.wait()
        final = self.folder / layout.folder_name(position)
        if self._healthy(final):
            return final
        self._together(self.world, position, self._clear)
        self._refuse_full_disk(engine_state)
        staged = self._stage(engine_state)
        if self.stager is None:
            self._finish(staged, final, position, meta)
        else:
            copied = self._copy(staged)
            # From here on host memory and host messages only. A daemon: an exit by error never waits for it.
            self.flight = threading.Thread(
                target=self._fly, args=(copied, final, position, meta), name="checkpoint writer", daemon=True
            )
            self.flight.start()
        return final

    def wait(self) -> None:
        """Until no save is in flight; raises what made the last one fail, on every rank."""
        if self.flight is None:
            return
        self.flight.join()
        failure, self.flight, self.failure = self.failure, None, None
        if failure is not None:
            raise failure

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, saves may be in flight; when it is left, none is. Ctrl-C alone does not wait for one."""
        try:
            yield
        except Exception:
            try:
                self.wait()
            except Exception as error:  # must not hide the error that ended the block
                print(error, file=sys.stderr, flush=True)
            raise
        self.wait()

    def _fly(self, staged: dict[str, Tensor], final: Path, position: int, meta: dict[str, Any]) -> None:
        """The thread: keep the failure for whoever waits."""
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # each thread begins on GPU 0
            self._finish(staged, final, position, meta)
        except BaseException as error:
            self.failure = error

    def _finish(self, staged: dict[str, Tensor], final: Path, position: int, meta: dict[str, Any]) -> None:
        partial = self.folder / f"{layout.PARTIAL}{final.name}"
        try:
            self._write(staged, partial, position)
            self._publish(partial, final, position, meta)
        except OSError:
            if self.world.main:
                shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
            raise

    def _stage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank writes. Whole tensors, which every rank holds, are dealt out among the ranks."""
        rank, world = self.world.rank, self.world.world
        return {
            key: tensor
            for index, (key, tensor) in enumerate(state.items())
            if isinstance(tensor, (DTensor, Stretch)) or index % world == rank
        }

    def _copy(self, staged: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same in host memory. A stager copies each piece of memory once, however many tensors lie in it."""
        held = {key: tensor.numbers if isinstance(tensor, Stretch) else tensor for key, tensor in staged.items()}
        copied = cast(dict[str, Tensor], cast(DefaultStager, self.stager).stage(held))
        if STAGES_ONCE:
            self.stager = stager(self.world.device)
        for key, tensor in staged.items():
            if isinstance(tensor, Stretch):
                copied[key] = Stretch(copied[key], tensor.shape, tensor.start)
        return copied

    def _clear(self) -> None:
        """Rank 0 removes what crashes left behind."""
        if self.world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(f"{layout.PARTIAL}*"):
                _delete(left_over)

    def _write(self, staged: dict[str, Tensor], partial: Path, position: int) -> None:
        """Write this rank's tensors into a partial folder; every rank raises if one cannot."""
        self._together(self.writers, position, lambda: partial.mkdir() if self.world.main else None)
        hush()
        try:
            dcp.save(
                staged,
                storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
                process_group=self.writers.group,
                no_dist=self.world.world == 1,
            )
        except CheckpointException as error:
            # On a disk that fills up torch's zip writer hides the reason behind another one: the room tells.
            room = shutil.disk_usage(self.folder).free / 2**20
            raise _not_written(position, f"{_reasons(error)} ({room:,.1f} MiB free there)", _number(error)) from error

    def _publish(self, partial: Path, final: Path, position: int, meta: dict[str, Any]) -> None:
        """Describe the files, then rename: the checkpoint exists from that instant, complete."""
        own = f"__{self.world.rank}_*"
        mine = self._together(
            self.writers, position, lambda: {path.name: layout.fingerprint(path) for path in sorted(partial.glob(own))}
        )
        files = {name: entry for part in self.writers.gather_object(mine) for name, entry in part.items()}

        def rename() -> None:
            if not self.world.main:
                return
            files[layout.METADATA] = layout.fingerprint(partial / layout.METADATA)
            versions = {"halfseen": halfseen.__version__, "torch": str(torch.__version__)}
            written = datetime.now(timezone.utc).isoformat(timespec="seconds")
            manifest = {"position": position, "written": written, "world": self.world.world}
            layout.write_manifest(partial, manifest | {"versions": versions, "meta": meta, "files": files})
            if final.exists():  # a damaged one of the same position
                self._remove(final)
            os.rename(partial, final)
            layout.sync(self.folder)
            self._retain(position)

        self._together(self.writers, position, rename)

    def _together(self, world: World, position: int, work: Callable[[], Result]) -> Result:
        """Do it on every rank; if one cannot, all raise and none waits for it for ever."""
        failure, result = None, None
        try:
            result = work()
        except OSError as error:
            failure = error
        failures = world.gather_object(failure and (failure.errno, str(failure)))
        told = [f"rank {rank}: {found[1]}" for rank, found in enumerate(failures) if found]
        if told:
            number = next(found[0] for found in failures if found)
            raise _not_written(position, "; ".join(told), number) from failure
        return cast(Result, result)

    def _retain(self, position: int) -> None:
        """Remove what is older than the newest ``keep`` complete checkpoints up to the one just published.

        Later ones are damaged, or of a course the run has left: they neither count nor go, so they can never push out a
        good one, and the run writes over each when it reaches it.
        """
        past = [path for path in layout.listed(self.folder) if layout.position_of(path) <= position]
        complete = [path for path in past if not layout.faults(path, digests=False)]
        oldest = layout.position_of(complete[: self.keep][-1])
        for path in layout.listed(self.folder):
            if layout.position_of(path) < oldest:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a crash half-way through the removal must not leave a damaged checkpoint behind.
        doomed = path.with_name(f"{layout.PARTIAL}removed_{path.name}")
        os.rename(path, doomed)
        _delete(doomed)

    def _refuse_full_disk(self, state: dict[str, Tensor]) -> None:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        # Every rank sees the same file system, but one of them may see less (a quota): all decide alike.
        short = self.world.largest(max(0, int(needed * 1.02) + (1 << 20) - free))
        if short:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint of {needed / 2**30:.3g} GiB does not fit into {free / 2**30:.3g} GiB. Nothing was "
                "written over; free space or lower run.keep, then start the run again",
                str(self.folder),
            )

    # ------------------------------------------------------------------------------------------ find

    def to_continue(self) -> Path | None:
        """The newest healthy checkpoint; None if the run has none yet, ConfigError if it has some and all are bad.

        To begin anew, over them, is not decided here: a disk may be away for an hour, or the program be an old one.
        """
        newest = self.newest()
        listed = self.world.gather_object(layout.listed(self.folder))[0]
        if newest is None and listed:
            reason = f"none of its {len(listed)} checkpoints is healthy: see the lines above"
            fix = f"bring one back, or remove {self.folder} to start from the beginning"
            raise ConfigError("run.folder", str(self.folder.parent), reason, fix)
        return newest

    def newest(self) -> Path | None:
        """The newest healthy checkpoint. Every file's digest is verified; bad files are named on the way."""
        self.wait()
        for path in self.world.gather_object(layout.listed(self.folder))[0]:
            wrong = self._faults(path)
            if not wrong:
                return path
            if self.world.main:
                for line in wrong:
                    print(f"checkpoint {path.name} passed over: {line}", file=sys.stderr, flush=True)
        return None

    def _faults(self, path: Path) -> list[str]:
        """Faults of one checkpoint; the ranks divide the files among themselves."""
        mine = layout.faults(path, share=(self.world.rank, self.world.world))
        return sorted({line for part in self.world.gather_object(mine) for line in part})

    def _healthy(self, path: Path) -> bool:
        return self.world.any(path.is_dir()) and not self._faults(path)

    # ------------------------------------------------------------------------------------------ read

    def load(self, path: Path, into: dict[str, Tensor]) -> dict[str, Any]:
        """Fill the tensors in place, whoever wrote them; returns the meta of ``save``, and ``position``."""
        self.wait()
        manifest = layout.read_manifest(path)
        reader = dcp.FileSystemReader(path)
        _refuse_other_shapes(path, reader, into)
        hush()
        try:
            dcp.load(into, storage_reader=reader, process_group=self.world.group, no_dist=self.world.world == 1)
        except CheckpointException as error:
            raise OSError(f"checkpoint {path} was not loaded: {_reasons(error)}") from error
        return manifest["meta"] | {"position": manifest["position"]}


def _delete(path: Path) -> None:
    """Remove a folder; of a link to one, which a person has made, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _refuse_other_shapes(path: Path, reader: dcp.FileSystemReader, into: dict[str, Tensor]) -> None:
    """Raise ConfigError naming the first tensor that the checkpoint and the student do not share."""
    stored = {
        key: tuple(entry.size)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    for key in sorted(stored.keys() | into.keys()):
        ours = tuple(into[key].shape) if key in into else None
        if stored.get(key) != ours:
            here = "this student has none" if ours is None else f"this student's is {list(ours)}"
            there = f"is {list(stored[key])}" if key in stored else "is missing"
            raise ConfigError(
                "checkpoint",
                str(path),
                f"{key} {there} there, {here}",
                "resume with the config it was written with (config.yaml in the run folder), or take only its "
                "weights with run.init",
            )


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {_reason(failure)}" for rank, failure in error.failures.items())


def _reason(failure: Any) -> str:
    return f"{type(_cause(failure)).__name__}: {_cause(failure)}"


def _cause(failure: Any) -> Any:
    """torch keeps an error alone, or with its traceback."""
    return failure[0] if isinstance(failure, tuple) else failure


def _number(error: CheckpointException) -> int | None:
    """The first error number that a rank's failure has: what a launcher judges by."""
    numbers = (getattr(_cause(failure), "errno", None) for failure in error.failures.values())
    return next((number for number in numbers if number), None)


def _not_written(position: int, why: str, number: int | None) -> OSError:
    """number: the cause's errno. Not an argument, which would begin the text with it."""
    error = OSError(f"checkpoint at {position} was not written: {why}; older ones are untouched")
    error.errno = number
    return error


# torch 2.11 and 2.12 close a stager behind its first copy: it cannot make another, and its buffers are gone.
STAGES_ONCE = torch.__version__ < "2.13"


def stager(device: torch.device) -> DefaultStager:
    """Copies a state to host memory, pinned beside a GPU, whose buffers the next copy uses again."""
    gpu = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
        )
    )


def hush() -> None:
    """One process without a process group is normal here, and no reason to warn.

    Not warnings.catch_warnings: the filters belong to all threads, and leaving it would undo the others' changes.
    """
    warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
    warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
