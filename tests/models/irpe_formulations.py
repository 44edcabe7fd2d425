"""Four ways to take contextual iRPE's encodings to pairs of tokens; run as a program it prints their time.

Each takes each [B, H, N, K], a number per query and bucket, to [B, H, N, N] by buckets [N, N].
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from halfseen.models.irpe import bucket_count, bucket_table


def along_the_last_axis(each: Tensor, buckets: Tensor) -> Tensor:
    """What halfseen does: gather; backward is a scatter-add along the same axis."""
    return each.gather(-1, buckets.expand(*each.shape[:-1], -1))


def flattened_index(each: Tensor, buckets: Tensor) -> Tensor:
    """What the original does without its CUDA extension: one index over queries and buckets."""
    count = each.shape[-1]
    flat = (torch.arange(len(buckets))[:, None] * count + buckets).flatten()
    return each.flatten(2)[:, :, flat].unflatten(-1, buckets.shape)


def one_hot_product(each: Tensor, buckets: Tensor) -> Tensor:
    """A matrix product per query with its buckets as one-hot columns."""
    columns = F.one_hot(buckets, each.shape[-1]).to(each.dtype).transpose(1, 2)
    product = torch.bmm(each.flatten(0, 1).transpose(0, 1), columns)
    return product.transpose(0, 1).unflatten(0, each.shape[:2])


def embedding(each: Tensor, buckets: Tensor) -> Tensor:
    """Rows of a table whose columns are samples and heads."""
    count = each.shape[-1]
    flat = (torch.arange(len(buckets))[:, None] * count + buckets).flatten()
    table = each.flatten(0, 1).flatten(1).t()
    return F.embedding(flat, table).t().unflatten(-1, buckets.shape).unflatten(0, each.shape[:2])


FORMULATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    along_the_last_axis,
    flattened_index,
    one_hot_product,
    embedding,
)


def main() -> None:
    """Best of several runs at ViT-S, 196 tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    buckets = bucket_table("product", (14, 14), 0, 1.9)
    each = torch.randn(options.batch, 6, 196, bucket_count("product", 0, 1.9), requires_grad=True)
    gradient = torch.randn(options.batch, 6, 196, 196)
    print(f"batch {options.batch}, 6 heads, 196 tokens, 49 buckets, ms of one CPU thread")
    best = {formulation.__name__: [float("inf")] * 2 for formulation in FORMULATIONS}
    for _ in range(options.runs):
        for formulation in FORMULATIONS:
            start = time.process_time()
            out = formulation(each, buckets)
            middle = time.process_time()
            out.backward(gradient)
            end = time.process_time()
            seen = best[formulation.__name__]
            best[formulation.__name__] = [min(seen[0], middle - start), min(seen[1], end - middle)]
    for name, (forward, backward) in best.items():
        print(f"{name:<22} forward {forward * 1e3:6.1f}   backward {backward * 1e3:6.1f}")


if __name__ == "__main__":
    main()
