"""Text files that nobody sees half written."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one move: a reader, and whatever comes after a crash, sees the old text or the new.

    One process at a time may write a path. Raises OSError as Path.write_text does.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
