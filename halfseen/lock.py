"""A run folder belongs to one start at a time: two would write over each other's checkpoints and logs."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from halfseen.config import ConfigError
from halfseen.distributed import World

NAME = ".lock"
TAKEN = (errno.EACCES, errno.EAGAIN)


class Taken(ConfigError):
    """Another start holds the run folder, or did until its node was lost: network file systems notice that late."""


@contextmanager
def held(folder: Path, world: World) -> Iterator[None]:
    """Hold a run folder, which rank 0 makes if needed. Collective. Taken, on every rank, if another start holds it.

    The lock is the operating system's, and goes with rank 0's process, however that ends. A POSIX one: unlike
    flock's it is not inherited by loader processes that outlive rank 0 for a while, and network file systems pass it
    on to other nodes. Where a file system has none, the run goes on without, and says so.
    """
    with ExitStack() as open_files:
        holder = ""
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            file = open_files.enter_context((folder / NAME).open("a+"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
                file.flush()
            except OSError as error:
                if error.errno in TAKEN:
                    file.seek(0)
                    holder = file.read().strip() or "another process"
                else:
                    print(f"note      {folder} cannot be locked ({error.strerror}): start it only once", flush=True)
        holder = world.gather_object(holder)[0]
        if holder:
            raise Taken(
                "run.folder",
                str(folder),
                f"is being trained by {holder}",
                "wait until that ends, or give run.folder=ANOTHER_FOLDER",
            )
        yield
