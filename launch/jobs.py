"""Whether a job is queued or running for a run folder. No torch in here: status and stop must answer at once."""

from pathlib import Path

from halfseen.config import ConfigError

from . import records, slurm

WAITING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "SIGNALING")


def active(folder: Path | str) -> tuple[str, str]:
    """Number and state of the job that is queued or running for a run folder; two empty strings if none is."""
    told = records.story(folder)
    if not told.job or told.cluster == "debug":  # which is the process that launches
        return "", ""
    if told.cluster == "local":
        return (told.job, "RUNNING") if told.ended is None and alive(told.job) else ("", "")
    state = slurm.states([told.job]).get(told.job, "")
    return (told.job, state) if state in WAITING else ("", "")


def may_be_active(folder: Path | str) -> bool:
    """Whether a run's job may still go on; true while Slurm does not answer. For whoever waits for its end."""
    try:
        return bool(active(folder)[0])
    except OSError:
        return True


def alive(process: str) -> bool:
    """Whether a local job's process still exists."""
    stat = Path("/proc") / process / "stat"
    if not stat.exists():
        return False
    return (
        stat.read_text().rpartition(")")[2].split()[0] != "Z" and b"submitit" in (stat.parent / "cmdline").read_bytes()
    )


def refuse_active(folder: Path | str) -> None:
    """Raise ConfigError if a job is queued or running for this run folder: two would write over each other."""
    job, state = active(folder)
    if job:
        raise ConfigError(
            "run.folder",
            str(folder),
            f"job {job} is {state.lower()} for it",
            f"`halfseen logs {folder} -f` watches it, `halfseen stop {folder}` ends it; or give run.folder=ANOTHER",
        )
