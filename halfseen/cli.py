"""``halfseen COMMAND ...``: command name to module, nothing else."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from halfseen.config import ConfigError

# name -> (module, what it does). Stages and tools are named as strings: the library never imports them.
COMMANDS = {
    "pretrain": ("halfseen.pretrain.train", "pretrain from a recipe, or resume a run folder"),
    "distill": ("halfseen.pretrain.distill.train", "train a student from a teacher, or resume a run folder"),
    "teach": ("halfseen.tools.teach", "keep a teacher's answers on disk, for any number of distillation runs"),
    "finetune": ("halfseen.finetune.train", "fine-tune a classifier from a recipe, or resume a run folder"),
    "evaluate": ("halfseen.finetune.evaluate", "top-1, top-5 and per-class accuracy of a fine-tuned run"),
    "segment": ("halfseen.finetune.segment", "train a head that names every pixel, on pictures with masks"),
    "probe": ("halfseen.finetune.probe", "linear, attentive or nearest-neighbour probe of a frozen trunk"),
    "launch": ("halfseen.launch.command", "start a stage, a sweep or a chain of stages on Slurm, or here"),
    "status": ("halfseen.launch.status", "runs and their jobs: images, speed, ETA, checkpoints, restarts and why"),
    "stop": ("halfseen.launch.stop", "let a run's job save and end, or end it at once"),
    "logs": ("halfseen.launch.logs", "what a run's job prints, as it prints it with -f"),
    "board": ("halfseen.launch.board", "TensorBoard over several runs"),
    "reconstruct": ("halfseen.tools.reconstruct", "draw masked | reconstructed | original from a pretraining run"),
    "attention": ("halfseen.tools.attention", "draw what each head of a trained trunk looks at, and the rollout"),
    "recipes": ("halfseen.tools.recipes", "list the bundled recipes, or print one, or every option"),
    "shards": ("halfseen.tools.shards", "build, index, check and measure WebDataset shards"),
    "inspect": ("halfseen.tools.inspect_run", "what a run or checkpoint holds, what wrote it, and whether it is sound"),
    "export": ("halfseen.tools.export", "a run's weights as one file, or its trunk as ONNX or torch.export"),
    "delta": ("halfseen.tools.delta", "what a fine-tuning changed: make, apply, info, stack; many tasks on one base"),
    "replay": ("halfseen.tools.replay", "run a step again that stopped a run, and name the culprit"),
    "convert": ("halfseen.tools.convert", "weights: ours <-> timm, transformers, official projects; with a proof"),
    "multiplex": ("halfseen.tools.multiplex", "weights of a trained trunk for one whose blocks share theirs"),
    "conformance": ("halfseen.tools.conformance", "compare this code with outputs of official implementations"),
    "bench": ("halfseen.tools.bench", "time the training step or the data path, against peers"),
    "demo": ("halfseen.tools.demo", "pretrain, fine-tune and compare with scratch on the embedded images"),
}


# The order in which ``halfseen --help`` lists them.
GROUPS = {
    "start here": ("demo", "recipes", "shards"),
    "train": ("pretrain", "finetune", "distill", "teach", "segment"),
    "measure and look": ("evaluate", "probe", "reconstruct", "attention", "inspect", "replay"),
    "weights": ("export", "convert", "delta", "multiplex"),
    "jobs on Slurm, or here": ("launch", "status", "stop", "logs", "board"),
    "this code": ("conformance", "bench"),
}


INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT


def usage() -> str:
    """The text of ``halfseen --help``."""
    lines = ["usage: halfseen COMMAND ...      (`halfseen COMMAND --help` tells more; halfseen --version)"]
    for group, names in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<12} {COMMANDS[name][1]}" for name in names)]
    return "\n".join(lines) + "\n"


def run_stage(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> None:
    """Run a command's main and exit with its code.

    A refused option becomes a short message and exit code 2; what a sound program must expect from data and disks, one
    line and exit code 1. HALFSEEN_TRACEBACK=1 shows where they arose, as for every other exception.
    """
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
    except expected() as error:
        if os.environ.get("HALFSEEN_TRACEBACK") == "1":
            raise
        code = 2 if isinstance(error, ConfigError) else 1
        if code == 1 or first_rank():
            print(f"error: {message(error)}", file=sys.stderr)
    except KeyboardInterrupt:  # of a training the second one: the first lets it save
        print("interrupted: call it again to go on from what is there", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def expected() -> tuple[type[Exception], ...]:
    """Errors that come from options, data, numbers and disks, not from this code; their messages say what to do."""
    from halfseen.capsule import NotFinite
    from halfseen.data.ledger import TooManyBad
    from halfseen.data.reader import StaleIndex
    from halfseen.loop import AnotherRank

    return ConfigError, NotFinite, TooManyBad, StaleIndex, AnotherRank, OSError


def first_rank() -> bool:
    """Whether this process speaks for all: every rank refuses the same options, and once is enough to say so."""
    from halfseen.distributed import place

    try:
        found = place(dict(os.environ))
    except ConfigError:
        return True
    return found is None or found.rank == 0


def message(error: Exception) -> str:
    """An error's text; of one that a loader process passed on, its last line instead of that process's traceback."""
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def main() -> None:
    """Entry point of the console command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from halfseen import __version__

        print(f"halfseen {__version__}")
        sys.exit(0)
    if arguments[0] not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(arguments[0], COMMANDS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(f"error: there is no command {arguments[0]!r}.{hint}\n  fix: see `halfseen --help`", file=sys.stderr)
        sys.exit(2)
    # While it loads nothing has begun: Ctrl-C just ends it, where libraries in C++ would abort with a core dump.
    asked = signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    signal.signal(signal.SIGINT, asked)
    run_stage(module.main, arguments[1:])


if __name__ == "__main__":
    main()
