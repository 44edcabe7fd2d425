"""Slurm's own commands: asked in one place, with one-line errors and without the variables of a surrounding job."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from halfseen.config import ConfigError

PATIENCE = 120  # seconds a command of Slurm may take; it waits for a silent slurmctld by itself, too
TRIES, PAUSE = 10, 15.0  # how often, and seconds apart, a silent slurmctld is asked again by a job that ends
LOOKS, SETTLE = 5, 1.0  # how often, and after how many seconds each, dependencies are looked at again

# Variables that belong to the job or the ranks around us. A job submitted with them would inherit its parent's
# shape. The ones kept say where the cluster is.
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "HALFSEEN_MEETING", "TORCHELASTIC_")
OF_RANKS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")

# States after which a job that waits with afterok never starts.
DEAD = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "PREEMPTED")

# What a command says, in lower case, whose slurmctld is silent: restarting, overloaded, or cut off.
SILENT = ("unable to contact slurm", "socket timed out", "standby mode", "configuration source")

# A part of what sbatch says -> what to do about it.
FIXES = (
    ("invalid partition", "launch.partition", "name one of `sinfo -o %R`"),
    ("invalid account", "launch.account", "name one of `sacctmgr show associations user=$USER`"),
    ("invalid qos", "launch.qos", "name one of `sacctmgr show qos`"),
    ("invalid feature", "launch.constraint", "name features of `sinfo -o %f`"),
    ("more processors requested", "launch.cpus_per_task", "ask for what `sinfo -o '%c %G'` shows a node has"),
    ("node configuration is not available", "launch.nodes", "ask for nodes, GPUs and memory that `sinfo -N -l` shows"),
    ("requested node configuration", "launch.nodes", "ask for nodes, GPUs and memory that `sinfo -N -l` shows"),
    ("invalid gres", "launch.gpus_per_node", "name the type in launch.sbatch, e.g. {gres: 'gpu:h100:8'}"),
    ("invalid generic resource", "launch.gpus_per_node", "the nodes have no such GPUs; see `sinfo -o '%N %G'`"),
    ("violates accounting/qos policy", "launch.qos", "`sacctmgr show qos` shows limits, `squeue --me` what counts"),
    ("job array specification", "--sweep", "shorten it: `scontrol show config` has MaxArraySize"),
    ("time limit", "launch.minutes", "see the limits with `sinfo -o '%R %l'`"),
    ("node count", "launch.nodes", "see the limits with `scontrol show partition`"),
    ("memory specification", "launch.memory_gib", "ask for less; see `sinfo -o '%N %m'`"),
    ("configuration source", "launch.cluster", "log in to the cluster's login node, or say where it is: SLURM_CONF"),
    ("unable to contact", "launch.cluster", "slurmctld does not answer: see `scontrol ping`, and try again"),
    ("dependency", "--after", "the job is gone or has failed; launch that stage again first"),
)


@contextmanager
def outside_job() -> Iterator[None]:
    """This process's environment without what a surrounding job or torchrun has put there."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(OF_A_JOB) or name in OF_RANKS) and name not in KEPT
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def present() -> bool:
    """Whether Slurm's commands are on PATH."""
    return shutil.which("sbatch") is not None


def refuse_absent() -> None:
    """Raise ConfigError where there is no Slurm."""
    if not present():
        raise ConfigError(
            "launch.cluster",
            "slurm",
            "there is no sbatch on PATH",
            "log in to the cluster's login node, or use launch.cluster=local, or torchrun",
        )


