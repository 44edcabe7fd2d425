"""Sweeps: one run per combination of overrides, as a job array, and a table of what came out."""

import csv
import itertools
import json
import os
import uuid
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from halfseen.config import ConfigError
from halfseen.recipes import to_yaml

from . import command, jobs, records, slurm, status, submit
from .config import Launch
from .task import Task

TABLE = "results.csv"


def combinations(file: Path) -> list[list[str]]:
    """The overrides of each member: ``grid:`` crosses lists of values, ``list:`` names each member."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("sweep", str(file), f"cannot be read: {error}", "name a YAML file") from error
    if not isinstance(content, dict) or len(content) != 1 or not set(content) <= {"grid", "list"}:
        raise ConfigError("sweep", str(file), "is neither a grid nor a list", "write `grid: {optim.lr: [1e-3, 2e-3]}`")
    if "grid" in content:
        grid = content["grid"]
        if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
            raise ConfigError("sweep.grid", grid, "does not give each option a list", "e.g. {optim.lr: [1e-3, 2e-3]}")
        crossed = itertools.product(*grid.values())
        members = [dict(zip(grid, values)) for values in crossed]
    else:
        members = content["list"]
        if not isinstance(members, list) or not members or not all(isinstance(one, dict) for one in members):
            raise ConfigError("sweep.list", members, "is no list of options", "e.g. [{optim.lr: 1e-3}, {run.seed: 1}]")
    return [[f"{key}={command.text(value)}" for key, value in member.items()] for member in members]


def launch(given: Namespace, resources: Launch, arguments: Sequence[str]) -> int:
    """Queue every member that is not complete; returns the exit code."""
    if given.stage not in command.TRAINING:
        fix = f"use one of {', '.join(command.TRAINING)}"
        raise ConfigError("--sweep", given.stage, "a sweep is of runs that train", fix)
    if not arguments:
        raise ConfigError("recipe", "", "no recipe was named", "halfseen launch pretrain RECIPE --sweep FILE")
    folders = [item.removeprefix("run.folder=") for item in arguments if item.startswith("run.folder=")]
    base = Path(folders[-1] if folders else f"runs/{Path(arguments[0]).stem}-sweep").absolute()
    rest = [item for item in arguments if not item.startswith("run.folder=")]
    chosen = combinations(given.sweep)
    prepared, skipped = [], 0
    for number, overrides in enumerate(chosen):
        folder = base / f"{number:03d}"
        words = [*rest, *overrides, f"run.folder={folder}"]
        if records.story(folder).complete or jobs.active(folder)[0]:
            command.refuse_changed(given.stage, words)
            skipped += 1
            continue
        prepared.append(command.prepare(given.stage, words, resources))
        print(f"{folder.name}       {' '.join(overrides)}")
    print(f"sweep     {base}: {len(prepared)} members to run, {skipped} are complete or queued")
    if prepared:
        command.judge(prepared[0].task, resources, slurm.dependency(given.after))
    if given.dry_run:
        return 0
    records.where(base).mkdir(parents=True, exist_ok=True)
    described = {"members": [{"folder": f"{number:03d}", "set": one} for number, one in enumerate(chosen)]}
    (records.where(base) / "sweep.json").write_text(json.dumps(described, indent=1) + "\n")
    if not prepared:
        write_table(base)
        return 0
    tasks = command.with_code([one.task for one in prepared], resources, base)
    codes = []
    if resources.cluster != "slurm":
        for task in tasks:  # this machine runs one at a time
            submit.queue(task, resources)
            codes.append(command.wait(task.folder))
    else:
        queue = array if len(tasks) > 1 else single  # submitit makes no array of one
        job = queue(base, tasks, resources, slurm.dependency(given.after))
        print(f"queued    job {job}: halfseen status {os.path.relpath(base)}")
        codes += [command.wait(task.folder) for task in tasks] if given.wait else []
    write_table(base)
    if given.wait:
        print((base / TABLE).read_text(), end="")
    return max(codes, default=0)


def array(base: Path, tasks: Sequence[Task], resources: Launch, dependency: str) -> str:
    """Queue tasks as one job array; returns its number."""
    key = uuid.uuid4().hex[:8]
    members = records.where(base) / f"array-{key}.json"
    members.write_text(json.dumps([task.folder for task in tasks]) + "\n")
    shared = Task(tasks[0].stage, str(base), code=tasks[0].code)
    for task in tasks:
        task.save()
        (records.where(task.folder) / "launch.yaml").write_text(to_yaml(resources))
        records.take_back_stop(task.folder)
    made = submit.executor(shared, resources, dependency, key)
    with slurm.outside_job():
        try:
            with made.batch():
                queued = [made.submit(task) for task in tasks]
        except Exception as error:
            raise submit.submission_error(error, resources) from error
    for task, job in zip(tasks, queued):
        records.add(
            task.folder, "queued", job=str(job.job_id), cluster="slurm", again=False, after=dependency, logs=str(base)
        )
    return str(queued[0].job_id).partition("_")[0]


def single(base: Path, tasks: Sequence[Task], resources: Launch, dependency: str) -> str:
    """Queue the only task that is missing as a job of its own; returns its number."""
    return submit.queue(tasks[0], resources, dependency)


def member(base: str, key: str, number: str) -> str:
    """The run folder of one element of a job array."""
    return str(json.loads((records.where(base) / f"array-{key}.json").read_text())[int(number)])


def table(base: Path) -> list[dict[str, Any]]:
    """One row per member: its overrides, state, images, and the last value of every number it logged."""
    described = json.loads((records.where(base) / "sweep.json").read_text())["members"]
    rows = []
    for one in described:
        seen = status.look(base / one["folder"], ask=False)
        numbers = {name: value for name, value in seen.numbers.items() if name not in ("position", "time")}
        chosen = dict(item.split("=", 1) for item in one["set"])
        row = {"member": one["folder"], **chosen, "state": seen.state, "images": seen.position, **numbers}
        rows.append(row | {"reason": "" if seen.state == "complete" else seen.reason})
    return rows


def tell(folder: Path) -> None:
    """Write the table of the sweep that a run is a member of, if it is: in the array, or in a job after it."""
    if (records.where(folder.parent) / "sweep.json").is_file():
        write_table(folder.parent)


def write_table(base: Path) -> None:
    """Write BASE/results.csv. Members end side by side: whoever writes looks again, so the last state stays."""
    path, written = base / TABLE, None
    while (rows := table(base)) != written:
        columns = list(dict.fromkeys(name for row in rows for name in row if name != "reason"))
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, "reason"])
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, path)
        written = rows
