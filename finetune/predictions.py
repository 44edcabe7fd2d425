"""Every prediction of an evaluation, in a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from halfseen.config import ConfigError
from halfseen.distributed import World

MOST = 5  # classes listed for an image


class Predictions:
    """A row per image: key, its number in the set, right classes, the five likeliest and their probabilities."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(self, batch: dict[str, Any], probability: Tensor, right: Tensor) -> None:
        best = probability.topk(min(MOST, probability.shape[1]))
        for key, place, classes, shares, answers in zip(
            batch["key"], batch["position"].tolist(), best.indices.tolist(), best.values.tolist(), right.cpu()
        ):
            shares = [round(share, 6) for share in shares]
            right_classes = answers.nonzero()[:, 0].tolist()
            self.rows.append(
                {"key": key, "number": place, "right": right_classes, "classes": classes, "probabilities": shares}
            )

    def write(self, path: Path, world: World) -> None:
        """All ranks' rows in the order of the set, as JSON lines or Parquet by the file's ending. Collective."""
        gathered = [row for part in world.gather_object(self.rows) for row in part]
        if not world.main:
            return
        rows = sorted(gathered, key=lambda row: row["number"])
        if path.suffix == ".parquet":
            write_parquet(path, rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refuse(path: Path | None) -> None:
    """Raise ConfigError for a format that cannot be written here, before anything is computed."""
    if path is None or path.suffix == ".jsonl":
        return
    if path.suffix != ".parquet":
        raise ConfigError("--predictions", str(path), "is of no known kind", "end its name in .jsonl or .parquet")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError("--predictions", str(path), f"{error}", "pip install pyarrow, or write .jsonl") from error


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One row group; lists are list columns."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