def ask(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; its exit code is for the caller to read."""
    refuse_absent()
    with outside_job():
        try:
            return subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"`{' '.join(command)}` gave no answer in {PATIENCE} s; is slurmctld up?") from error


def silent(answer: subprocess.CompletedProcess[str]) -> bool:
    """Whether a command failed because slurmctld does not answer."""
    return bool(answer.returncode) and any(part in answer.stderr.lower() for part in SILENT)


def persist(*command: str) -> subprocess.CompletedProcess[str]:
    """Like ``ask``, until slurmctld answers: a job that ends while it restarts must still be queued again."""
    for _ in range(TRIES):
        answer = ask(*command)
        if not silent(answer):
            break
        time.sleep(PAUSE)
    return answer


def refusal(said: str, launch: Any = None) -> ConfigError:
    """What sbatch said, as an option to correct. launch: the resources, to show the option's value."""
    lines = [line for line in said.strip().splitlines() if line.strip()] or ["sbatch failed"]
    reason = re.sub(r"^(sbatch|allocation failure|error|:|\s)+", "", "; ".join(lines))
    reason = reason.replace("sbatch: error: ", "").replace("allocation failure: ", "")
    for part, key, fix in FIXES:
        if part in reason.lower():
            value = getattr(launch, key.removeprefix("launch."), "")
            return ConfigError(key, value, f"Slurm refuses: {reason}", fix)
    return ConfigError("launch", "", f"Slurm refuses: {reason}", "correct that option, or ask the site")


def refuse_dead(jobs: Sequence[str]) -> None:
    """Raise ConfigError if waiting for one of these jobs would be for ever, or for nothing."""
    known = states(jobs)
    for job in jobs:
        state = known.get(job, "")
        if not state or state in DEAD:
            reason = f"that job is {state.lower()}" if state else "Slurm does not know that job (any more)"
            raise ConfigError("--after", job, reason, "launch that stage again first, or leave --after out")


def judge(script: str, launch: Any = None) -> None:
    """Let Slurm judge a batch script without queueing it; ConfigError if it would refuse it."""
    answer = ask("sbatch", "--test-only", text=script)
    if answer.returncode:
        raise refusal(answer.stderr, launch)


def states(jobs: Sequence[str]) -> dict[str, str]:
    """State of each job Slurm still knows: PENDING, RUNNING, COMPLETED, CANCELLED, ...

    Forgotten ones are left out. OSError if Slurm does not answer: that says nothing about a job.
    """
    found: dict[str, str] = {}
    if not jobs or not present():
        return found
    answer = ask("squeue", "--noheader", "--array", "--states=all", "--format=%i|%A|%T", f"--jobs={','.join(jobs)}")
    if silent(answer):
        raise OSError(f"Slurm does not answer: {answer.stderr.strip()}")
    for line in answer.stdout.splitlines():
        shown, number, state = line.strip().split("|")
        found[shown] = found[number] = state
    missing = [job for job in jobs if job not in found] if answer.returncode else []
    for job in missing:  # one unknown number makes squeue answer for none
        state = state_of(job)
        if state:
            found[job] = state
    return found


def state_of(job: str) -> str:
    """State of one job, empty if Slurm does not know it (any more)."""
    answer = ask("scontrol", "--oneliner", "show", "job", job)
    match = re.search(r"JobState=(\S+)", answer.stdout)
    return match[1] if match else ""


def waits(jobs: Sequence[str]) -> dict[str, str]:
    """Why pending jobs have not begun, in Slurm's word: Priority, Resources, Dependency, PartitionTimeLimit, ..."""
    if not jobs:
        return {}
    answer = ask("squeue", "--noheader", "--array", "--states=PENDING", "--format=%i|%r", f"--jobs={','.join(jobs)}")
    pairs = (line.strip().partition("|") for line in answer.stdout.splitlines())
    return {job: reason for job, _, reason in pairs}


def fate(job: str, restarts: int) -> str:
    """What becomes of the job this process runs in: RUNNING while that is ours to say, else what ended it.

    restarts: SLURM_RESTART_COUNT of this start. Slurm calls all that is ending COMPLETING; why, stands elsewhere.
    """
    answer = persist("scontrol", "--oneliner", "show", "job", job).stdout
    found = dict(re.findall(r"(\w+)=(\S*)", answer))
    state = found.get("JobState", "")
    if state != "COMPLETING":
        return state
    if int(found.get("Restarts", "0")) > restarts:
        return "REQUEUED"
    if found.get("PreemptTime", "None") != "None":
        return "PREEMPTED"
    return "TIMEOUT" if found.get("Reason") == "TimeLimit" else "CANCELLED"


def requeue(job: str) -> str:
    """Put a running job back into the queue; empty, or why Slurm will not.

    The command ignores SIGTERM: what it does is to end the job it runs in, and Slurm's signal may come back before its
    own answer.
    """
    answer = persist("sh", "-c", 'trap "" TERM; exec scontrol requeue "$0"', job)
    return answer.stderr.strip() if answer.returncode else ""


def cancel(job: str, number: str = "") -> None:
    """scancel; number: a signal for its ranks instead."""
    answer = ask("scancel", *([f"--signal={number}"] if number else []), job)
    if answer.returncode:
        raise OSError(f"job {job} was not cancelled: {answer.stderr.strip()}")


def follow(old: str, new: str) -> None:
    """Let jobs that wait for one job wait for another instead. A member of an array is also one of the whole array.

    Members that are preempted together do this at once, and one may write over another's change: so look again, until
    nothing was left to do twice in a row.
    """
    for _ in range(LOOKS if renew(old, new) else 0):
        time.sleep(SETTLE)
        if not renew(old, new):
            time.sleep(SETTLE)
            if not renew(old, new):
                return


def renew(old: str, new: str) -> bool:
    """Rewrite what is waiting for ``old``; whether anything was."""
    array, _, member = old.partition("_")
    others = members(array, member) if member else []
    found = False
    for job, waits in waiting().items():
        renewed = re.sub(rf"(?<=[:+]){re.escape(old)}(?![\d_])", new, waits)
        if member:  # afterok:ARRAY, which squeue shows as afterok:ARRAY_*, could never be true again
            renewed = re.sub(rf"(?<=[:+]){array}(_\*)?(?![\d_])", ":".join([*others, new]), renewed)
        if job != new and renewed != waits:
            answer = ask("scontrol", "update", f"JobId={job}", f"Dependency={renewed}")
            if answer.returncode:
                raise OSError(f"job {job} does not wait for {new}: {answer.stderr.strip()}")
            found = True
    return found


def waiting() -> dict[str, str]:
    """This user's jobs that wait for others, and for which: ``afterok:1:2``."""
    answer = ask("squeue", "--noheader", "--states=PENDING", "--format=%i|%E", f"--user={os.getuid()}")
    lines = (line.strip().partition("|") for line in answer.stdout.splitlines())
    return {job: re.sub(r"\([^)]*\)", "", waits) for job, _, waits in lines}  # without (unfulfilled)


def members(array: str, but: str) -> list[str]:
    """Numbers of the members of a job array that have not ended, apart from one."""
    answer = ask("squeue", "--noheader", "--array", "--format=%F_%K", f"--jobs={array}")
    return [job for job in answer.stdout.split() if job.startswith(f"{array}_") and job != f"{array}_{but}"]


def dependency(jobs: Sequence[str], kind: str = "afterok") -> str:
    """``afterok:1:2``."""
    return f"{kind}:{':'.join(jobs)}" if jobs else ""
