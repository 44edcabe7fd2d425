"""``halfseen launch``: start a stage on Slurm, or here; check everything first."""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from halfseen.config import ConfigError
from halfseen.recipes import find_recipe, load, read_layers, recipes, stated, to_yaml

from . import jobs, preflight, records, slurm, snapshot, submit
from .config import OF_THE_USER, Launch
from .task import Task, module_of

USAGE = """\
halfseen launch STAGE RECIPE_OR_RUN [section.option=value ...] [launch.option=value ...] [--launch FILE]
halfseen launch teach RECIPE store.folder=FOLDER        a teacher's answers, for distillation runs
halfseen launch evaluate RUN [-- --batch N ...]         behind --: options of halfseen evaluate
halfseen launch nodes [launch.option=value ...]         a job of a minute: what the nodes really have
halfseen launch chain FILE                              stages that wait for each other; again: what is missing

options of the cluster: halfseen recipes --fields launch"""

DEFAULT = "launch/slurm"

# Stages with a config and a run folder; what to resume is found there.
TRAINING = ("pretrain", "distill", "finetune", "segment")

# Whose answers `halfseen teach` keeps: stage of the recipe -> section of the store, option of the network.
ASKED = {
    "distill": ("store", "teacher.source"),
    "pretrain": ("target.codes.store", "target.codes.tokenizer"),
}


def main(argv: Sequence[str]) -> int:
    """Check, then queue; returns the exit code."""
    parser = argparse.ArgumentParser(prog="halfseen launch", usage=USAGE)
    parser.add_argument("stage", help="pretrain, distill, finetune, segment, teach, evaluate, nodes or chain")
    parser.add_argument("arguments", nargs="*", help="as for that stage; launch.option=value changes --launch")
    parser.add_argument("--launch", help="resources: a file or bundled name (launch/slurm; of a chain: as it says)")
    parser.add_argument("--sweep", type=Path, help="YAML grid or list of overrides: one job array, one run each")
    parser.add_argument("--after", nargs="+", default=[], metavar="JOB", help="wait until these jobs have succeeded")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the batch script, queue nothing"
    )
    parser.add_argument("--print-sbatch", action="store_true", help="print a batch script that needs no submitit")
    parser.add_argument("--no-snapshot", action="store_true", help="run whatever the code is when the job starts")
    parser.add_argument("--wait", action="store_true", help="return when it has ended, with its exit code")
    cut = list(argv).index("--") if "--" in argv else len(argv)
    given = parser.parse_intermixed_args(argv[:cut])
    given.arguments += argv[cut + 1 :]
    if given.no_snapshot:
        given.arguments.append("launch.snapshot=false")
    refuse_together(given)
    if given.stage == "chain":
        from . import chain

        return chain.launch(given)
    launch, arguments = resources(given.launch or DEFAULT, given.arguments)
    if given.after and launch.cluster == "slurm":
        slurm.refuse_dead(given.after)
    if given.sweep:
        from . import sweep

        return sweep.launch(given, launch, arguments)
    prepared = prepare(given.stage, arguments, launch)
    if given.print_sbatch or given.dry_run:
        return show(prepared, launch, plain=given.print_sbatch, dependency=slurm.dependency(given.after))
    if given.stage in TRAINING and records.story(prepared.task.folder).complete:
        print(f"complete  {os.path.relpath(prepared.task.folder)}: nothing is left to do")
        return 0
    print("\n".join(prepared.lines), flush=True)
    job = start(prepared.task, launch, given.after)
    return wait(prepared.task.folder) if given.wait or launch.cluster == "debug" else tell(prepared.task, job)


def refuse_together(given: argparse.Namespace) -> None:
    """Raise ConfigError for options that one kind of launch would leave unheard."""
    if given.print_sbatch and (given.sweep or given.stage == "chain"):
        reason = "a plain script is one job; a sweep is a job array, a chain several jobs"
        raise ConfigError("--print-sbatch", given.stage, reason, "print the script of each run alone, or use --dry-run")
    for name in ("sweep", "after"):
        if given.stage == "chain" and getattr(given, name):
            reason = "a chain's file says what its stages are and wait for"
            raise ConfigError(f"--{name}", getattr(given, name), reason, "leave it out, or write it into the chain")


def resources(file: str, arguments: Sequence[str]) -> tuple[Launch, list[str]]:
    """The launch config, and the arguments that are the stage's own."""
    mine = [text.removeprefix("launch.") for text in arguments if text.startswith("launch.") and "=" in text]
    launch = read_resources("--launch", file, mine)
    return launch, [text for text in arguments if not (text.startswith("launch.") and "=" in text)]


def read_resources(key: str, name: str, overrides: Sequence[str]) -> Launch:
    """A launch config from its file and ``option=value``; a refused option is named as the command line has it."""
    path = resource_file(key, name)
    try:
        return with_environment(load(Launch, path, overrides))
    except ConfigError as refused:
        if refused.key in ("recipe", "base"):
            raise
        raise ConfigError(f"launch.{refused.key}", refused.value, refused.reason, refused.fix) from refused


