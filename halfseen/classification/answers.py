"""What counts as right: the plain label, another data set's labels, or several right answers for an image."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfseen.config import ConfigError


@dataclass(frozen=True)
class Answers:
    """How an evaluation set's labels relate to a classifier's classes.

    labels: the class that each label of the set stands for; None: labels are classes. only: count no other class as a
    prediction than those (ImageNet-A and -R have 200 of the 1000). images: right classes by key, in place of the label;
    an image whose list is empty, or that has none, is left out of the numbers (ReaL).
    """

    labels: Sequence[int] | None = None
    only: bool = False
    images: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | None = None

    @classmethod
    def read(cls, labels: Path | None, images: Path | None, classes: int) -> "Answers":
        """From the user's JSON files.

        labels: a list of classes, one per label of the set, or {"labels": [...], "only": true}. images: {key: [class,
        ...]}, or a list of such lists for images whose keys end in a number, counted from 1 (ILSVRC2012_val_00000001).
        """
        mapped = load(labels, "--label-map") if labels else {}
        listed = {"labels": mapped} if isinstance(mapped, list) else mapped
        if labels and not (isinstance(listed, dict) and is_classes(listed.get("labels"), classes)):
            reason = f"does not say a class of 0 to {classes - 1} for each label of the set"
            fix = 'write a list of classes, or {"labels": [...], "only": true}'
            raise ConfigError("--label-map", str(labels), reason, fix)
        if unknown := sorted(set(listed) - {"labels", "only"}):
            raise ConfigError("--label-map", str(labels), f"has other keys: {unknown}", "labels and only")
        given = load(images, "--answers") if images else None
        rows = list(given.values()) if isinstance(given, dict) else given
        if images and not (isinstance(rows, list) and rows and all(is_classes(row, classes, 0) for row in rows)):
            reason = f"does not list classes of 0 to {classes - 1} for each image"
            raise ConfigError("--answers", str(images), reason, "write {key: [class, ...]}, or a list of such lists")
        return cls(listed.get("labels"), bool(listed.get("only")), given)

    def label_count(self, classes: int) -> int:
        """How many labels the set may use."""
        return classes if self.labels is None else len(self.labels)

    def allowed(self, classes: int) -> Tensor | None:
        """Classes that count as predictions, bool [K]; None: all."""
        if not self.only or self.labels is None:
            return None
        return torch.zeros(classes, dtype=torch.bool).index_fill_(0, torch.tensor(self.labels), True)

    def right(self, batch: Mapping[str, Any], classes: int) -> Tensor:
        """The right classes of each image: bool [B, K] on the labels' device; a row without any is left out."""
        label: Tensor = batch["label"]
        if self.images is not None:
            right = torch.zeros(len(label), classes, dtype=torch.bool)
            for row, key in enumerate(batch["key"]):
                right[row, list(self._of(key))] = True
            return right.to(label.device)
        if self.labels is not None:
            label = torch.tensor(self.labels, device=label.device)[label]
        return torch.nn.functional.one_hot(label, classes).bool()

    def _of(self, key: str) -> Sequence[int]:
        if isinstance(self.images, Mapping):
            return self.images.get(key, ())
        found = re.search(r"(\d+)\D*$", key)
        assert self.images is not None
        if not found or not 0 < int(found[1]) <= len(self.images):
            raise ConfigError("--answers", key, "has no number among the answers", "give {key: [class, ...]} instead")
        return self.images[int(found[1]) - 1]


def load(path: Path, option: str) -> Any:
    """A user's JSON file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(option, str(path), f"cannot be read: {error}", "give a JSON file") from error


def is_classes(value: Any, classes: int, least: int = 1) -> bool:
    """Whether something is a list of at least so many class numbers."""
    if not isinstance(value, list) or len(value) < least:
        return False
    return all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < classes for number in value)
