"""Opening a run: a recipe or a run folder, and options, become a checked config and the folder it runs in.

What may not differ when a run continues is refused here. No device is touched and nothing is written.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from halfseen import engines, origin
from halfseen.config import ConfigError
from halfseen.derived import Batches
from halfseen.distributed import place
from halfseen.engine_config import left_behind
from halfseen.recipes import changes, find_recipe, load, stage_of

Stage = TypeVar("Stage")

# Options that may differ when a run continues: they change how fast it goes or what it reports, never the curve.
FREE = (
    "engine.name",
    "engine.device",
    "engine.recompute",
    "engine.offload_activations",
    "engine.recompute_by",
    "engine.compile",
    "engine.shard_size",
    "engine.reshard",
    "engine.zero_stage",
    "engine.offload",
    "engine.extra",
    "engine.fairscale",
    "engine.skip_budget",
    "engine.rollback_budget",
    "data.train",  # the shards may have moved; their fingerprint decides
    "data.val",
    "data.eval_crop",
    "data.workers",
    "data.prefetch",
    "data.bad_limit",
    "data.cache",
    "data.cache_gib",
    "teacher.micro_batch",
    "teacher.channels_last",
    "teacher.compile",
    "store.folder",  # the answers may have moved; their description decides
    "store.missing",
    "target.codes.store.folder",
    "target.codes.store.missing",
    "run.folder",
    "run.init",
    "run.micro_batch",
    "run.keep",
    "run.async_save",
    "run.stall_minutes",
    "run.checkpoint_every",
    "run.log_every",
    "run.evaluate_every",
    "run.picture_every",
    "stages",  # each one's own folder says what it began with
    "task.keep_best",
    "online.",
    "monitor.",
)

USAGE = """\
usage: halfseen {name} RECIPE [section.option=value ...]        a new run; called again, it continues
       halfseen {name} RUN_FOLDER [section.option=value ...]    continue the run in a folder

  RECIPE                 a bundled name (halfseen recipes lists them), or a YAML file of your own
  run.folder=FOLDER      where it runs (default: runs/NAME_OF_THE_RECIPE)
  run.init=RUN_OR_FILE   weights to start from
every option, its default and effect: halfseen recipes --fields {name}

Of an option given twice the last one counts. On several GPUs: torchrun --nproc-per-node N -m halfseen {name} ...
Exit codes: 0 complete, 75 saved on request (call it again), 2 an option is refused, others: docs/running.md.
"""


@dataclass(frozen=True)
class Opened(Generic[Stage]):
    """A checked config and the folder it runs in."""

    config: Stage
    folder: Path
    resumed: bool  # the folder already held this run


def open_run(schema: type[Stage], argv: Sequence[str]) -> Opened[Stage]:
    """Turn ``RECIPE_OR_RUN key=value ...`` into a config and a run folder. Touches no device, writes nothing.

    A run folder continues exactly that run; with another engine.name, without the options of its engine. A recipe whose
    run.folder already holds a run continues it too, if every option that shapes the curve is the same; otherwise
    ConfigError names the first one that is not.
    Options of the trunk that nobody states are those of run.init, and stated ones that differ are refused.
    """
    name = schema.__name__.lower()
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE.format(name=name), end="")
        raise SystemExit(0 if argv else 2)
    source, overrides = argv[0], list(argv[1:])
    stored = Path(source) / "config.yaml"
    if Path(source).is_dir():
        if not stored.is_file():
            raise ConfigError("run.folder", source, "is a folder without config.yaml", "name a run folder or a recipe")
        refuse_other_stage(name, stored, "run.folder", source, "halfseen {stage} " + source)
        asked = [text.removeprefix("engine.name=") for text in overrides if text.startswith("engine.name=")]
        config: Any = load(schema, stored, [*(left_behind(asked[-1]) if asked else ()), *overrides])
        config.run.folder = source
    else:
        recipe = find_recipe(source)
        refuse_other_stage(name, recipe, "recipe", source, "halfseen {stage} " + source)
        config = origin.adopted(schema, recipe, overrides)
        config.run.folder = config.run.folder or str(origin.default_folder(recipe, name))
    return open_config(schema, config)


def open_config(schema: type[Stage], config: Any) -> Opened[Stage]:
    """A checked config that names its folder, opened: ConfigError if the folder holds another run.

    What this number of ranks makes impossible is refused here too, before any of them waits for another.
    """
    name = schema.__name__.lower()
    launched = place(dict(os.environ))
    engines.refuse(config.engine, config.optim, launched.world if launched else None)
    if launched:
        Batches.derive(config.run.global_batch, launched.world, config.run.micro_batch)
    folder = Path(config.run.folder)
    stored = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run.folder", config.run.folder, "is a file", "name a folder; a new one is made")
    refuse_unwritable(folder)
    if stored.is_file():
        refuse_other_stage(name, stored, "run.folder", config.run.folder, "give run.folder=ANOTHER_FOLDER")
        refuse_other_run(load(schema, stored), config, stored)
    elif config.run.init and not Path(config.run.init).exists():
        raise ConfigError("run.init", config.run.init, "there is no such file or folder", "check the path")
    return Opened(config, folder, stored.is_file())


def refuse_unwritable(folder: Path) -> None:
    """Raise ConfigError if a run could not write into a folder, or not make it."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = f"{there} cannot be written" if there.is_dir() else f"{there} is a file"
        raise ConfigError("run.folder", str(folder), reason, "give run.folder=A_FOLDER_OF_YOURS")


def refuse_other_stage(name: str, file: Path, key: str, value: str, fix: str) -> None:
    """Raise ConfigError if a recipe or a run's config is another stage's; in fix, {stage} stands for that stage."""
    stage = stage_of(file)
    if stage and stage != name:
        raise ConfigError(key, value, f"belongs to {stage}, not to {name}", fix.replace("{stage}", stage))


def refuse_other_run(old: Any, new: Any, stored: Path) -> None:
    """Raise ConfigError if continuing ``old`` with ``new`` would not give the same curve."""
    before, after = changes(old), changes(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(FREE):
            raise ConfigError(
                key,
                after.get(key, "its default"),
                f"the run in {stored.parent} has {before.get(key, 'the default')!r}, and this option shapes the curve",
                "drop the override to resume that run, or give run.folder=ANOTHER_FOLDER for a new one "
                f"(run.init={stored.parent} starts it from that run's weights)",
            )
