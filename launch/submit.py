"""From a task and its resources to a queued job: submitit's executors, or a plain batch script."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from halfseen.recipes import load, to_yaml

from . import records, slurm
from .config import Launch
from .task import Task, locally


def name_of(task: Task, launch: Launch) -> str:
    """The job's name."""
    return launch.name or Path(task.folder).name


def python_of(launch: Launch) -> str:
    """What starts Python in the job, as the shell reads it."""
    return launch.python or shlex.quote(sys.executable)


def python_outside(launch: Launch) -> str:
    """What starts Python in the batch script itself, as the shell reads it. It needs Slurm's commands, which a
    container lacks: then it is the Python that submits."""
    contained = any(argument.startswith("--container") for argument in launch.srun_args)
    wrapped = launch.python and not Path(launch.python.split()[0]).name.startswith("python")
    return shlex.quote(sys.executable) if contained or wrapped else python_of(launch)


def before(task: Task, launch: Launch) -> list[str]:
    """Shell lines of the batch script before srun."""
    lines = list(launch.setup)
    if task.code:
        # The current folder must not come first: submitted from a checkout, it would hide the snapshot.
        lines += [f'export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(task.code)}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    if launch.cpus_per_task:
        lines += [f"export SRUN_CPUS_PER_TASK={launch.cpus_per_task}"]  # srun no longer takes it from sbatch
    # Without a number every rank would start a thread per core of the node.
    lines += [f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{launch.cpus_per_task or 1}}}"']
    if elastic(launch):
        # Slurm would keep the number of tasks of the first start, and with it the number of nodes.
        tasks = launch.tasks
        lines += [f"export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * {tasks})) SLURM_NTASKS_PER_NODE={tasks}"]
        lines += ["export SLURM_NPROCS=$SLURM_NTASKS"]
    if launch.interface:
        lines += [f"export {kind}_SOCKET_IFNAME={shlex.quote(launch.interface)}" for kind in ("GLOO", "NCCL")]
    # Slurm sends SIGTERM to this script too; it must live until the ranks have saved.
    return [*lines, "trap : TERM"]


def behind(task: Task, launch: Launch, *more: str) -> list[str]:
    """Shell lines of the batch script after srun: why it ended, and whether it starts again."""
    command = [python_outside(launch), "-m", "halfseen.launch.after", '"$code"', shlex.quote(task.folder)]
    return ["code=$?", "trap '' TERM", "exec " + " ".join([*command, *map(shlex.quote, more)])]


def srun_arguments(launch: Launch) -> list[str]:
    """One rank that dies ends the others: the job does not wait for its time limit."""
    return ["--kill-on-bad-exit=1", *launch.srun_args]


def elastic(launch: Launch) -> bool:
    """Whether the job may start on different numbers of nodes."""
    return launch.min_nodes is not None and launch.min_nodes < launch.nodes


def gpus(launch: Launch) -> int | None:
    """GPUs to ask for by number; none where ``launch.sbatch`` asks for them, by type: Slurm refuses both."""
    asked = {"gres", "gpus", "gpus-per-node"} & {name.replace("_", "-") for name in launch.sbatch}
    return None if asked else launch.gpus_per_node or None


def sbatch_options(launch: Launch) -> dict[str, Any]:
    """Long options of sbatch that submitit does not have."""
    given = {name.lstrip("-").replace("_", "-"): value for name, value in launch.sbatch.items()}
    # A dependent of a failed job would wait for ever.
    options: dict[str, Any] = {"kill-on-invalid-dep": "yes", "requeue": True}
    if elastic(launch):
        options["nodes"] = f"{launch.min_nodes}-{launch.nodes}"
        options["mincpus"] = launch.tasks * (launch.cpus_per_task or 1)
    return options | {name: value.lower() == "true" or value for name, value in given.items()}


