"""Sums of digests depend on what the KV is, and not on how it lies in memory or who holds which part of it."""

from __future__ import annotations

import ctypes
import random

import pytest

from vllm_disagg.connector.digests import DigestJob, digest, host_reader
from vllm_disagg.core.types import TransferId
from vllm_disagg.core.verify import HeadSums, added, differing, packed, unpacked
from vllm_disagg.transport.layout import RankLayout, Segment

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 4, 4, 5, 16
KEY = b"k" * 32

Cells = dict[tuple[int, int, int, int], bytes]
"""Layer, block, head and token, to what is kept of them."""


class Rank:
    """Some heads and layers of a KV cache in this process's memory, heads outside tokens or tokens outside heads."""

    def __init__(self, cells: Cells, layers: range, heads: range, *, tokens_outside: bool) -> None:
        self.buffers = []
        segments = []
        for layer in layers:
            inner = [(t, h) for t in range(TOKENS) for h in heads] if tokens_outside else None
            order = inner or [(t, h) for h in heads for t in range(TOKENS)]
            raw = b"".join(cells[layer, block, h, t] for block in range(BLOCKS) for t, h in order)
            buffer = ctypes.create_string_buffer(raw, len(raw))
            self.buffers.append(buffer)
            segments.append(
                Segment(
                    name=f"layer{layer}",
                    address=ctypes.addressof(buffer),
                    num_blocks=BLOCKS,
                    block_stride=len(raw) // BLOCKS,
                    first_head=heads.start,
                    num_heads=len(heads),
                    head_stride=CONTENT if tokens_outside else TOKENS * CONTENT,
                    num_rows=TOKENS if tokens_outside else 1,
                    row_stride=CONTENT * len(heads) if tokens_outside else TOKENS * CONTENT,
                    row_bytes=CONTENT if tokens_outside else TOKENS * CONTENT,
                )
            )
        self.layout = RankLayout(groups=(tuple(segments),))

    def sums(
        self, *, places: tuple[int, ...] = (0, 1, 2), blocks: tuple[int, ...] = (3, 1, 2), nonce: str = "n"
    ) -> tuple[HeadSums, ...]:
        job = DigestJob(transfer_id=TransferId("t"), nonce=nonce, places=places, blocks=(blocks,))
        return digest(self.layout, KEY, host_reader, job)


def some_cells(seed: int = 0) -> Cells:
    rng = random.Random(seed)
    return {
        (layer, block, head, token): rng.randbytes(CONTENT)
        for layer in range(LAYERS)
        for block in range(BLOCKS)
        for head in range(HEADS)
        for token in range(TOKENS)
    }


def whole(cells: Cells) -> tuple[HeadSums, ...]:
    return Rank(cells, range(LAYERS), range(HEADS), tokens_outside=False).sums()


@pytest.mark.parametrize("tokens_outside", [False, True])
def test_layouts_and_parallelism_make_no_difference(tokens_outside: bool) -> None:
    cells = some_cells()
    expected = whole(cells)

    for heads in (range(2), range(2, HEADS), range(1, 2)):
        stages = [
            Rank(cells, layers, heads, tokens_outside=tokens_outside).sums() for layers in (range(2), range(2, LAYERS))
        ]
        assert added(stages) == tuple(item for item in expected if item.head in heads)


def swapped(cells: Cells, one: tuple[int, ...], other: tuple[int, ...]) -> Cells:
    """Two cells' content exchanged: parts of `(layer, block, head)`."""
    changed = dict(cells)
    for token in range(TOKENS):
        a, b = (*one, token), (*other, token)
        changed[a], changed[b] = cells[b], cells[a]  # type: ignore[index]
    return changed


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 1, 0), (1, 1, 0)), ((0, 1, 0), (0, 2, 0)), ((0, 1, 0), (0, 1, 1))],
    ids=["layers", "blocks", "heads"],
)
def test_a_swap_is_seen(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    cells = some_cells()

    assert whole(swapped(cells, one, other)) != whole(cells)


def test_any_flipped_bit_is_seen() -> None:
    cells, rng = some_cells(), random.Random(1)
    right = whole(cells)
    for _ in range(200):
        where = rng.randrange(LAYERS), rng.choice([1, 2, 3]), rng.randrange(HEADS), rng.randrange(TOKENS)
        content = bytearray(cells[where])
        content[rng.randrange(CONTENT)] ^= 1 << rng.randrange(8)
        assert whole({**cells, where: bytes(content)}) != right


def test_other_transfers_and_places_have_other_sums() -> None:
    rank = Rank(some_cells(), range(LAYERS), range(HEADS), tokens_outside=False)

    assert rank.sums(nonce="m") != rank.sums()
    assert rank.sums(places=(1, 2, 3)) != rank.sums()


def test_a_block_outside_the_cache_is_an_error() -> None:
    rank = Rank(some_cells(), range(LAYERS), range(HEADS), tokens_outside=False)

    with pytest.raises(ValueError, match="outside"):
        rank.sums(blocks=(BLOCKS, 1, 2))


def test_sums_are_compared_where_both_sides_have_them() -> None:
    theirs = [HeadSums(0, head, packed([10 + head, 20 + head, 30 + head])) for head in range(4)]
    ours = [HeadSums(0, 2, packed([22, 32]))]
    offered = (0, 3, 7)

    assert differing(ours, theirs, compared=(3, 7), offered=offered) == ""
    assert "block 7" in differing([HeadSums(0, 2, packed([22, 33]))], theirs, compared=(3, 7), offered=offered)
    assert "head 9" in differing([HeadSums(0, 9, packed([22, 32]))], theirs, compared=(3, 7), offered=offered)
    assert "block 4" in differing(ours, theirs, compared=(4, 7), offered=offered)
    assert differing(ours, [], compared=(3, 7), offered=offered) != ""
    assert differing([], theirs, compared=(3, 7), offered=offered) != ""
    assert differing([HeadSums(0, 2, b"")], theirs, compared=(3, 7), offered=offered) != ""


def test_sums_wrap_around_and_survive_the_wire() -> None:
    most = (1 << 64) - 1

    assert unpacked(packed([0, 1, most])) == [0, 1, most]
    assert added([[HeadSums(0, 0, packed([most]))], [HeadSums(0, 0, packed([2]))]]) == (HeadSums(0, 0, packed([1])),)
