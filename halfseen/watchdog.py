"""The watchdog: a run that stands still, or has lost a rank, says where, and ends: a scheduler can start it again."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from halfseen.distributed import World
from halfseen.loop import AnotherRank
from halfseen.writing import write_whole

# What a rank reads for the n-th micro-batch of the step at a position, in words: reading(rank, position, n).
Reading = Callable[[int, int, int], str]

# Exit code of a run that stood still: what timeout(1) gives for a command that ran out of time.
STALLED = 124

LOOK = 10.0  # most seconds between two looks, and between two heartbeats on disk
GRACE = 3.0  # seconds rank 0 leaves the others for their last heartbeat before it names the late one
ALONE = 30.0  # most seconds a rank goes on, perhaps waiting on its device, after it has seen that another one failed


class Watchdog:
    """Watches this rank from a thread; ``beat`` says that it lives, and in which phase of which step.

    RUN/heartbeat/rank_N.json holds each rank's last beat. When none came for ``minutes``, the rank writes every
    thread's stack to stderr and RUN/stall_rank_N.txt, rank 0 names the rank that is behind the others, and the
    process exits with code 124, every rank within 30 seconds of the first. minutes 0: off.

    An exception that leaves the with block is told to the others by RUN/failed.txt, which holds the first one; a rank
    that has not ended by itself ALONE seconds after it saw the file is ended, with code 1.
    """

    def __init__(self, folder: Path, minutes: float, world: World, reading: Reading | None = None) -> None:
        self.folder, self.seconds, self.world, self.reading = folder, 60.0 * minutes, world, reading
        self.failed = folder / "failed.txt"
        self.pause = min(LOOK, self.seconds / 4)
        self.phase, self.position, self.turn = "start", 0, 0  # turn: times that phase had begun there already
        self.beats = 0  # ranks beat alike, so the one with the fewest beats is the one the others wait for
        self.last = time.monotonic()
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def beat(self, phase: str, position: int) -> None:
        """This rank begins a phase (data, agree, step, log, evaluate, picture, save). Costs nothing."""
        self.turn = self.turn + 1 if (phase, position) == (self.phase, self.position) else 0
        self.phase, self.position = phase, position
        self.beats += 1
        self.last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.world.main:
            for told in (self.failed, *self.folder.glob("stall_rank_*.txt")):
                told.unlink(missing_ok=True)  # of an earlier start
        if self.seconds > 0:
            self.last = time.monotonic()
            self._write()
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        if self.thread is not None:
            self.thread.join()
        # Who raises because another rank did is not the cause.
        if isinstance(error, Exception) and not isinstance(error, AnotherRank) and self.world.world > 1:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Tell the other ranks why this one ends, unless another did so first: then this is what followed."""
        reason = str(error).strip().partition("\n")[0]
        here = f"rank {self.world.rank} ({socket.gethostname()}, process {os.getpid()})"
        line = f"{here} in phase {self.phase!r} at {self.position:,}: {type(error).__name__}: {reason}"
        try:
            with self.failed.open("x") as file:
                file.write(line + "\n")
        except FileExistsError:
            line = self.failed.read_text().strip()
            if not self.world.main:
                return
        except OSError as broken:
            print(f"{self.failed} was not written: {broken}", file=sys.stderr, flush=True)
        print(f"rank {self.world.rank} ends: first to fail was {line}", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        pause = self.pause
        looked, alone = time.monotonic(), 0.0
        while not self.stop.wait(pause):
            now = time.monotonic()
            if now - looked > pause + self.seconds / 2:
                self.last = now  # the whole process was stopped (a laptop's lid, a debugger): begin anew
            looked = now
            self._write()
            if os.path.exists(self.failed):  # unlike Path.exists, whatever ails the file system
                alone = alone or now
                if now - alone > ALONE:
                    self._leave()
            # Rank 0 joins the first to notice: a rank that has left breaks the others' messages, with its own error.
            joins = self.world.main and any(self.folder.glob("stall_rank_*.txt"))
            if joins or now - self.last > self.seconds:
                self._bark(now - self.last)

    def _write(self) -> None:
        """Put the heartbeat on disk. A disk that fails is for the checkpoints to tell, not for the watchdog."""
        path = self.folder / "heartbeat" / f"rank_{self.world.rank}.json"
        content = {
            "rank": self.world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self.phase,
            "position": self.position,
            "turn": self.turn,
            "beats": self.beats,
            "seconds_ago": round(time.monotonic() - self.last, 1),
            "written": time.time(),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content) + "\n")
        except OSError as error:
            print(f"heartbeat {path} was not written: {error}", file=sys.stderr, flush=True)

    def _leave(self) -> None:
        """End, since a rank that has failed will answer no message any more. Waits for nothing, as ``_bark``."""
        try:
            told = self.failed.read_text()
        except OSError as error:
            told = f"told in {self.failed}, which cannot be read: {error}"
        print(f"rank {self.world.rank} ends: first to fail was {told}", file=sys.stderr, flush=True)
        os._exit(1)

    def _bark(self, silent: float) -> None:
        """Tell and end. Nothing in here may wait for another thread of this process, or for another rank."""
        rank = self.world.rank
        print(f"rank {rank} stands still: {silent:.0f} s in phase {self.phase!r} at {self.position:,}", file=sys.stderr)
        sys.stderr.flush()
        try:
            with (self.folder / f"stall_rank_{rank}.txt").open("w") as file:
                file.write(f"phase {self.phase}, position {self.position}, {silent:.0f} s without a heartbeat\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        except (OSError, ValueError) as error:
            print(f"the stacks were not written: {error}", file=sys.stderr, flush=True)
        if self.world.main:
            time.sleep(GRACE)
            print(verdict(self.folder / "heartbeat", self.world.world, self.reading), file=sys.stderr, flush=True)
        else:
            time.sleep(self.pause + 2 * GRACE)  # rank 0 has noticed and spoken by then
        os._exit(STALLED)


def verdict(folder: Path, world: int, reading: Reading | None = None) -> str:
    """Who the others wait for, from the heartbeats on disk, and what that rank is reading."""
    beats: dict[int, dict[str, Any]] = {}
    missing = []
    for rank in range(world):
        try:
            beats[rank] = json.loads((folder / f"rank_{rank}.json").read_text())
        except (OSError, ValueError):
            missing.append(rank)
    if missing:
        return f"stalled: no heartbeat at all from ranks {missing}"
    fewest = min(beat["beats"] for beat in beats.values())
    late = [beat for beat in beats.values() if beat["beats"] == fewest]
    where = "; ".join(_place(beat, reading) for beat in late[:8])
    if len(late) == world:
        return f"stalled: all ranks are equally far: {where}; see stall_rank_*.txt"
    return f"stalled: late is {where}; the others wait for it; see stall_rank_*.txt"


def _place(beat: dict[str, Any], reading: Reading | None) -> str:
    """Where a rank is, in words."""
    rank, position = beat["rank"], beat["position"]
    text = f"rank {rank} ({beat['host']}, process {beat['pid']}) in phase {beat['phase']!r} at {position:,}"
    if reading and beat["phase"] == "data":
        text += f", reading {reading(rank, position, beat['turn'])}"
    return text
