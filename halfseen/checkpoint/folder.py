"""The format on disk: a folder per checkpoint, and the manifest that makes it one.

checkpoints/img_000000012800/   position 12,800
    __0_0.distcp ...            tensors, one or more files per rank (torch distributed checkpoint)
    .metadata                   where in those files each tensor lies
    manifest.json               written last: size and digest of every file and of itself, position, what wrote it
checkpoints/.partial_...        being written, or left over from a crash; never read
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from halfseen.config import ConfigError

FORMAT = 1
MANIFEST = "manifest.json"
METADATA = ".metadata"
PARTIAL = ".partial_"
_NAME = re.compile(r"img_(\d{12,})")


def folder_name(position: int) -> str:
    """``img_000000012800``."""
    return f"img_{position:012d}"


def position_of(path: Path) -> int:
    """The position in a checkpoint folder's name, -1 for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def listed(folder: Path) -> list[Path]:
    """Checkpoint folders by name alone, newest first; partial ones do not count."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if position_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=position_of, reverse=True)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and digest of one file."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest; ConfigError where it is missing, damaged or of a newer format."""
    file = path / MANIFEST
    try:
        manifest = dict(json.loads(file.read_text()))
        newer = manifest["format"] > FORMAT
        complete = METADATA in manifest["files"] and isinstance(manifest["position"], int)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("checkpoint", str(file), f"cannot be read: {error}", "use another checkpoint") from error
    if newer:
        raise ConfigError("checkpoint", str(path), "was written by a newer version", "upgrade halfseen")
    if not complete:
        raise ConfigError("checkpoint", str(file), "is not a manifest", "use another checkpoint")
    if manifest.pop("digest", None) not in (None, digest_of(manifest)):  # the first ones had none
        reason = "its content has changed since it was written"
        raise ConfigError("checkpoint", str(file), reason, "use another checkpoint")
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write and sync the manifest: from here on the folder is complete."""
    manifest = {"format": FORMAT} | manifest
    with (path / MANIFEST).open("w") as file:
        json.dump(manifest | {"digest": digest_of(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(path)


def digest_of(manifest: dict[str, Any]) -> str:
    """Digest of all that a manifest says beside its digest."""
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=32).hexdigest()


def sync(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def faults(path: Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, one line per file; empty for a healthy one.

    share: (rank, world) to look at only every world-th file, so that ranks divide the reading.
    """
    try:
        manifest = read_manifest(path)
    except ConfigError as error:
        return [str(error).splitlines()[0]]
    rank, world = share
    found = []
    for name, known in sorted(manifest["files"].items())[rank::world]:
        file = path / name
        if not file.is_file():
            found.append(f"{file}: missing")
        elif file.stat().st_size != known["bytes"]:
            found.append(f"{file}: {file.stat().st_size:,} bytes instead of {known['bytes']:,}")
        elif digests and fingerprint(file) != known:
            found.append(f"{file}: its content has changed since it was written")
    return found


def newest_healthy(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as it was written, and what was wrong with newer ones."""
    passed: list[str] = []
    for path in listed(folder):
        wrong = faults(path)
        if not wrong:
            return path, passed
        passed += wrong
    return None, passed
