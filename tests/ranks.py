"""Run a test's function on several gloo ranks.

Ranks are forked from a server that has already imported torch (and has never run a backward, after which
forking would break autograd), so starting one costs milliseconds, not the seconds of an import.
"""

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported, which the server does

PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "torch.testing",
    "halfseen.engines.ddp",
    "halfseen.engines.fsdp",
    "halfseen.checkpoint",
    "halfseen.loop",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported by every initialize: seconds
    "fairscale.optim.oss",
    "fairscale.nn.data_parallel",
    "timm",
]


def run(function: Callable[..., Any], world: int, *arguments: Any, seconds: float = 120) -> list[Any]:
    """``function(world: World, *arguments)`` on each rank; the results in rank order.

    function: at the top level of a file. Arguments and results are pickled. If a rank raises, this raises
    with its traceback; what has not ended after ``seconds`` is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    where = (inspect.getsourcefile(function), function.__qualname__)
    port = free_port()
    children, pipes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        message = pickle.dumps(arguments)
        child = context.Process(target=_serve, args=(theirs, where, rank, world, port, message), daemon=True)
        child.start()
        theirs.close()
        children.append(child)
        pipes.append(ours)
    try:
        answers = [_answer(pipe, rank, seconds) for rank, pipe in enumerate(pipes)]
    finally:
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()
    failures = [f"--- rank {rank}\n{text}" for rank, (good, text) in enumerate(answers) if not good]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, value in answers]


def _answer(pipe: Any, rank: int, seconds: float) -> tuple[bool, Any]:
    if not pipe.poll(seconds):
        return False, f"no answer within {seconds} s"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "the process died without an answer"


def _serve(pipe: Any, where: tuple[str, str], rank: int, world: int, port: int, message: bytes) -> None:
    import torch

    from halfseen import distributed

    os.environ |= environment(rank, world, port)
    torch.set_num_threads(1)
    try:
        function = load(*where)
        with distributed.started("cpu") as group:
            answer = (True, function(group, *pickle.loads(message)))
        pipe.send_bytes(pickle.dumps(answer))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))


def begin(function: Callable[..., int], *arguments: Any) -> Any:
    """``function(*arguments)`` in a process of its own, to send signals to; its exit code is what it returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    where = (inspect.getsourcefile(function), function.__qualname__)
    child = context.Process(target=_exit_with, args=(where, arguments), daemon=True)
    child.start()
    return child


def _exit_with(where: tuple[str, str], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    sys.exit(load(*where)(*arguments))


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set, on the loopback interface."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "OMP_NUM_THREADS": "1",
    }


def load(file: str, name: str) -> Callable[..., Any]:
    """A function by file and name: test files are not importable by name in another process."""
    sys.path.append(str(Path(__file__).parent))
    spec = importlib.util.spec_from_file_location(f"ranked_{Path(file).stem}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
