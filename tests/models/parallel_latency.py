"""Seconds a batch takes through depth x branches blocks: in sequence, in parallel, fused. Run it as a program."""

import argparse
import time
from collections.abc import Callable

import torch

from halfseen.config import Model
from halfseen.models import ViT
from halfseen.models.fused import fuse


def best_of(run: Callable[[], object], runs: int) -> float:
    """Shortest time of one run, in seconds; on the CPU that of its one thread, so that other programs do not count."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = []
    for _ in range(runs):
        start = clock()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    """The same number of attentions and MLPs each time, as in Three things, table 4."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="s")
    parser.add_argument("--depth", type=int, default=18, help="parallel blocks of two branches")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = ViT(Model(size=options.size, depth=options.depth, parallel=2), 224).to(device).eval()
    trunks = {
        f"{2 * options.depth}x1, in sequence": ViT(Model(size=options.size, depth=2 * options.depth), 224),
        f"{options.depth}x2, branch after branch": wide,
        f"{options.depth}x2, fused": fuse(wide),
    }
    print(f"ViT-{options.size} at 224 pixels, {device}, float32, ms per batch")
    with torch.inference_mode():
        for batch in options.batches:
            image = torch.randn(batch, 3, 224, 224, device=device)
            for name, trunk in trunks.items():
                trunk.to(device).eval()(image)
                print(f"batch {batch}: {name:<26} {best_of(lambda t=trunk, i=image: t(i), options.runs) * 1e3:8.1f}")


if __name__ == "__main__":
    main()
