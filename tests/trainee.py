"""A whole toy run in a folder, for tests that stop, kill and continue it."""

import contextlib
import json
import time

from toys import TOTAL, make, stream

from halfseen import loop
from halfseen.checkpoint import Checkpoints
from halfseen.config import Optim
from halfseen.derived import Batches
from halfseen.optim import Schedule
from halfseen.watchdog import Watchdog

LONGEST = 12 * TOTAL  # what the schedule refers to, however early a part of the run ends


class Log:
    """A monitor that keeps what it is told, and on rank 0 writes each step's loss to a file."""

    def __init__(self, file=None):
        self.file, self.losses, self.notes, self.scalar_rows, self.pictures = file, {}, [], [], []
        self.images, self.shown, self.rewound = 0, {}, []

    def step(self, position, scalars, *, images, waited):
        assert waited >= 0
        self.losses[position] = float(scalars["loss"])
        self.shown, self.images = scalars, self.images + images
        if self.file:
            with self.file.open("a") as out:
                out.write(json.dumps([position, self.losses[position]]) + "\n")

    def aside(self):
        return contextlib.nullcontext()

    def flush(self, position): ...

    def rewind(self, position):
        self.rewound.append(position)

    def note(self, text):
        self.notes.append(text)

    def scalars(self, position, values):
        self.scalar_rows.append((position, values))


def train(
    folder,
    world,
    total,
    *,
    engine="auto",
    every=3 * TOTAL,
    slow=0.0,
    data=stream,
    monitor=None,
    beside=True,
    minutes=0.0,
    reading=None,
    change=lambda engine: engine,
    **options,
):
    """Start or continue the run in a folder; returns the outcome, the engine and the monitor."""
    made = change(make(world, engine, **options))
    plan = Batches(TOTAL, world.world, TOTAL // world.world // 2, 2)
    store = Checkpoints(folder / "checkpoints", 2, world, asynchronous=beside)
    newest, start, skipped = store.newest(), 0, 0
    if newest:
        state = made.state()
        meta = store.load(newest, state)
        start, skipped = meta["position"], meta["skipped"]
        made.load_state(state)
    monitor = monitor or Log(folder / "losses.jsonl" if world.main else None)
    with Watchdog(folder, minutes, world, reading) as watchdog:
        outcome = loop.train(
            engine=made,
            batches=lambda position: data(plan, world.rank, position),
            plan=plan,
            prepare=lambda batch: time.sleep(slow / 2) or batch,
            schedule=Schedule(Optim(), 0.01, 2 * TOTAL, LONGEST),
            monitor=monitor,
            checkpoints=store,
            world=world,
            start=start,
            total=total,
            checkpoint_every=every,
            log_every=2 * TOTAL,
            beat=watchdog.beat,
            skipped=skipped,
        )
    return outcome, made, monitor
