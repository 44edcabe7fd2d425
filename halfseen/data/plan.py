"""The plan: which sample comes at which position, by arithmetic on (seed, position) alone.

For each source: shards are cut into chunks of consecutive samples; each epoch orders the chunks by hash; laid
end to end they are a stream of exactly N samples, cut into L lanes that are read in turn (position p is in
lane p mod L); inside a lane, windows of V samples are permuted by hash. L x V samples are mixed and nothing
is held in memory. The stream goes on over epochs, each a permutation of all samples.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np

from halfseen.data.hashing import mix, mix_array, purpose

BLOCK = 4096  # positions of a mixture in which every source has its exact count
LEAST_CHUNKS = 4096  # small sets get smaller chunks, so that the order of chunks alone shuffles them well


class Recent:
    """The last few results of a pure function of a key."""

    def __init__(self, limit: int) -> None:
        self.limit, self.values = limit, OrderedDict[Hashable, Any]()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value for a key, made at first use."""
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        value = self.values[key] = make()
        while len(self.values) > self.limit:
            self.values.popitem(last=False)
        return value


class Order:
    """The endless order of one source's samples."""

    def __init__(self, counts: np.ndarray, seed: int, chunk: int, window: int, lanes: int) -> None:
        """counts: samples of each shard. chunk, window in samples; see the module's text."""
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        self.seed, self.window, self.lanes = seed, window, lanes
        self.chunk = min(chunk, max(1, self.total // LEAST_CHUNKS))
        self.shard_end = np.cumsum(self.counts)
        per_shard = -(-self.counts // self.chunk)
        self.chunk_end = np.cumsum(per_shard)
        self.chunk_start = self.chunk_end - per_shard
        self.lane_size, self.longer_lanes = divmod(self.total, lanes)
        self.chunk_orders = Recent(2)
        self.windows = Recent(4)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, sample) for int64 positions of this source's stream."""
        epochs, within = np.divmod(np.asarray(positions, np.int64), self.total)
        shard, sample = np.empty_like(within), np.empty_like(within)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            shard[rows], sample[rows] = self._stream(int(epoch), self._shuffled(int(epoch), within[rows]))
        return shard, sample

    def natural(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, sample) for sample numbers in shard order."""
        shard = np.searchsorted(self.shard_end, numbers, side="right")
        return shard, numbers - (self.shard_end[shard] - self.counts[shard])

    def _shuffled(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """Places in the epoch's stream of chunks: lane by lane, permuted inside each window."""
        lane, index = within % self.lanes, within // self.lanes
        number, slot = index // self.window, index % self.window
        start = lane * self.lane_size + np.minimum(lane, self.longer_lanes)
        for window in np.unique(number):
            rows = number == window
            permutation = self.windows.get((epoch, int(window)), partial(self._permutations, epoch, int(window)))
            slot[rows] = permutation[lane[rows], slot[rows]]
        return start + number * self.window + slot

    def _permutations(self, epoch: int, number: int) -> np.ndarray:
        """int32 [lanes, window]: the order inside window ``number`` of every lane."""
        widest = min(self.window, self.lane_size + bool(self.longer_lanes) - number * self.window)
        lanes, slots = np.arange(self.lanes)[:, None], np.arange(widest)[None, :]
        keys = mix_array(mix(self.seed, purpose("window"), epoch, number), lanes, slots)
        if self.longer_lanes and number * self.window + widest > self.lane_size:
            # The last slot exists in the longer lanes only; in the others it stays last.
            keys[self.longer_lanes :, -1] = np.iinfo(np.uint64).max
        return np.argsort(keys, axis=1, kind="stable").astype(np.int32)

    def _stream(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, sample) at places of the epoch's chunks laid end to end."""
        order, ends = self.chunk_orders.get(epoch, partial(self._chunk_order, epoch))
        rank = np.searchsorted(ends, places, side="right")
        chunk = order[rank]
        shard, first, size = self._chunk(chunk)
        return shard, first + places - (ends[rank] - size)

    def _chunk_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunk numbers in the epoch's order, and where each ends in the stream."""
        chunks = np.arange(self.chunk_end[-1] if len(self.chunk_end) else 0)
        order = np.argsort(mix_array(mix(self.seed, purpose("chunk"), epoch), chunks), kind="stable")
        return order, np.cumsum(self._chunk(order)[2])

    def _chunk(self, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, first sample, samples) of chunk numbers; the last chunk of a shard is what remains."""
        shard = np.searchsorted(self.chunk_end, chunk, side="right")
        first = (chunk - self.chunk_start[shard]) * self.chunk
        return shard, first, np.minimum(self.chunk, self.counts[shard] - first)


def shares(weights: Sequence[float]) -> list[int]:
    """Positions of each source in a block: proportional to the weights, at least one each, BLOCK together."""
    exact = np.asarray(weights, float) / sum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(int), 1)
    for _ in range(abs(BLOCK - int(counts.sum()))):
        if counts.sum() < BLOCK:
            counts[np.argmax(exact - counts)] += 1
        else:
            counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return [int(count) for count in counts]


class Plan:
    """Order of a whole mixture: position -> (source, shard, sample)."""

    def __init__(
        self,
        counts: Sequence[np.ndarray],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        chunk: int = 256,
        window: int = 2048,
        lanes: int = 64,
        repeats: int = 1,
    ) -> None:
        """counts: for each source, samples of each of its shards. weights: relative shares of positions."""
        self.seed, self.repeats = seed, repeats
        self.orders = [
            Order(shards, mix(seed, purpose("source"), number), chunk, window, lanes)
            for number, shards in enumerate(counts)
        ]
        self.shares = shares(weights or [1.0] * len(counts))
        self.patterns = Recent(8)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, shard, sample), int64 arrays, for int64 positions of the run."""
        positions = np.asarray(positions, np.int64) // self.repeats
        source, counter = self._mixture(positions)
        shard, sample = np.empty_like(counter), np.empty_like(counter)
        for number in np.unique(source):
            rows = source == number
            shard[rows], sample[rows] = self.orders[number].locate(counter[rows])
        return source, shard, sample

    def replacement(self, source: int, position: int, attempt: int) -> tuple[int, int]:
        """(shard, sample) that stands in for a bad sample of a source at a position."""
        order = self.orders[source]
        number = mix(self.seed, purpose("replacement"), position, attempt) % order.total
        shard, sample = order.natural(np.array([number]))
        return int(shard[0]), int(sample[0])

    def _mixture(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, that source's own position): each block holds exact counts in a hashed pattern."""
        if len(self.orders) == 1:
            return np.zeros_like(positions), positions
        blocks, slots = np.divmod(positions, BLOCK)
        source, counter = np.empty_like(slots), np.empty_like(slots)
        per_block = np.array(self.shares)
        for block in np.unique(blocks):
            rows = blocks == block
            pattern, rank = self.patterns.get(int(block), partial(self._pattern, int(block)))
            source[rows] = pattern[slots[rows]]
            counter[rows] = block * per_block[source[rows]] + rank[slots[rows]]
        return source, counter

    def _pattern(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each slot, how many slots of that source came before it in the block)."""
        keys = mix_array(mix(self.seed, purpose("mixture"), block), np.arange(BLOCK))
        pattern = np.repeat(np.arange(len(self.shares)), self.shares)[np.argsort(keys, kind="stable")]
        rank = np.empty(BLOCK, np.int64)
        for number, count in enumerate(self.shares):
            rank[pattern == number] = np.arange(count)
        return pattern, rank
