"""``halfseen launch``: start a stage on Slurm, or here; check everything first."""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfseen.cli import COMMANDS
from halfseen.config import ConfigError, find_recipe, load, to_yaml

from . import jobs, preflight, records, slurm, snapshot, status, submit
from .config import Launch
from .task import Task, module_of

USAGE = """\
halfseen launch STAGE RECIPE_OR_RUN [section.option=value ...] [launch.option=value ...] [--launch FILE]
halfseen launch evaluate RUN [section.option=value ...]
halfseen launch nodes [launch.option=value ...]         a job of a minute: what the nodes really have
halfseen launch chain FILE                              stages that wait for each other; again: what is missing

options of the cluster: halfseen recipes --fields launch"""


def main(argv: Sequence[str]) -> int:
    """Check, then queue; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen launch", usage=USAGE)
    parser.add_argument("stage", help="pretrain, finetune, ..., evaluate, nodes or chain")
    parser.add_argument("arguments", nargs="*", help="as for that stage; launch.option=value changes --launch")
    parser.add_argument("--launch", default="launch/slurm", help="resources: a file or bundled name (launch/slurm)")
    parser.add_argument("--sweep", type=Path, help="YAML grid or list of overrides: one job array, one run each")
    parser.add_argument("--after", nargs="+", default=[], metavar="JOB", help="wait until these jobs have succeeded")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the batch script, queue nothing"
    )
    parser.add_argument("--print-sbatch", action="store_true", help="print a batch script that needs no submitit")
    parser.add_argument("--no-snapshot", action="store_true", help="run whatever the code is when the job starts")
    parser.add_argument("--wait", action="store_true", help="return when it has ended, with its exit code")
    given = parser.parse_intermixed_args(argv)
    if given.no_snapshot:
        given.arguments.append("launch.snapshot=false")
    if given.stage == "chain":
        from . import chain

        return chain.launch(given)
    launch, arguments = resources(given.launch, given.arguments)
    if given.after and launch.cluster == "slurm":
        slurm.refuse_dead(given.after)
    if given.sweep:
        from . import sweep

        return sweep.launch(given, launch, arguments)
    prepared = prepare(given.stage, arguments, launch)
    if given.print_sbatch or given.dry_run:
        return show(prepared, launch, plain=given.print_sbatch, dependency=slurm.dependency(given.after))
    print("\n".join(prepared.lines), flush=True)
    job = start(prepared.task, launch, given.after)
    return wait(prepared.task.folder) if given.wait or launch.cluster == "debug" else tell(prepared.task, job)


def resources(file: str, arguments: Sequence[str]) -> tuple[Launch, list[str]]:
    """The launch config, and the arguments that are the stage's own."""
    mine = [text.removeprefix("launch.") for text in arguments if text.startswith("launch.") and "=" in text]
    launch = load(Launch, find_recipe(file), mine)
    return launch, [text for text in arguments if not (text.startswith("launch.") and "=" in text)]


def text(value: Any) -> str:
    """A YAML value as an override says it."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Prepared:
    """A task that has passed pre-flight, and what that showed."""

    task: Task
    lines: list[str]


def prepare(stage: str, arguments: Sequence[str], launch: Launch, folder: Path | None = None) -> Prepared:
    """Check a stage's arguments against its resources; ConfigError for the first thing that cannot work.

    folder: where the records of a stage without a run folder go.
    """
    if launch.cluster == "slurm":
        slurm.refuse_absent()
    preflight.check_python(launch)
    known = [name for name, (module, _) in COMMANDS.items() if module.endswith(".train")]
    if stage in known:
        prepared = prepare_run(stage, arguments, launch)
    elif stage in ("evaluate", "nodes"):
        prepared = prepare_plain(stage, arguments, launch, folder)
    else:
        fix = f"use one of {', '.join([*known, 'evaluate', 'nodes', 'chain'])}"
        raise ConfigError("stage", stage, "is nothing that can be launched", fix)
    jobs.refuse_active(prepared.task.folder)
    note = preflight.disk_note(Path(prepared.task.folder)) if launch.cluster == "slurm" else []
    return replace(prepared, lines=[*prepared.lines, *resource_lines(launch), *note])


def prepare_run(stage: str, arguments: Sequence[str], launch: Launch) -> Prepared:
    """A training stage: its whole config travels as text."""
    from halfseen.stage import open_run

    module = module_of(stage)
    opened = open_run(module.SCHEMA, arguments)
    facts = preflight.check_run(stage, opened, launch, module)
    folder = opened.folder.absolute()
    opened.config.run.folder = str(folder)
    return Prepared(Task(stage, str(folder), to_yaml(opened.config), total=facts.total), facts.lines)


def prepare_plain(stage: str, arguments: Sequence[str], launch: Launch, folder: Path | None) -> Prepared:
    """Evaluation, or the nodes' report: a command with its arguments, made independent of the current folder."""
    if stage == "evaluate":
        if not arguments:
            raise ConfigError("run", "", "no run was named", "halfseen launch evaluate RUN")
        run = Path(arguments[0]).absolute()
        folder = (folder or run / "evaluation").absolute()
        arguments = [str(run), *arguments[1:]]
        if "--json" not in arguments:
            arguments += ["--json", str(folder / "result.json")]
    else:
        folder = (folder or Path("runs") / "nodes").absolute()
        arguments = [str(folder)]
    preflight.check_folder(folder, launch)
    return Prepared(Task(stage, str(folder), arguments=tuple(arguments)), [f"records   {folder}"])


