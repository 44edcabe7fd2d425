"""The end of a batch script: ``python -m halfseen.launch.after CODE RUN``. Says why the ranks ended, and starts them
again where that can help.

It runs after srun, outside the step, so nothing that ends the step can end it half-way, and it sees every way in which
ranks end: asked to save, killed, stuck, wrong. No torch in here: a scheduler leaves seconds.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfseen.signals import SAVED

from . import records, slurm

FINAL, REFUSED, BROKEN, STALLED = 1, 2, 70, 124  # as in launch/task.py and halfseen/watchdog.py, which import torch

# States in which the job is still ours: what happens next is for us to say.
OURS = ("RUNNING", "")
# States of a job that somebody else, or Slurm, has put back into the queue.
QUEUED = ("PENDING", "REQUEUED", "CONFIGURING")
# States in which Slurm has ended it for good although it should go on.
CUT = ("PREEMPTED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")


@dataclass(frozen=True)
class Verdict:
    """What happens next, and why."""

    word: str  # complete, requeue, resubmit, stopped, failed, left
    reason: str


def decide(code: int, state: str, *, stop: bool, why: str, fruitless: int, budget: int, requeue: str) -> Verdict:
    """What to do after the ranks ended with ``code``.

    state: of the job, as Slurm has it. stop: `halfseen stop` was called. why: the first rank's error. fruitless: starts
    in a row without a newer checkpoint, this one included. budget, requeue: from the launch config.
    """
    reason = why.splitlines()[0] if why else meaning(code)
    if code == 0:
        return Verdict("complete", "nothing is left to do")
    if stop:
        return Verdict("stopped", "asked to stop; saved" if code == SAVED else f"asked to stop; {reason}")
    if code in (FINAL, REFUSED):
        return Verdict("failed", reason)
    if state in QUEUED:
        return Verdict("left", f"requeued from outside; {reason}")
    if state not in (*OURS, *CUT):
        return Verdict("left", f"Slurm ended the job: {state}")
    if requeue == "never":
        return Verdict("failed", f"{reason}; launch.requeue=never")
    if fruitless >= budget:
        return Verdict("failed", f"{fruitless} starts in a row brought no newer checkpoint; the last one: {reason}")
    if state in CUT:
        return Verdict("resubmit", f"{state.lower().replace('_', ' ')}; {reason}")
    return Verdict("resubmit" if requeue == "resubmit" else "requeue", reason)


def cause(code: int, first: int | None, why: str) -> tuple[int, str]:
    """Exit code and reason: those of the first rank that ended with a word, else srun's.

    A rank says when something is wrong for good. Where none could, srun's own 1 is a node that did not answer, or a
    Python that did not start: perhaps not on the next nodes.
    """
    if first is not None:
        return first, why
    if code in (FINAL, REFUSED):
        return BROKEN, f"no rank could say why: srun ended with {code}; see halfseen logs"
    return code, why


def meaning(code: int) -> str:
    """An exit code in words."""
    if code == SAVED:
        return "asked to leave (time limit or preemption); saved"
    if code == STALLED:
        return "stood still; see stall_rank_*.txt"
    if code > 128:
        try:
            return f"a rank was ended by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f"exit code {code}; see halfseen logs"


def main(argv: Sequence[str]) -> int:
    """Decide, act, record; returns the batch script's exit code."""
    from . import sweep

    code, folder = int(argv[0]), argv[1]
    if len(argv) > 2:  # a job array: the batch script is that of all members
        folder = sweep.member(folder, argv[2], os.environ["SLURM_ARRAY_TASK_ID"])
    attempt = records.attempt()
    job = records.job_of(attempt)  # not SLURM_JOB_ID, which for the last member of an array names all of them
    state = slurm.fate(job, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    position = records.reached(folder)
    if attempt not in {start["attempt"] for start in records.story(folder).starts}:
        records.add(folder, "started", attempt=attempt, host="", position=position, code="")  # no rank came so far
    budget, requeue = limits(folder)
    code, why = cause(code, *records.why(folder, attempt)) if code else (0, "")
    verdict = decide(
        code,
        state,
        stop=records.asked_to_stop(folder, job),
        why=why,
        fruitless=records.fruitless(records.story(folder).starts, position),
        budget=budget,
        requeue=requeue,
    )

    def tell(verdict: Verdict) -> None:
        values = {"position": position, "code": code, "verdict": verdict.word, "reason": verdict.reason}
        records.add(folder, "ended", attempt=attempt, **values)
        print(f"halfseen: {verdict.word} at {position:,} images: {verdict.reason}", flush=True)
        sweep.tell(Path(folder))

    if verdict.word == "requeue":
        tell(verdict)
        refused = slurm.requeue(job)  # this ends the script too: nothing may have to follow
        if not refused:
            return code
        verdict = Verdict("resubmit", f"{verdict.reason}; requeue refused: {refused}")
    tell(resubmitted(verdict, folder, job) if verdict.word == "resubmit" else verdict)
    return code


def resubmitted(verdict: Verdict, folder: str, job: str) -> Verdict:
    """Queue a new job for the same task behind this one; whoever waited for this one waits for it."""
    from .submit import resubmit

    try:
        new = resubmit(folder, job)
        slurm.follow(job, new)
    except (OSError, ValueError) as error:
        return Verdict("failed", f"{verdict.reason}; and a new job was refused: {error}")
    return Verdict("resubmit", f"{verdict.reason}; goes on as job {new}")


def limits(folder: str) -> tuple[int, str]:
    """Budget of fruitless starts, and how to start again, from launch.yaml."""
    from halfseen.recipes import load

    from .config import Launch

    config = load(Launch, records.where(folder) / "launch.yaml")
    return config.fruitless, config.requeue


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))
