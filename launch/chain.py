"""``halfseen launch chain FILE``: stages that wait for each other. Launched again, it continues what is missing."""

import difflib
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfseen.config import ConfigError
from halfseen.recipes import find_recipe, stage_of

from . import command, jobs, records, status
from .config import Launch

KEYS = {"folder", "launch", "stages"}
STAGE_KEYS = {"stage", "recipe", "run", "set", "launch", "after"}
REFERENCE = re.compile(r"\$\{([^}]*)\}")  # ${pretrain}: the run folder of that stage


@dataclass(frozen=True)
class Link:
    """One stage of a chain."""

    name: str
    stage: str
    arguments: tuple[str, ...]  # references resolved
    folder: Path
    launch: Launch
    after: tuple[str, ...]  # names of the stages it waits for


def read(file: Path, overrides: Sequence[str] = (), resources: str | None = None) -> list[Link]:
    """A chain from its file; ConfigError for what does not fit.

    overrides: of every stage's resources. resources: a file of them to use instead of the chain's.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("chain", str(file), f"cannot be read: {error}", "name a YAML file") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise ConfigError("chain", str(file), "has no stages", "see configs/launch/chain.yaml")
    refuse_unknown("chain", content, KEYS)
    folder = Path(content.get("folder") or f"runs/{file.stem}").absolute()
    resources = resources or content.get("launch") or command.DEFAULT
    links: list[Link] = []
    for name, entry in content["stages"].items():
        links.append(link(str(name), entry, folder, resources, overrides, links))
    return links


def chain_file(name: str) -> Path:
    """A chain's file: a path, or a bundled name."""
    try:
        return find_recipe(name)
    except ConfigError as refused:
        raise ConfigError("chain", name, "there is no such file", "write one like `launch/chain`") from refused


def refuse_unknown(key: str, entry: Any, known: set[str]) -> None:
    """Raise ConfigError for a key that means nothing here."""
    if not isinstance(entry, dict):
        raise ConfigError(key, entry, "is no mapping", f"give it some of {', '.join(sorted(known))}")
    for name in entry:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(f"{key}.{name}", entry[name], "there is no such key", f"use {near or sorted(known)}")


def link(name: str, entry: Any, base: Path, resources: str, overrides: Sequence[str], above: Sequence[Link]) -> Link:
    """One stage from its entry. It may refer to those above it, so a chain has no circles."""
    key = f"stages.{name}"
    refuse_unknown(key, entry, STAGE_KEYS)
    if ("recipe" in entry) == ("run" in entry):
        raise ConfigError(key, "", "needs exactly one of recipe and run", "run: ${NAME} evaluates that stage's run")
    folders = {one.name: str(one.folder) for one in above}
    needed: list[str] = []

    def resolve(text: str) -> str:
        def replaced(match: re.Match[str]) -> str:
            if match[1] not in folders:
                fix = f"name one above it: {', '.join(folders) or 'it is the first'}"
                raise ConfigError(key, text, f"no stage {match[1]!r} stands above it", fix)
            needed.append(match[1])
            return folders[match[1]]

        return REFERENCE.sub(replaced, text)

    stage = entry.get("stage") or name
    arguments = [
        resolve(str(entry.get("recipe") or entry["run"])),
        *(resolve(str(item)) for item in entry.get("set") or []),
    ]
    if stage in command.TRAINING:
        arguments.append(f"run.folder={base / name}")
    elif stage == "teach":
        section, _ = command.ASKED.get(stage_of(find_recipe(arguments[0])), command.ASKED["distill"])
        arguments.append(f"{section}.folder={base / name}")
    for waited in entry.get("after") or []:
        resolve(f"${{{waited}}}")
    mine = entry.get("launch") or {}
    if not isinstance(mine, dict):
        raise ConfigError(f"{key}.launch", mine, "is no mapping of options", "e.g. {nodes: 2, minutes: 60}")
    chosen = [f"{option}={command.text(value)}" for option, value in mine.items()]
    launch = command.read_resources("launch", resources, [*chosen, *overrides])
    return Link(name, stage, tuple(arguments), base / name, launch, tuple(dict.fromkeys(needed)))


def launch(given: Namespace) -> int:
    """Queue every stage that is neither complete nor queued; returns the exit code."""
    if not given.arguments:
        raise ConfigError("chain", "", "no file was named", "halfseen launch chain FILE")
    odd = [text for text in given.arguments[1:] if not text.startswith("launch.")]
    if odd:
        reason = "a stage's options stand in the chain's file"
        raise ConfigError("chain", odd[0], reason, "write it into that stage's `set:`, or give launch.option=value")
    overrides = [text.removeprefix("launch.") for text in given.arguments[1:]]
    links = read(chain_file(given.arguments[0]), overrides, given.launch)
    numbers: dict[str, str] = {}  # of the stages that are queued or running
    prepared: dict[str, command.Prepared] = {}
    for one in links:  # everything is checked before anything is queued
        told = records.story(one.folder)
        if told.complete or jobs.active(one.folder)[0]:
            command.refuse_changed(one.stage, one.arguments)
        if told.complete:
            print(f"{one.name:<12} complete")
            continue
        job, state = jobs.active(one.folder)
        if job:
            numbers[one.name] = job
            print(f"{one.name:<12} job {job} is {state.lower()}")
            continue
        if told.job:
            print(f"{one.name:<12} again; before: {status.look(one.folder, ask=False).reason or 'gone without a word'}")
        for needed in one.after:
            next(other.folder for other in links if other.name == needed).mkdir(parents=True, exist_ok=True)
        above = [other.folder for other in links[: links.index(one)] if not records.story(other.folder).complete]
        prepared[one.name] = command.prepare(one.stage, one.arguments, one.launch, one.folder, above)
        command.judge(prepared[one.name].task, one.launch)
    for one in links:
        if one.name not in prepared:
            continue
        waits = [name for name in one.after if name in numbers or name in prepared]
        if given.dry_run:
            print(f"{one.name:<12} {one.stage} after {', '.join(waits) or 'nothing'}")
            print("\n".join(f"  {line}" for line in prepared[one.name].lines))
            continue
        numbers[one.name] = command.start(prepared[one.name].task, one.launch, [numbers[name] for name in waits])
        print(f"{one.name:<12} job {numbers[one.name]}" + (f" after {', '.join(waits)}" if waits else ""), flush=True)
        if one.launch.cluster != "slurm" and command.wait(one.folder):
            print(f"{one.name} did not complete; launch the chain again to continue with it")
            return 1
    if given.wait and not given.dry_run:
        return max([command.wait(one.folder) for one in links if one.name in numbers], default=0)
    print(f"watch it: halfseen status {os.path.relpath(links[0].folder.parent)}")
    return 0
