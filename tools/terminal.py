"""What the shard tools show, and how they spread work over processes."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any, TextIO, TypeVar

import torch
from rich.console import Console
from rich.progress import track

Job = TypeVar("Job")
Result = TypeVar("Result")


def console(stream: TextIO | None = None) -> Console:
    """A console that keeps tables whole when its output goes to a file or a log."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 140, highlight=False)


def progress(items: Any, title: str, total: int) -> Iterator[Any]:
    """Iterate with a bar on stderr."""
    yield from track(items, title, total, console=console(sys.stderr))


def spread(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, title: str) -> Iterator[Result]:
    """Results of work(job) in the order of jobs, over processes, with a bar."""
    if workers <= 1 or len(jobs) <= 1:
        yield from progress(map(work, jobs), title, len(jobs))
        return
    # Spawned, not forked: this process has threads (torch, rich), and a fork would copy their locks.
    with get_context("spawn").Pool(min(workers, len(jobs)), begin_worker) as pool:
        yield from progress(pool.imap(work, jobs), title, len(jobs))


def begin_worker() -> None:
    """A process of ``spread``: one thread, and a Ctrl-C is for the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
