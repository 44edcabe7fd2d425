"""What a job does: run one stage, say how it ended, in an exit code and in the run folder.

Started by submitit, which unpickles a Task, or by a plain batch script: ``python -m halfseen.launch.task RUN``.
"""

import errno
import hashlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import halfseen
from halfseen import signals
from halfseen.cli import COMMANDS, expected, first_rank, message
from halfseen.config import ConfigError
from halfseen.writing import write_whole

from . import records

# No torch at the top: whoever submits imports this file, at the end of a batch script too, where seconds count.

# Exit codes of a start, beside 0 (complete) and signals.SAVED (75: go on in another start).
FINAL = 1  # numbers, data or disk are wrong: another start would end the same
REFUSED = 2  # an option is wrong
BROKEN = 70  # an unexpected error, perhaps of one machine: worth another start (EX_SOFTWARE)

# Errors of a file system that another start meets again.
LASTING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)

# Seconds a rank that ends because of another one leaves that one to say why.
AFTER_THE_CAUSE = 3.0

# Tasks that are no command of their own.
OWN = {"nodes": "halfseen.launch.nodes"}


@dataclass(frozen=True)
class Task:
    """A stage's name and text: all that is pickled. What to resume is found in the run folder."""

    stage: str  # a command of halfseen
    folder: str  # absolute; the run's, or where the stage's records go
    config: str = ""  # what its recipe and overrides state, as YAML, of a stage that trains
    arguments: tuple[str, ...] = ()  # of a command without a config
    code: str = ""  # the snapshot it must run from; empty: whatever Python finds
    total: int = 0  # images of the whole run; 0: not known

    def __call__(self) -> int:
        code = run(self)
        if code:
            sys.exit(code)  # submitit turns an exception into exit code 1, and a return into 0
        return code

    @property
    def config_file(self) -> Path:
        """Where ``save`` puts the config: named by its content, so that a later launch leaves it alone."""
        digest = hashlib.blake2b(self.config.encode(), digest_size=4).hexdigest()
        return records.where(self.folder) / f"config-{digest}.yaml"

    def save(self) -> Path:
        """Write RUN/launch/task.json and the config."""
        path = records.where(self.folder) / "task.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.config:
            self.config_file.write_text(self.config)
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, folder: Path | str) -> "Task":
        """What ``save`` wrote; ConfigError if nothing was ever launched there."""
        path = records.where(folder) / "task.json"
        if not path.is_file():
            raise ConfigError("run.folder", str(folder), "was never launched", "use `halfseen launch STAGE RECIPE`")
        values = json.loads(path.read_text())
        return cls(**values | {"arguments": tuple(values["arguments"])})


def module_of(stage: str) -> Any:
    """The module of a stage, by its name."""
    return importlib.import_module(OWN.get(stage) or COMMANDS[stage][0])


def run(task: Task) -> int:
    """Run the stage in this process, one rank of the job; returns the exit code."""
    attempt = records.attempt()
    # At once: submitit, whose handlers these replace, drops SIGTERM and requeues by itself on USR2, and PyTorch takes
    # seconds to import, minutes where hundreds of ranks read it from one file server.
    with signals.Signals() as asked:
        try:
            code, text = attempted(task, attempt, asked), ""
        except BaseException as error:
            code, text = verdict(error)
            if text and (code != REFUSED or first_rank()):  # every rank refuses the same option
                print(f"error: {text}", file=sys.stderr, flush=True)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # nothing is left to save, and the code must come through
    if code:
        records.say_why(task.folder, attempt, code, text)
    sys.stdout.flush()
    return code


def attempted(task: Task, attempt: str, asked: signals.Signals) -> int:
    """Write down that a start has begun, and run its stage; returns the exit code."""
    from halfseen.distributed import MEETING

    os.environ[MEETING] = str(records.where(task.folder))
    if first_rank():
        names = {"host": os.uname().nodename, "position": records.reached(task.folder), "code": task.code}
        records.add(task.folder, "started", attempt=attempt, **names)
        if task.code:
            with suppress(OSError):  # another's, or read-only
                os.utime(task.code)  # in use: not to be removed as old
    refuse_other_code(task.code)
    if records.asked_to_stop(task.folder, records.job_of(attempt)):
        return signals.SAVED
    module = module_of(task.stage)
    if not hasattr(module, "SCHEMA"):
        if asked.number:
            return signals.SAVED
        leave_at_once(task, attempt)
    return int(module.main([str(task.config_file)] if task.config else list(task.arguments)))


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code of an exception, and what to say about it."""
    from halfseen.lock import Taken
    from halfseen.loop import AnotherRank

    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else int(bool(error.code))), ""
    if isinstance(error, Taken):  # by ranks on a lost node, until the file system or Slurm has noticed
        return BROKEN, message(error)
    if isinstance(error, ConfigError):
        return REFUSED, str(error)
    if isinstance(error, OSError):
        return (FINAL if error.errno in LASTING else BROKEN), message(error)
    if isinstance(error, AnotherRank):
        time.sleep(AFTER_THE_CAUSE)
        return BROKEN, message(error)
    if isinstance(error, expected()):
        return FINAL, message(error)
    traceback.print_exception(error)
    return BROKEN, "".join(traceback.format_exception_only(error)).strip()


def leave_at_once(task: Task, attempt: str) -> None:
    """From now on a signal ends this rank: what does not train has nothing to save, and begins anew, or where its files
    end."""

    def leave(number: int, frame: FrameType | None) -> None:
        records.say_why(task.folder, attempt, signals.SAVED, "")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(signals.SAVED)  # it may be waiting for other ranks

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def refuse_other_code(code: str) -> None:
    """Raise ConfigError if this process does not run the snapshot it should."""
    here = Path(halfseen.__file__).resolve()
    if code and not here.is_relative_to(Path(code).resolve()):
        raise ConfigError(
            "launch.snapshot",
            code,
            f"the job's Python found halfseen in {here.parent} instead",
            "keep PYTHONPATH in launch.setup (put yours behind it), or launch with --no-snapshot",
        )


def locally(task: Callable[[], int], folder: str) -> int:
    """A task outside Slurm, where no batch script is left to say how it ended: rank 0 does."""
    code: Any = BROKEN
    try:
        code = task()
    except SystemExit as left:
        code = left.code
        raise
    finally:
        if first_rank():
            attempt = records.attempt()
            word = "complete" if code == 0 else "saved" if code == signals.SAVED else "failed"
            reason = records.why(folder, attempt)[1]
            values = {"position": records.reached(folder), "code": code, "verdict": word, "reason": reason}
            records.add(folder, "ended", attempt=attempt, **values)
    return int(code)


def main(argv: Sequence[str]) -> int:
    """``python -m halfseen.launch.task RUN``: what a batch script without submitit runs on every rank."""
    job = records.job_of(records.attempt())
    if first_rank() and records.story(argv[0]).job != job:
        records.add(argv[0], "queued", job=job, cluster="slurm", again=False)
    return run(Task.read(argv[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
