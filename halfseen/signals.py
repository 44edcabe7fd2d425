"""Signals that ask a run to save and stop: they set a flag, the loop reads it between two steps."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

# Exit code of a run that saved and stopped because it was asked to: EX_TEMPFAIL, "run it again to continue".
SAVED = 75

# SIGTERM: schedulers at the end of the time limit. SIGUSR2: submitit and Slurm's --signal. SIGINT: Ctrl-C.
ASKING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class Signals:
    """While entered, SIGTERM, SIGUSR2 and SIGINT only set ``number``. A second Ctrl-C stops at once.

    A child forked in here (a loader process) ignores them while this process lives: a scheduler signals the
    whole process group, and the last step still needs its data.

    Entered inside another Signals, it begins with what that one has heard: a launcher enters one before the imports
    and the process group, so a signal during start-up is not lost either.
    """

    def __init__(self) -> None:
        self.number = 0  # number of the first signal that came, 0 for none
        self.since = 0.0
        self.owner = os.getpid()
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        for number in ASKING:
            self.before[number] = signal.signal(number, self._note)
        outer = getattr(self.before[ASKING[0]], "__self__", None)
        if isinstance(outer, Signals):
            self.number, self.since = outer.number, outer.since
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            if os.getppid() != self.owner:  # orphaned: nobody else will end it
                os._exit(128 + number)
            return
        # torchrun repeats a Ctrl-C to its children within milliseconds; a person takes longer.
        if number == signal.SIGINT and self.number and time.monotonic() - self.since > 1.0:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.since = int(number), time.monotonic()


def name(number: int) -> str:
    """``SIGTERM`` for 15."""
    return signal.Signals(number).name