def executor(task: Task, launch: Launch, dependency: str = "", *more: str) -> Any:
    """submitit's executor for a task. The job's own folder is RUN/launch/JOB."""
    import submitit

    folder = records.where(task.folder) / "%j"
    made = submitit.AutoExecutor(folder=folder, cluster=launch.cluster, slurm_python=python_of(launch))
    if launch.cluster == "debug":
        return made
    made.update_parameters(
        name=name_of(task, launch),
        timeout_min=launch.minutes,
        nodes=launch.nodes,
        tasks_per_node=None if elastic(launch) else launch.tasks,
        gpus_per_node=gpus(launch),
        cpus_per_task=launch.cpus_per_task,
        mem_gb=launch.memory_gib,
        stderr_to_stdout=True,
    )
    if launch.cluster == "slurm":
        made.update_parameters(
            slurm_partition=launch.partition or None,
            slurm_account=launch.account or None,
            slurm_qos=launch.qos or None,
            slurm_constraint=launch.constraint or None,
            slurm_exclusive=launch.exclusive or None,
            slurm_array_parallelism=launch.parallel or sys.maxsize,  # None: 256
            slurm_dependency=dependency or None,
            slurm_signal_delay_s=launch.save_seconds,
            slurm_setup=before(task, launch),
            slurm_teardown=behind(task, launch, *more),
            slurm_srun_args=srun_arguments(launch),
            slurm_additional_parameters=sbatch_options(launch),
        )
    return made


def script(task: Task, launch: Launch, dependency: str = "") -> str:
    """The batch script submitit will queue."""
    made = executor(task, launch, dependency)._executor
    return str(made._make_submission_file_text(made._submitit_command_str, ""))


def plain_script(task: Task, launch: Launch) -> str:
    """A batch script that needs no submitit; ``sbatch`` it as often as you like, it continues the run."""
    log = records.where(task.folder) / "%j_%t_log.out"  # not in a folder of the job: nobody would make it
    options: dict[str, Any] = {
        "job-name": name_of(task, launch),
        "time": launch.minutes,
        "nodes": launch.nodes,
        "ntasks-per-node": None if elastic(launch) else launch.tasks,
        "gpus-per-node": gpus(launch),
        "cpus-per-task": launch.cpus_per_task,
        "mem": f"{round(launch.memory_gib * 1024)}M" if launch.memory_gib else None,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "exclusive": launch.exclusive,
        "signal": f"USR2@{launch.save_seconds}",
        "open-mode": "append",
        "output": str(log).replace("%t", "0"),
    }
    options |= sbatch_options(launch)
    flags = [
        f"#SBATCH --{name}" + ("" if value is True else f"={shlex.quote(str(value))}")
        for name, value in options.items()
        if value
    ]
    srun = shlex.join(["srun", "--unbuffered", "--output", str(log), *srun_arguments(launch)])
    command = f"{srun} {python_of(launch)} -u -m halfseen.launch.task {shlex.quote(task.folder)}"
    head = ["#!/bin/bash", f"# halfseen {task.stage}, run folder {task.folder}", *flags, ""]
    return "\n".join([*head, *before(task, launch), "", command, *behind(task, launch), ""])


def queue(task: Task, launch: Launch, dependency: str = "", *, again: bool = False) -> str:
    """Queue a task; returns the job's number. The run folder remembers it."""
    folder = records.where(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    task.save()
    (folder / "launch.yaml").write_text(to_yaml(launch))
    records.take_back_stop(task.folder)
    made = executor(task, launch, dependency)
    with slurm.outside_job(), code_first(task, launch):
        try:
            job = made.submit(task if launch.cluster == "slurm" else locally, *arguments(task, launch))
        except Exception as error:
            raise submission_error(error, launch) from error
    number = str(job.job_id)
    records.add(task.folder, "queued", job=number, cluster=launch.cluster, again=again, after=dependency)
    if launch.cluster == "debug":
        with suppress(SystemExit):  # `locally` has written down how it ended
            job.results()
    return number


def arguments(task: Task, launch: Launch) -> tuple[Any, ...]:
    """What submitit calls its function with."""
    return () if launch.cluster == "slurm" else (task, task.folder)


def submission_error(error: Exception, launch: Launch) -> Exception:
    """submitit's failed sbatch as a refused option; any other error as it is."""
    said = str(error)
    return slurm.refusal(said.split("sbatch: error:", 1)[1], launch) if "sbatch: error:" in said else error


@contextmanager
def code_first(task: Task, launch: Launch) -> Iterator[None]:
    """The environment that processes started here, not by a batch script, need to run the snapshot."""
    if launch.cluster != "local":
        yield
        return
    told = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(launch.cpus_per_task or 1))}
    if task.code:
        told |= {
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [task.code, os.environ.get("PYTHONPATH")])),
        }
    before = {name: os.environ.get(name) for name in told}
    os.environ |= told
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def resubmit(folder: Path | str, job: str) -> str:
    """A new job for a run's task, once job ``job`` has ended in whatever way."""
    launch = load(Launch, records.where(folder) / "launch.yaml")
    return queue(Task.read(folder), launch, slurm.dependency([job], "afterany"), again=True)
