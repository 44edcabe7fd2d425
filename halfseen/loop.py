"""The training loop: read, step, report, save, until the last image or a signal."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halfseen import capsule, signals
from halfseen.checkpoint import Checkpoints
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.engines import Engine
from halfseen.monitor import Monitor
from halfseen.optim import Schedule

Batch = dict[str, Any]

BROKEN = 1 << 16  # above every signal's number: some rank cannot read its data


class Alarmed(RuntimeError):
    """A scalar left its bounds, and the config says that the run is then not worth continuing."""


class AnotherRank(RuntimeError):
    """This rank is sound, but one that it works with is not."""


@dataclass(frozen=True)
class Outcome:
    """Where a run stands when the loop ends."""

    position: int  # images consumed
    stopped_by: str | None = None  # the signal's name; None when the run is complete
    skipped: int = 0  # updates of the run that were not finite and never entered the weights


def train(
    *,
    engine: Engine,
    batches: Callable[[int], Iterator[Batch]],
    plan: Batches,
    prepare: Callable[[Batch], Batch],
    schedule: Schedule,
    monitor: Monitor,
    checkpoints: Checkpoints,
    world: World,
    start: int,
    total: int,
    checkpoint_every: int,
    log_every: int,
    evaluate_every: int = 0,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    picture_every: int = 0,
    picture: Callable[[int], None] | None = None,
    meta: Callable[[int], dict[str, Any]] = lambda position: {},
    beat: Callable[[str, int], None] = lambda phase, position: None,
    skipped: int = 0,
) -> Outcome:
    """Train from position start to total, both in images. Collective.

    batches(position) yields this rank's micro-batches from there on. evaluate(position) returns numbers to log.
    beat(phase, position) tells a watchdog that the run lives. A signal that any rank got ends the run between two
    steps, saved. The end is always saved. skipped: updates skipped before start; a run of which no update at all was
    applied never ends as complete, but with NotFinite and a capsule.
    """

    def again(at: int) -> capsule.Finding:
        return capsule.again(engine, batches(at), plan, prepare, schedule.rate(at), at)

    guard = Guard(engine, plan, monitor, checkpoints, meta, again, skipped)
    position, data = start, batches(start)
    with signals.Signals() as asked, checkpoints.writing():
        while position < total:
            micro_batches, waited, signal = fetch(data, prepare, plan.accumulation, asked, world, beat, position)
            if signal:
                beat("save", position)
                monitor.flush(position)
                position = guard.save(position)
                checkpoints.wait()
                monitor.note(f"{signals.name(signal)}: saved at {position:,} of {total:,} images; run it again")
                return Outcome(position, signals.name(signal), guard.total)
            beat("step", position)
            scalars = engine.step(micro_batches, schedule.rate(position), position)
            position += plan.total
            shown: dict[str, Tensor | float] = {**scalars, **engine.hyperparameters()}
            monitor.step(position, shown, images=plan.total, waited=waited)
            if position >= total or due(position, plan.total, log_every):
                beat("log", position)
                if world.any(bool(monitor.flush(position))):
                    raise Alarmed(f"an alarm of monitor.alarms ended the run at image {position:,}; rank 0 says which")
                healthy = guard.examine(position)
                if healthy != position:
                    position, data = healthy, batches(healthy)
                    continue
                if position >= total:
                    guard.conclude(position)
            with monitor.aside():
                if evaluate and due(position, plan.total, evaluate_every, total):
                    beat("evaluate", position)
                    monitor.scalars(position, evaluate(position))
                if picture and due(position, plan.total, picture_every, total):
                    beat("picture", position)
                    picture(position)
                if due(position, plan.total, checkpoint_every, total):
                    beat("save", position)
                    monitor.flush(position)  # a resume starts an interval here, so an uninterrupted run does too
                    saved = guard.save(position)
                    if saved != position:
                        position, data = saved, batches(saved)
    return Outcome(position, None, guard.total)


def due(position: int, step: int, every: int, total: int | None = None) -> bool:
    """Whether a multiple of ``every`` images was passed in the step that ended at position.

    With total, the last step is always due (unless every is 0: never), and a time within a quarter interval
    before it is not, since the last step follows at once.
    """
    if every <= 0:
        return False
    if total is not None and position >= total:
        return True
    passed = position // every > (position - step) // every
    return passed and (total is None or 4 * (total - position) >= every)


def fetch(
    data: Iterator[Batch],
    prepare: Callable[[Batch], Batch],
    count: int,
    asked: signals.Signals,
    world: World,
    beat: Callable[[str, int], None],
    position: int,
) -> tuple[list[Batch], float, int]:
    """The step's prepared micro-batches, seconds waited for them, and the signal any rank got (0: none).

    The only host message of a step. If one rank cannot read its data, all raise: none waits for it for ever.
    """
    micro_batches, waited = [], 0.0
    failure: BaseException | None = None
    try:
        for _ in range(count):
            beat("data", position)
            began = time.perf_counter()
            batch = next(data)
            waited += time.perf_counter() - began
            micro_batches.append(prepare(batch))
    except StopIteration:
        failure = RuntimeError("the training data ended before the run did")
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    beat("agree", position)
    message = world.largest(BROKEN if failure else asked.number)
    if failure:
        raise failure
    if message >= BROKEN:
        raise AnotherRank("another rank could not read its data; that rank's message says why")
    return micro_batches, waited, message


class Guard:
    """Keeps a run sound between steps: skip within a budget, then go back, then stop with a capsule."""

    def __init__(
        self,
        engine: Engine,
        plan: Batches,
        monitor: Monitor,
        checkpoints: Checkpoints,
        meta: Callable[[int], dict[str, Any]],
        again: Callable[[int], capsule.Finding],
        before: int = 0,
    ) -> None:
        self.engine, self.plan, self.monitor, self.checkpoints = engine, plan, monitor, checkpoints
        self.meta = meta  # of a position: what a checkpoint there tells beside its tensors
        self.again = again  # takes the step at a position once more, watched
        self.before = before  # updates skipped up to the last checkpoint
        self.skipped, self.first = 0, 0  # since the last checkpoint: how many updates, and where the first was
        self.returns = 0  # to the last checkpoint, in all

    @property
    def total(self) -> int:
        """Updates that the run, as it stands, has skipped."""
        return self.before + self.skipped

    def conclude(self, position: int) -> None:
        """At the end: say how many updates are missing; raise NotFinite if they all are."""
        steps = position // self.plan.total
        if steps and self.total >= steps:
            raise self._stop(self.checkpoints.newest(), f"not one of the run's {steps:,} updates was applied")
        if self.total:
            self.monitor.note(f"{self.total:,} of the run's {steps:,} updates were skipped")

    def save(self, position: int) -> int:
        """Write a checkpoint if the steps since the last one were sound; returns where the run stands."""
        healthy = self.examine(position)
        if healthy == position:
            described = {"engine": self.engine.name, "aliases": self.engine.aliases, "seed": self.engine.seed}
            described |= {"skipped": self.total}
            self.checkpoints.save(position, self.engine.state(), self.meta(position) | described)
            self.before, self.skipped = self.total, 0
        return healthy

    def examine(self, position: int) -> int:
        """Count skipped updates (waits for the device); returns where to go on, the same on every rank."""
        new = self.engine.skipped()
        if not new:
            return position
        if not self.skipped:
            self.first = self.engine.first_skipped or 0
        self.skipped += new
        budget = self.engine.cfg.skip_budget
        self.monitor.note(
            f"{new} updates skipped before {position:,}: a loss or gradient was not finite "
            f"({self.skipped} of {budget} allowed since the last checkpoint; first at {self.first:,})"
        )
        return position if self.skipped <= budget else self._return(position)

    def _return(self, position: int) -> int:
        """Go back to the newest healthy checkpoint, or stop."""
        newest = self.checkpoints.newest()
        if newest is None or self.returns >= self.engine.cfg.rollback_budget:
            raise self._stop(newest)
        self.returns += 1
        state = self.engine.state()
        reached = int(self.checkpoints.load(newest, state)["position"])
        self.engine.load_state(state)
        self.monitor.note(
            f"back from {position:,} to {reached:,} ({newest.name}): return {self.returns} of "
            f"{self.engine.cfg.rollback_budget} allowed"
        )
        self.skipped = 0
        self.monitor.rewind(reached)
        return reached

    def _stop(self, newest: Path | None, why: str = "") -> capsule.NotFinite:
        """Write the capsule, at once and then with what another look at the step showed."""
        told = (self.checkpoints, newest, self.engine, self.plan, self.first, self.skipped)
        path = capsule.write(*told)
        try:
            finding = self.again(self.first)
            capsule.write(*told, finding)
            seen = str(finding)
        except Exception as error:  # whatever goes wrong in here, the run must end with the message below
            seen = f"another look at it failed: {error!r}"
        why = why or f"{self.skipped} updates since the last checkpoint were not finite"
        return capsule.NotFinite(
            f"{why}, the first at image {self.first:,}; "
            f"the run has gone back {self.returns} times; {seen}. The checkpoints are sound. "
            f"`halfseen replay {path}` runs that step again"
        )
