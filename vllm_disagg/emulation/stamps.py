"""What the emulated forward pass writes into KV blocks, and what it reads out of them. Pure arithmetic on arrays.

A cell is 8 bytes: the share of one token, one layer group and one KV head. It holds a stamp of the model, the layer
group, the head, the token's id and position and all tokens before it. Reading sums the cells of a block, each with a
weight of its own, into one digest, over all heads and layer groups and so over all ranks: any byte that is not the
one that was written changes it. All numbers are 64 bits wide and wrap around.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def mix(values: Words) -> Words:
    """Spread every input bit over all output bits (the finaliser of splitmix64). One to one."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mix_int(value: int) -> int:
    """The same for one Python integer."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def seed_of(text: str) -> int:
    """64 bits that stand for a text, such as a model's name."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Prefix:
    """Running digest of a request's tokens.

    Args:
        seed: the model's.
    """

    __slots__ = ("_length", "_seed", "_sum")

    def __init__(self, seed: int) -> None:
        self._seed, self._length, self._sum = np.uint64(seed), 0, np.uint64(0)

    def digests(self, token_ids: Sequence[int], begin: int, end: int) -> Words:
        """Digests after each token of `[begin, end)`, each of all tokens up to its own.

        Args:
            token_ids: the request's tokens from its first, at least `end` of them.
            begin, end: positions. Going back before the last call's `end` starts again from the first token.
        """
        if begin < self._length:
            self._length, self._sum = 0, np.uint64(0)
        ids = np.asarray(token_ids[self._length : end], np.uint64)
        positions = np.arange(self._length, end, dtype=np.uint64)
        with np.errstate(over="ignore"):
            sums = np.cumsum(mix(ids * _GOLDEN + positions + self._seed), dtype=np.uint64) + self._sum
            digests = mix(sums + positions)[begin - self._length :]
        if begin > self._length:
            self._sum = sums[begin - self._length - 1]
        self._length = begin
        return digests


class Stamper:
    """Stamps and weights of the layer groups and heads that one rank holds.

    Args:
        seed: the model's; every rank of every instance of a model uses the same.
        groups, heads: the rank's share, numbered over the whole model.
        block_size: tokens per block.
    """

    def __init__(self, seed: int, *, groups: range, heads: range, block_size: int) -> None:
        cells = np.array([[(group << 16) + head for head in heads] for group in groups], np.uint64)
        with np.errstate(over="ignore"):
            self._marks = mix(cells * _GOLDEN + np.uint64(seed))
            slots = np.arange(block_size, dtype=np.uint64)
            self.weights = mix(self._marks[:, :, None] + slots * _GOLDEN) | np.uint64(1)

    def stamps(self, digests: Words) -> Words:
        """The cells of some tokens.

        Args:
            digests: shape `[tokens]`, from `Prefix.digests`.

        Returns:
            Shape `[groups, heads, tokens]`.
        """
        return mix(self._marks[:, :, None] + digests[None, None, :])

    def read(self, caches: Sequence[Words], blocks: NDArray[np.int64], lengths: NDArray[np.int64]) -> Words:
        """Weighted sums of some blocks' cells, over this rank's heads and layer groups.

        Args:
            caches: one array per layer group, shape `[num_blocks, heads, block_size]`.
            blocks: shape `[n]`, block ids.
            lengths: shape `[n]`, how many of a block's tokens count.

        Returns:
            Shape `[n]`. The sums of all ranks of an engine add up to a sum that does not depend on its parallelism.
        """
        block_size = self.weights.shape[2]
        total = np.zeros(len(blocks), np.uint64)
        partial = np.flatnonzero(lengths < block_size)
        beyond = np.arange(block_size)[None, :] >= lengths[partial, None]
        for cache, weights in zip(caches, self.weights, strict=True):
            cells = cache[blocks]
            cells[partial] = np.where(beyond[:, None, :], np.uint64(0), cells[partial])
            total += cells.reshape(len(blocks), -1) @ weights.reshape(-1)
        return total


def combine(block_sums: Words) -> int:
    """One request's digest from the sums of its blocks, in the order of its block table."""
    with np.errstate(over="ignore"):
        order = np.arange(len(block_sums), dtype=np.uint64)
        return int(np.bitwise_xor.reduce(mix(block_sums + mix(order + _GOLDEN))))