def with_environment(launch: Launch) -> Launch:
    """Resources whose open options are those that the user's environment has for sbatch.

    Set here, and so kept for later starts: a job is submitted without these variables, for sbatch follows them, and not
    its script, where they differ.
    """
    if launch.cluster != "slurm":
        return launch
    open_options = [name for name in OF_THE_USER if not getattr(launch, name)]
    found: dict[str, Any] = {name: os.environ.get(f"SBATCH_{name.upper()}", "") for name in open_options}
    return replace(launch, **found)


def resource_file(key: str, name: str) -> Path:
    """The file that --launch, or a chain's ``launch:``, names; ConfigError under that key if it holds no resources."""
    known = [recipe for recipe, _ in recipes() if recipe.startswith("launch/") and not recipe.endswith("chain")]
    fix = f"name a file of yours, or one of {', '.join(known)}"
    try:
        path = find_recipe(name)
    except ConfigError as refused:
        raise ConfigError(key, name, "there is no such file, and no bundled resources of that name", fix) from refused
    options = {option for layer in read_layers(path) for option in layer}
    if "stages" in options:
        raise ConfigError(key, name, "is a chain of stages, no resources", f"`halfseen launch chain {name}`, or {fix}")
    if options & {"data", "model", "run", "stage"}:
        raise ConfigError(key, name, "is the recipe of a stage, no resources", fix)
    return path


def text(value: Any) -> str:
    """A YAML value as an override says it."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Prepared:
    """A task that has passed pre-flight, and what that showed."""

    task: Task
    lines: list[str]


def prepare(
    stage: str, arguments: Sequence[str], launch: Launch, folder: Path | None = None, pending: Sequence[Path] = ()
) -> Prepared:
    """Check a stage's arguments against its resources; ConfigError for the first thing that cannot work.

    folder: where the records of a stage without a run folder go. pending: folders that stages before it are to fill.
    """
    if launch.cluster == "slurm":
        slurm.refuse_absent()
    preflight.check_python(launch)
    if stage in TRAINING:
        prepared = prepare_run(stage, arguments, launch, pending)
    elif stage == "teach":
        prepared = prepare_teach(arguments, launch, pending)
    elif stage == "evaluate":
        prepared = prepare_evaluate(arguments, launch, folder, pending)
    elif stage == "nodes":
        folder = (folder or Path("runs") / "nodes").absolute()
        preflight.check_folder(folder, launch)
        prepared = Prepared(Task(stage, str(folder), arguments=(str(folder),)), [f"records   {folder}"])
    else:
        fix = f"use one of {', '.join([*TRAINING, 'teach', 'evaluate', 'nodes', 'chain'])}"
        raise ConfigError("stage", stage, "is nothing that can be launched", fix)
    jobs.refuse_active(prepared.task.folder)
    note = preflight.disk_note(Path(prepared.task.folder)) if launch.cluster == "slurm" else []
    return replace(prepared, lines=[*prepared.lines, *resource_lines(launch), *note])


def refuse_changed(stage: str, arguments: Sequence[str]) -> None:
    """Raise ConfigError if the run that these arguments name was made with others that shape its curve.

    For what is not launched again because it is complete or queued: its numbers would get a wrong name.
    """
    if stage in TRAINING:
        from halfseen.opening import open_run

        open_run(module_of(stage).SCHEMA, arguments)


def prepare_run(stage: str, arguments: Sequence[str], launch: Launch, pending: Sequence[Path]) -> Prepared:
    """A training stage: its whole config travels as text."""
    from halfseen.opening import open_run

    module = module_of(stage)
    opened = open_run(module.SCHEMA, arguments)
    facts = preflight.check_run(opened, launch, module, pending)
    folder = opened.folder.absolute()
    text = config_text(module.SCHEMA, arguments) | {"stage": stage, "run.folder": str(folder)}
    return Prepared(Task(stage, str(folder), nested_yaml(text), total=facts.total), facts.lines)


def config_text(schema: type[Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value of what the arguments of a stage state.

    No defaults: a run takes what nobody states from the weights it starts from, and they may not exist yet.
    """
    source, *overrides = arguments
    file = Path(source) / "config.yaml" if Path(source).is_dir() else find_recipe(source)
    return dict(stated(schema, file, overrides))