def resource_lines(launch: Launch) -> list[str]:
    """The resources, in a line."""
    nodes = f"{launch.min_nodes}-{launch.nodes}" if launch.min_nodes else str(launch.nodes)
    text = f"{nodes} nodes x {launch.tasks} ranks, {launch.gpus_per_node} GPUs a node, {launch.minutes} minutes a start"
    return [f"cluster   {launch.cluster}: {text}"]


def show(prepared: Prepared, launch: Launch, *, plain: bool, dependency: str = "") -> int:
    """Print what would be queued. --print-sbatch prints the script alone, and leaves beside the run what it needs."""
    task = replace(prepared.task, code=str(keep_code(prepared.task, launch) or "")) if plain else prepared.task
    if plain:
        task.save()
        (records.where(task.folder) / "launch.yaml").write_text(to_yaml(launch))
        print(submit.plain_script(task, launch), end="")
        return 0
    print("\n".join(prepared.lines))
    if launch.cluster == "slurm":
        text = submit.script(task, launch, dependency)
        preflight.check_cluster(text, launch)
        print(f"\n{text}")
    return 0


def start(task: Task, launch: Launch, after: Sequence[str] = ()) -> str:
    """Queue one task with the code as it is now; returns the job's number."""
    task = replace(task, code=str(keep_code(task, launch) or ""))
    dependency = slurm.dependency(after)
    preflight.check_cluster(submit.script(task, launch, dependency) if launch.cluster == "slurm" else "", launch)
    return submit.queue(task, launch, dependency)


def keep_code(task: Task, launch: Launch) -> Path | None:
    """The code snapshot for a task; None for an installed package or without one."""
    if not launch.snapshot or launch.cluster == "debug":
        return None
    store = Path(launch.snapshots or Path(task.folder).parent / ".code")
    taken = snapshot.take(store)
    if taken:
        snapshot.prune(store, used_code(store.parent) | {str(taken)})
    return taken


def used_code(root: Path) -> set[str]:
    """Snapshots that jobs of the runs under a folder still need."""
    launched = [folder for folder in status.find(root) if (records.where(folder) / "task.json").is_file()]
    return {Task.read(folder).code for folder in launched if jobs.active(folder)[0]}


def tell(task: Task, job: str) -> int:
    """Say what was queued and how to follow it."""
    folder = os.path.relpath(task.folder)
    print(f"queued    job {job}: halfseen status {folder}; halfseen logs {folder} -f; halfseen stop {folder}")
    return 0


def wait(folder: Path | str, pause: float = 1.0) -> int:
    """Until a run's job has ended for good; its exit code, 1 if it vanished."""
    while True:
        told = records.story(folder)
        if told.ended and told.ended["verdict"] not in ("requeue", "resubmit", "left"):
            print(f"{told.ended['verdict']}: {told.ended['reason'] or folder}", flush=True)
            return int(told.ended["code"])
        if not jobs.active(folder)[0] and not records.story(folder).ended:
            print(f"job {told.job} is gone without a word; see `halfseen logs {folder}`", file=sys.stderr)
            return 1
        time.sleep(pause)
