"""The code as it is now, kept for a job that starts later."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import halfseen
from halfseen.config import ConfigError

# The folders of a checkout and the place each has in the package (package-dir in pyproject.toml).
FOLDERS = {
    "halfseen": "halfseen",
    "pretrain": "halfseen/pretrain",
    "finetune": "halfseen/finetune",
    "launch": "halfseen/launch",
    "tools": "halfseen/tools",
    "configs": "halfseen/configs",
}

KEEP_DAYS = 30  # a snapshot that no job was launched with or has started from for so long is removed
MOST = 256 << 20  # bytes of a snapshot: more is no code but data that lies among it
USERS = "users.txt"  # in a snapshot: the run folders it was launched for


def take(store: Path) -> Path | None:
    """Copy the running code into ``store`` and return its folder; None if it is an installed package.

    Takes what git tracks and what it does not ignore, with every change in the working tree. The folder's name is a
    digest of the content, so launching the same code again copies nothing. A job that launches another passes on
    its own snapshot.
    """
    root = Path(halfseen.__file__).resolve().parents[1]
    if (root / "snapshot.json").is_file():
        return root
    if not (root / ".git").exists():
        return None
    refuse_hidden()
    files = {inside(name): root / name for name in listed(root)}
    refuse_large(files.values())
    digest = hashlib.blake2b(digest_size=12)
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    final = store.absolute() / digest.hexdigest()
    if not final.exists():
        partial = store.absolute() / f".partial-{digest.hexdigest()}-{os.getpid()}"
        for name, path in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, partial / name)
        (partial / "snapshot.json").write_text(json.dumps(state(root), indent=1) + "\n")
        try:
            os.rename(partial, final)
        except OSError:  # another launch was faster; its content is the same
            shutil.rmtree(partial)
            if not final.exists():
                raise
    os.utime(final)
    return final


def refuse_large(files: Iterable[Path]) -> None:
    """Raise ConfigError for more than any code takes, with the largest file."""
    sizes = {path: path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MOST:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ConfigError(
            "launch.snapshot",
            True,
            f"the package's folders hold {total / 2**20:,.0f} MiB; {largest} alone {sizes[largest] / 2**20:,.0f}",
            "move data out of them, or have git ignore it, or give --no-snapshot",
        )


def refuse_hidden() -> None:
    """Raise ConfigError where Python would look into the current folder before the snapshot."""
    if sys.version_info < (3, 11) and Path("halfseen").is_dir():
        raise ConfigError(
            "launch.snapshot",
            True,
            "Python 3.10 looks for modules in the current folder first, and this one has a halfseen",
            "launch from another folder, use Python 3.11, or give --no-snapshot",
        )


def listed(root: Path) -> list[str]:
    """Files of the package that git tracks or does not ignore and that exist, relative to the checkout."""
    if shutil.which("git") is None:
        raise ConfigError("launch.snapshot", True, "there is no git on PATH", "load its module, or give --no-snapshot")
    command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard", "-z", "--", *FOLDERS]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        said = answer.stderr.strip() or f"git ended with {answer.returncode}"
        raise ConfigError("launch.snapshot", True, said, "correct that, or give --no-snapshot")
    return [name for name in answer.stdout.split("\0") if name and (root / name).is_file()]


def inside(name: str) -> str:
    """Where a file of the checkout belongs in the snapshot."""
    folder, _, rest = name.partition("/")
    return f"{FOLDERS[folder]}/{rest}"


def state(root: Path) -> dict[str, object]:
    """Commit of the checkout, and whether files differ from it."""
    command = ["git", "-C", str(root)]
    commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=60, check=False)
    status = subprocess.run(
        [*command, "status", "--porcelain"], capture_output=True, text=True, timeout=60, check=False
    )
    return {"commit": commit.stdout.strip() or None, "dirty": bool(status.stdout.strip())}


def note(taken: Path, folders: Iterable[str]) -> None:
    """Write down that runs were launched with a snapshot."""
    with (taken / USERS).open("a") as file:
        file.write("".join(f"{folder}\n" for folder in folders))


def prune(store: Path, busy: Callable[[str], bool], now: float | None = None) -> list[Path]:
    """Remove snapshots that nobody has used for KEEP_DAYS and that no queued or running job needs; returns them.

    busy: whether a run folder has such a job; asked of the runs that an old snapshot was launched for.
    """
    limit = (now if now is not None else time.time()) - KEEP_DAYS * 86400
    gone = []
    for path in sorted(store.iterdir()) if store.is_dir() else []:
        ours = (path / "snapshot.json").is_file() or path.name.startswith(".partial-")
        if not ours or path.stat().st_mtime >= limit:
            continue
        users = set((path / USERS).read_text().splitlines()) if (path / USERS).is_file() else set()
        if not any(busy(folder) for folder in users):
            shutil.rmtree(path)
            gone.append(path)
    return gone
