"""Which blocks of a transfer are compared by content, and how sums of many ranks come together.

A block's KV is cut into cells: what one layer's KV cache keeps of one head. Each cell has a keyed digest of its own,
and those of all layers of one head in one block are added up, modulo 2^64. Sums do not depend on who holds which heads
and layers, so that two engines of any tensor and pipeline parallelism can be compared; a changed byte, a swapped layer,
head or block, or another transfer's cell gives another sum.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from vllm_disagg.config import VerifyMode
from vllm_disagg.core.types import BlockIds, TransferId

SAMPLED: Final = 16
"""With `sample` about one block in so many is compared, and the last one always."""

_MASK: Final = (1 << 64) - 1


class DigestJob(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Digest some blocks of one transfer.

    Attributes:
        transfer_id: whose.
        nonce: of its hold.
        places: where the blocks are in the prompt.
        blocks: the block numbers of whoever makes the digests, one tuple per group, as many as places.
    """

    transfer_id: TransferId
    nonce: str
    places: tuple[int, ...]
    blocks: BlockIds


class HeadSums(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The sums of one head, in each compared block.

    Attributes:
        group: KV cache group.
        head: the model's KV head, or the first of those that cannot be told apart.
        sums: unsigned 64-bit numbers, little-endian, in the order of `chosen`.
    """

    group: int
    head: int
    sums: bytes


def chosen(mode: VerifyMode, nonce: str, num_blocks: int, *, first: int = 0) -> tuple[int, ...]:
    """Which blocks of a prompt are compared: places in the prompt, not block numbers. Both sides find the same ones.

    Args:
        mode: how many.
        nonce: of the hold, so that each transfer has others.
        num_blocks: blocks of the whole prompt.
        first: those before it are not fetched.
    """
    if mode == "off":
        return ()
    places = range(first, num_blocks)
    if mode == "full":
        return tuple(places)
    return tuple(place for place in places if place == num_blocks - 1 or _lot(nonce, place) % SAMPLED == 0)


def added(parts: Iterable[Sequence[HeadSums]]) -> tuple[HeadSums, ...]:
    """The sums of ranks that hold different layers of the same heads: stage by stage of one pipeline."""
    totals: dict[tuple[int, int], list[int]] = {}
    for part in parts:
        for item in part:
            numbers, known = unpacked(item.sums), totals.get((item.group, item.head))
            totals[item.group, item.head] = (
                numbers if known is None else [(a + b) & _MASK for a, b in zip(known, numbers, strict=True)]
            )
    return tuple(HeadSums(group, head, packed(sums)) for (group, head), sums in sorted(totals.items()))


def differing(
    ours: Sequence[HeadSums], theirs: Sequence[HeadSums], *, compared: Sequence[int], offered: Sequence[int]
) -> str:
    """Where two engines' sums differ: a text for the log, empty if nowhere.

    Args:
        ours: of what was read.
        theirs: of what was to be read; may tell of more heads and more blocks.
        compared: places of the blocks that `ours` are about.
        offered: places of the blocks that `theirs` are about.
    """
    known = {(item.group, item.head): unpacked(item.sums) for item in theirs}
    places = {place: index for index, place in enumerate(offered)}
    if not ours:
        return "nothing was compared"
    for item in ours:
        right, got = known.get((item.group, item.head)), unpacked(item.sums)
        if right is None or len(right) != len(offered) or len(got) != len(compared):
            return f"head {item.head} of group {item.group}: there is nothing to compare it with"
        for place, number in zip(compared, got, strict=True):
            if place not in places or right[places[place]] != number:
                return f"block {place} of the prompt, head {item.head} of group {item.group}"
    return ""


def packed(numbers: Sequence[int]) -> bytes:
    """Unsigned 64-bit numbers as little-endian bytes."""
    items = array("Q", numbers)
    if sys.byteorder == "big":
        items.byteswap()
    return items.tobytes()


def unpacked(raw: bytes) -> list[int]:
    """The reverse; what does not fill a number is left out."""
    items = array("Q", raw[: len(raw) // 8 * 8])
    if sys.byteorder == "big":
        items.byteswap()
    return items.tolist()


def _lot(nonce: str, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{nonce}/{place}".encode()).digest()[:8], "little")
