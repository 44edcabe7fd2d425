"""``halfseen replay RUN/capsules/img_....json``: take the step again that stopped a run, and name the culprit."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from halfseen import capsule, distributed, stage
from halfseen.checkpoint import Checkpoints
from halfseen.checkpoint.folder import read_manifest
from halfseen.config import ConfigError
from halfseen.distributed import World
from halfseen.engine_config import ANYWHERE
from halfseen.recipes import load

SHOWN = 16  # samples listed


def main(argv: Sequence[str]) -> int:
    """Print what was found; returns 0 if the step is not finite again, 1 if it is finite this time."""
    parser = argparse.ArgumentParser(
        prog="halfseen replay",
        description=__doc__,
        epilog="Runs on one process, or under torchrun on as many as the run had, which dropout needs to be the same.",
    )
    parser.add_argument("capsule", type=Path, metavar="CAPSULE", help="written by the run that stopped")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, e.g. data.train=WHERE_IT_IS_NOW")
    arguments = parser.parse_args(list(argv))
    content = capsule.read(arguments.capsule)
    module, config = open_stage(arguments.capsule, content, arguments.overrides)
    with distributed.started(config.engine.device) as world:
        finding = replay(arguments.capsule, content, module, config, world)
        findings = world.gather_object(finding)
    if world.main:
        for rank, found in enumerate(findings):
            print(report(found, rank))
    return 0 if any(found.reproduced for found in findings) else 1


def open_stage(path: Path, content: dict[str, Any], overrides: Sequence[str]) -> tuple[Any, Any]:
    """The stage's module and config, from the run folder the capsule lies in."""
    run = path.absolute().parents[1]
    stored = run / content["config"]
    if not stored.is_file():
        raise ConfigError("CAPSULE", str(path), f"{stored} is not there", "leave the capsule in its run folder")
    name = yaml.safe_load(stored.read_text()).get("stage")
    try:
        module = importlib.import_module(f"halfseen.{name}.train")
    except ModuleNotFoundError as error:
        raise ConfigError("stage", name, f"in {stored} is not known here", "use the version that wrote it") from error
    # Compiled blocks would hide their modules, and any engine takes the same step (but for engine.gather=bf16).
    plain = [*ANYWHERE, f"run.micro_batch={content['micro_batch']}"]
    return module, load(module.SCHEMA, stored, [*plain, *overrides, f"run.folder={run}"])


def replay(path: Path, content: dict[str, Any], module: Any, config: Any, world: World) -> capsule.Finding:
    """From the capsule's checkpoint to its step, as the run went. Collective; writes nothing."""
    run = Path(config.run.folder)
    parts: stage.Parts = module.parts(config, world, run)
    if content["checkpoint"]:
        stage.refuse_other_data(read_manifest(run / content["checkpoint"])["meta"], parts.train_set)
    engine = parts.engine(config, world, fresh=not content["checkpoint"])
    if world.main:
        start = content["checkpoint"] or "the run's first weights"
        print(f"from {start} to the step at {content['position']:,}", flush=True)
    return capsule.replay(
        path.absolute(),
        engine=engine,
        batches=parts.stream,
        plan=parts.batches,
        prepare=parts.prepare,
        schedule=parts.schedule(config),
        checkpoints=Checkpoints(run / "checkpoints", config.run.keep, world),
    )


def report(finding: capsule.Finding, rank: int) -> str:
    """One rank's finding, and the samples it points to."""
    lines = [f"rank {rank}: {finding}"]
    for position, key in list(finding.samples.items())[:SHOWN]:
        lines.append(f"  position {position:,}  key {key}")
    if len(finding.samples) > SHOWN:
        lines.append(f"  and {len(finding.samples) - SHOWN} more of this step")
    return "\n".join(lines)
