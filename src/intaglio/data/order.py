"""The order of training items as a pure function of (seed, epoch, position): any position can be sought at once."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def permutation(items: int, seed: int, epoch: int) -> np.ndarray:
    """The order (items,) of one epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(items)


def indices(items: int, seed: int, start: int, count: int) -> np.ndarray:
    """Items at positions start … start + count − 1 of the endless run of epochs; batches may span two epochs."""
    positions = np.arange(start, start + count)
    epochs, offsets = positions // items, positions % items
    chosen = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permutation(items, seed, int(epoch))[offsets[here]]
    return chosen


def draws(positions: np.ndarray, seed: int) -> np.ndarray:
    """A number in 0 … 2³¹ − 1 for each position (SplitMix64, Steele et al. 2014): chooses a caption, say."""
    z = positions.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int64)