def nested_yaml(options: Mapping[str, Any]) -> str:
    """YAML sections of dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in options.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return yaml.safe_dump(nested, sort_keys=False)


def prepare_teach(arguments: Sequence[str], launch: Launch, pending: Sequence[Path]) -> Prepared:
    """A frozen network's answers: the config of the run that will read them, and records in the store's folder."""
    if not arguments:
        raise ConfigError("recipe", "", "no recipe was named", "halfseen launch teach RECIPE store.folder=FOLDER")
    module = module_of("teach")
    config = load(module.schema_of(arguments[0]), find_recipe(arguments[0]), arguments[1:])
    section, asked = ASKED[config.stage]
    store = attrgetter(section)(config)
    if not store.folder:
        raise ConfigError(f"{section}.folder", "", "names no folder", f"e.g. {section}.folder=/shared/answers")
    folder = Path(store.folder).absolute()
    store.folder = str(folder)
    lines = preflight.check_teach(config, asked, attrgetter(asked)(config), folder, launch, pending)
    total = module.length_of(config, preflight.images_of(config, "train").images)
    return Prepared(Task("teach", str(folder), to_yaml(config), total=total), [*lines, f"length    {total:,} images"])


def prepare_evaluate(
    arguments: Sequence[str], launch: Launch, folder: Path | None, pending: Sequence[Path]
) -> Prepared:
    """Evaluation: a command with its arguments, made independent of the current folder."""
    if not arguments:
        raise ConfigError("run", "", "no run was named", "halfseen launch evaluate RUN")
    run = Path(arguments[0]).absolute()
    if run not in pending and not run.exists():
        raise ConfigError("run", arguments[0], "there is no such run", "name a run of finetune or distill")
    folder = (folder or run / "evaluation").absolute()
    words = [str(run), *arguments[1:]]
    if "--json" not in words:
        words += ["--json", str(folder / "result.json")]
    preflight.check_folder(folder, launch)
    return Prepared(Task("evaluate", str(folder), arguments=tuple(words)), [f"records   {folder}"])


def resource_lines(launch: Launch) -> list[str]:
    """The resources, in a line."""
    nodes = f"{launch.min_nodes}-{launch.nodes}" if launch.min_nodes else str(launch.nodes)
    text = f"{nodes} nodes x {launch.tasks} ranks, {launch.gpus_per_node} GPUs a node, {launch.minutes} minutes a start"
    chosen = [f", {name} {getattr(launch, name)}" for name in OF_THE_USER if getattr(launch, name)]
    return [f"cluster   {launch.cluster}: {text}{''.join(chosen)}"]


def show(prepared: Prepared, launch: Launch, *, plain: bool, dependency: str = "") -> int:
    """Print what would be queued. --print-sbatch prints the script alone, and leaves beside the run what it needs."""
    task = prepared.task
    if plain:
        (task,) = with_code([task], launch)
        task.save()
        (records.where(task.folder) / "launch.yaml").write_text(to_yaml(launch))
        print(submit.plain_script(task, launch), end="")
        return 0
    print("\n".join(prepared.lines))
    if launch.cluster == "slurm":
        judge(task, launch, dependency)
        print(f"\n{submit.script(task, launch, dependency)}")
    return 0


def start(task: Task, launch: Launch, after: Sequence[str] = ()) -> str:
    """Queue one task with the code as it is now; returns the job's number."""
    (task,) = with_code([task], launch)
    dependency = slurm.dependency(after)
    judge(task, launch, dependency)
    return submit.queue(task, launch, dependency)


def judge(task: Task, launch: Launch, dependency: str = "") -> None:
    """Have Slurm refuse what it would refuse: partition, account, limits, nodes. ConfigError."""
    if launch.cluster == "slurm":
        slurm.judge(submit.script(task, launch, dependency), launch)


def with_code(tasks: Sequence[Task], launch: Launch, beside: Path | None = None) -> list[Task]:
    """Tasks that run from a snapshot of the code as it is now; from an installed package, or without one, as they are.

    beside: the folder whose .code holds it; None: that of the first task's run folder.
    """
    if not launch.snapshot or launch.cluster == "debug":
        return list(tasks)
    store = Path(launch.snapshots or (beside or Path(tasks[0].folder).parent) / ".code")
    taken = snapshot.take(store)
    if taken is None:
        return list(tasks)
    snapshot.note(taken, [task.folder for task in tasks])
    snapshot.prune(store, jobs.may_be_active)
    return [replace(task, code=str(taken)) for task in tasks]


def tell(task: Task, job: str) -> int:
    """Say what was queued and how to follow it."""
    folder = os.path.relpath(task.folder)
    print(f"queued    job {job}: halfseen status {folder}; halfseen logs {folder} -f; halfseen stop {folder}")
    return 0


def wait(folder: Path | str, pause: float = 1.0) -> int:
    """Until a run's job has ended for good; its exit code, 1 if it vanished."""
    while True:
        told = records.story(folder)
        if told.ended and told.final:
            print(f"{told.ended['verdict']}: {told.ended['reason'] or folder}", flush=True)
            return int(told.ended["code"])
        if not jobs.may_be_active(folder) and records.story(folder) == told:
            why = told.ended["reason"] if told.ended else "without a word"
            print(f"job {told.job} is gone: {why}; see `halfseen logs {folder}`", file=sys.stderr)
            return 1
        time.sleep(pause)
