"""Measures what pretraining is worth to segmentation: mean IoU on made-up scenes from MAE's weights and random ones.

python tests/pretrain/segmentation_evidence.py FOLDER --out FILE.json

A scene is three labelled drawings at random places and sizes on a plain ground of random colour; its mask has a class
for every pixel, 0 being the ground. Both starts are trained with both rates of the demo, which were chosen for
classification, each for one of the starts. Run it again to continue: what has finished is not repeated.
"""

import argparse
import io
import random
from collections.abc import Iterator
from pathlib import Path

from evidence import AT_END, QUIET, Job, Record, Row, parser_of
from PIL import Image, ImageDraw, ImageOps

from halfseen.config import Data, Source
from halfseen.data import open_set
from halfseen.data.reader import Reader
from halfseen.data.writer import ShardWriter

STARTS = ("pretrained", "scratch")
RATES = {
    "pretrained_rate": ("optim.lr=3e-3", "optim.layer_decay=0.75"),
    "scratch_rate": ("optim.lr=1e-3", "optim.layer_decay=1"),
}
SIDE, DRAWINGS, SIZES = 64, 3, (28, 44)  # pixels of a scene; drawings in it; their sides in pixels
TRUNK = (
    *("model.size=ti", "model.width=96", "model.depth=6", "model.heads=3", "model.patch=8", "model.stem=hmlp"),
    *("model.position=sincos", "model.drop_path=0"),
)


def main() -> None:
    """Measure, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--scenes", type=int, nargs=2, default=(2000, 400), help="to train and to evaluate on")
    parser.add_argument("--epochs", type=int, default=10, help="of the scenes (default %(default)s)")
    arguments = parser.parse_args()
    for split, shards, count in zip(("train", "val"), (arguments.train, arguments.val), arguments.scenes):
        if not (made := arguments.folder / f"{split}.tar").exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            write_scenes(made, list(drawings(shards, arguments)), count, random.Random(split))
    record = Record(arguments.out, arguments, table)
    folder = arguments.folder / "pretrained"
    begun = ("pretrain", "pretrain/demo", f"data.train={arguments.train}", "data.val=null", *QUIET)
    record.do(Job("pretrained", (*begun, f"run.folder={folder}"), folder))
    for seed in range(arguments.seeds):
        for rate in RATES:
            for start in STARTS:
                record.do(segmentation(arguments, start, rate, seed))
    for found in table(record):
        print(f"{found['start']:<12} {found['rate']:<16} {found['mean']:.1f} ± {found['deviation']:.1f}")


def segmentation(arguments: argparse.Namespace, start: str, rate: str, seed: int) -> Job:
    """A training on the scenes."""
    folder = Path(arguments.folder) / f"{start}-{rate}-{seed}"
    data = (f"data.train={arguments.folder / 'train.tar'}", f"data.val={arguments.folder / 'val.tar'}")
    labels = ("data.label=seg.png", f"data.classes={arguments.classes + 1}", f"data.image_size={SIDE}")
    head = ("pixels.width=64", "pixels.zero_is_nothing=false", "pixels.scale=[0.75,1.5]")
    length = (f"run.images={arguments.epochs}ep", "run.global_batch=32", "optim.warmup=10%")
    init = (f"run.init={arguments.folder / 'pretrained'}",) if start == "pretrained" else ()
    options = (*data, *labels, *TRUNK, *head, *length, *RATES[rate], *init, f"run.seed={seed}", *QUIET, AT_END)
    return Job(folder.name, ("segment", "segment/mae_b16_ade20k", *options, f"run.folder={folder}"), folder)


def drawings(shards: str, arguments: argparse.Namespace) -> Iterator[tuple[Image.Image, Image.Image, int]]:
    """Every drawing of a set, where it is (not the white that reaches the border), and its class, from 1 on."""
    data = Data(train=[Source(arguments.train)], val=shards, label=arguments.label, classes=arguments.classes)
    images = open_set(data, "val")
    reader = Reader(images)
    for number, count in enumerate(images.sources[0].counts):
        for place in range(count):
            sample = reader.read(0, number, place)
            image = Image.open(io.BytesIO(sample.data)).convert("RGB")
            framed = ImageOps.expand(image, border=1, fill="white").convert("L").point(lambda value: max(value, 1))
            ImageDraw.floodfill(framed, (0, 0), 0, thresh=12)
            inside = framed.point(lambda value: 255 if value else 0).crop((1, 1, image.width + 1, image.height + 1))
            yield image, inside, sample.label + 1


def write_scenes(
    path: Path, choice: list[tuple[Image.Image, Image.Image, int]], count: int, rng: random.Random
) -> None:
    """A shard of scenes; later drawings cover earlier ones."""
    with ShardWriter(path) as shard:
        for number in range(count):
            scene = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(256) for _ in range(3)))
            mask = Image.new("L", (SIDE, SIDE), 0)
            for image, inside, label in rng.sample(choice, DRAWINGS):
                side = rng.randint(*SIZES)
                corner = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
                small, shape = image.resize((side, side)), inside.resize((side, side), Image.Resampling.NEAREST)
                scene.paste(small, corner, shape)
                mask.paste(label, (*corner, corner[0] + side, corner[1] + side), shape)
            shard.write(f"scene-{number:05d}", {"png": png(scene), "seg.png": png(mask)})


def png(image: Image.Image) -> bytes:
    """An image as a file."""
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def table(record: Record) -> list[Row]:
    """Rows that have finished."""
    rows = []
    for start in STARTS:
        for rate in RATES:
            names = [f"{start}-{rate}-{seed}" for seed in range(int(record.protocol["seeds"]))]
            if figures := record.figures(names, "mean_iou"):
                rows.append({"start": start, "rate": rate} | figures)
    return rows


if __name__ == "__main__":
    main()
