"""The KV blocks of one simulated engine: who holds how many, and which beginnings of prompts are cached.

Blocks are counted, not numbered. Cached chunks that nobody references, and the blocks that ended requests leave behind,
form one queue in the order in which they were let go, and the oldest are overwritten first, as in vLLM's block pool.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Holding:
    """What one request holds: references on its first `num_chunks` chunks, and `own` blocks beside them."""

    own: int = 0
    num_chunks: int = 0


class Pool:
    """Blocks of one engine.

    Args:
        num_blocks: how many there are.
        block_size: tokens in each.
        chunk_tokens: tokens of a shareable chunk; 0 without a prefix cache.
    """

    def __init__(self, num_blocks: int, block_size: int, chunk_tokens: int) -> None:
        self.num_blocks, self.block_size, self.chunk_tokens = num_blocks, block_size, chunk_tokens
        self.free = num_blocks
        """Blocks that nobody references, cached or not."""
        self._references: dict[int, int] = {}
        self._left: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._num_left = 0
        """Of the free blocks those in `_left`: the others hold nothing."""

    @property
    def used(self) -> int:
        """Referenced blocks."""
        return self.num_blocks - self.free

    def blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-num_tokens // self.block_size)

    def prefix_blocks(self, num_chunks: int) -> int:
        """Whole blocks of the first chunks."""
        return num_chunks * self.chunk_tokens // self.block_size

    def find(self, chunks: Sequence[int]) -> int:
        """How many leading chunks are cached."""
        if self.chunk_tokens == 0:
            return 0
        found = 0
        while found < len(chunks) and chunks[found] in self._references:
            found += 1
        return found

    def hit_tokens(self, num_chunks: int, known: int) -> int:
        """Tokens that need not be computed: whole blocks, and never the last one of `known` tokens."""
        return min(self.prefix_blocks(num_chunks), (known - 1) // self.block_size) * self.block_size

    def price(self, chunks: Sequence[int], num_chunks: int, num_tokens: int) -> int:
        """Free blocks that `admit` takes."""
        revived = sum(self._chunk_blocks(k) for k in range(num_chunks) if self._references[chunks[k]] == 0)
        return self.blocks(num_tokens) - self.prefix_blocks(num_chunks) + revived

    def admit(self, chunks: Sequence[int], num_chunks: int, num_tokens: int) -> Holding:
        """Reference the cached chunks, and take own blocks for the rest of `num_tokens` tokens."""
        for k in range(num_chunks):
            if self._references[chunks[k]] == 0:
                self._num_left -= self._left.pop(("chunk", chunks[k]))
                self.free -= self._chunk_blocks(k)
            self._references[chunks[k]] += 1
        holding = Holding(num_chunks=num_chunks)
        self.grow(holding, num_tokens)
        return holding

    def set_aside(self, num_blocks: int) -> None:
        """Take so many free blocks out of use; negative to give some back."""
        self.free -= num_blocks
        self._overwrite()

    def missing(self, holding: Holding, num_tokens: int) -> int:
        """Blocks that a request lacks for so many tokens; not negative."""
        return max(0, self.blocks(num_tokens) - self.prefix_blocks(holding.num_chunks) - holding.own)

    def grow(self, holding: Holding, num_tokens: int) -> None:
        """Take what is missing for so many tokens."""
        more = self.missing(holding, num_tokens)
        holding.own += more
        self.free -= more
        self._overwrite()

    def publish(self, holding: Holding, chunks: Sequence[int], num_tokens: int) -> None:
        """The first `num_tokens` tokens are computed: their whole chunks can be found from now on. A chunk that another
        request has published meanwhile is kept once."""
        if self.chunk_tokens == 0:
            return
        while holding.num_chunks < len(chunks) and (holding.num_chunks + 1) * self.chunk_tokens <= num_tokens:
            k, chunk = holding.num_chunks, chunks[holding.num_chunks]
            if chunk not in self._references:
                self._references[chunk] = 0
            else:
                if self._references[chunk] == 0:
                    self._num_left -= self._left.pop(("chunk", chunk))
                    self.free -= self._chunk_blocks(k)
                self.free += self._chunk_blocks(k)
            self._references[chunk] += 1
            holding.own -= self._chunk_blocks(k)
            holding.num_chunks += 1

    def release(self, holding: Holding, chunks: Sequence[int], request: int) -> None:
        """Let everything go. A prompt's end is overwritten before its beginning."""
        self.free += holding.own
        if self.chunk_tokens:
            key = ("own", request)
            self._num_left += holding.own
            self._left[key] = self._left.pop(key, 0) + holding.own
            for k in reversed(range(holding.num_chunks)):
                self._references[chunks[k]] -= 1
                if self._references[chunks[k]] == 0:
                    self._left[("chunk", chunks[k])] = self._chunk_blocks(k)
                    self._num_left += self._chunk_blocks(k)
                    self.free += self._chunk_blocks(k)
        holding.own = holding.num_chunks = 0

    def _chunk_blocks(self, k: int) -> int:
        return self.prefix_blocks(k + 1) - self.prefix_blocks(k)

    def _overwrite(self) -> None:
        """Forget the oldest leftovers until those that remain fit the free blocks."""
        while self._num_left > self.free:
            key, blocks = next(iter(self._left.items()))
            taken = min(blocks, self._num_left - self.free)
            if key[0] == "chunk" or taken == blocks:
                del self._left[key]
                self._num_left -= blocks
                if key[0] == "chunk":
                    del self._references[key[1]]
            else:
                self._left[key] = blocks - taken
                self._num_left -= taken
