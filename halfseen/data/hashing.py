"""Keyed hashing: the one source of randomness in the data path.

Every random choice about a sample (which one comes next, its crop, its mask) is a hash of the run's seed, the
sample's position and a purpose. No generator carries state from one sample to the next, so nothing can depend on
the number of workers, ranks or restarts. The mixer is splitmix64 (Steele, Lea and Flood, 2014), written three
times below -- Python, numpy, torch -- so that host and device agree to the bit.
"""

import random
import zlib

import numpy as np
import torch
from torch import Tensor

MASK64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


def purpose(name: str) -> int:
    """A stable integer for a named use of randomness, e.g. ``purpose("crop")``."""
    return zlib.crc32(name.encode())


def mix(*words: int) -> int:
    """Hash any number of integers to one in [0, 2**64)."""
    state = 0
    for word in words:
        state = (state ^ (word & MASK64)) + GAMMA & MASK64
        state = (state ^ (state >> 30)) * MIX1 & MASK64
        state = (state ^ (state >> 27)) * MIX2 & MASK64
        state ^= state >> 31
    return state


def mix_array(*words: int | np.ndarray) -> np.ndarray:
    """``mix`` over broadcast integer arrays; returns uint64 of the broadcast shape."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(word) for word in words)), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            value = np.asarray(word).astype(np.uint64) if isinstance(word, np.ndarray) else np.uint64(word & MASK64)
            state = (state ^ value) + np.uint64(GAMMA)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX1)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX2)
            state = state ^ (state >> np.uint64(31))
    return state


def _signed(word: int) -> int:
    word &= MASK64
    return word - (1 << 64) if word >> 63 else word


def _shift_right(value: Tensor, bits: int) -> Tensor:
    # torch has no unsigned 64-bit shift: shift arithmetically, then clear the copied sign bits.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix_tensor(*words: int | Tensor) -> Tensor:
    """``mix`` over broadcast int64 tensors, on their device; returns int64 holding the same 64 bits."""
    state: Tensor = torch.zeros((), dtype=torch.int64, device=next(w.device for w in words if isinstance(w, Tensor)))
    for word in words:
        value = word if isinstance(word, Tensor) else _signed(word)
        state = (state ^ value) + _signed(GAMMA)
        state = (state ^ _shift_right(state, 30)) * _signed(MIX1)
        state = (state ^ _shift_right(state, 27)) * _signed(MIX2)
        state = state ^ _shift_right(state, 31)
    return state


def uniform(seed: int, positions: Tensor, count: int, name: str) -> Tensor:
    """Uniform numbers in [0, 1) that depend on (seed, position, column) alone.

    positions: int64 [B], on any device. Returns float32 [B, count] on the same device, multiples of 2**-24.
    """
    columns = torch.arange(count, device=positions.device)
    words = mix_tensor(mix(seed, purpose(name)), positions[:, None], columns[None, :])
    return _shift_right(words, 40).to(torch.float32) * 2.0**-24


def generator(seed: int, position: int, name: str) -> random.Random:
    """A Python random generator for one sample and one purpose."""
    return random.Random(mix(seed, purpose(name), position))
