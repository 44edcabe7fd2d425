"""Small tars written with webdataset's own writer."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

MakeShards = Callable[..., Path]


def jpeg(number: int, size: tuple[int, int] = (20, 24)) -> bytes:
    """A distinct small picture: (height, width) of smooth noise."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
    stream = io.BytesIO()
    small.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
    return stream.getvalue()


@pytest.fixture(name="jpeg")
def jpeg_of_number() -> Callable[..., bytes]:
    """jpeg(number, size=(height, width)) -> a distinct small picture."""
    return jpeg


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """make_shards(counts, name=, classes=, extension=content(number)) -> folder of tars, keys s000000, ..."""

    def make(counts: list[int], name: str = "set", classes: int = 5, **more: Callable[[int], bytes]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        number = 0
        for shard, count in enumerate(counts):
            with TarWriter(str(folder / f"part-{shard:04d}.tar"), encoder=False, mtime=0) as tar:
                for _ in range(count):
                    members = {"jpg": jpeg(number), "cls": str(number % classes).encode()}
                    members |= {extension: content(number) for extension, content in more.items()}
                    tar.write({"__key__": f"s{number:06d}", **members})
                    number += 1
        return folder

    return make
