"""Which part of which read goes next. Pure: sizes in, places out."""

from __future__ import annotations

from collections.abc import Sequence


def turns(
    waiting: Sequence[Sequence[Sequence[int]]], under_way: Sequence[int], *, per_peer: int, in_all: int
) -> list[tuple[int, int]]:
    """What to start now: peers take turns, and the reads of a peer take turns, one batch each, so that a small read
    never waits for all of a large one. Whoever calls this again puts the reads and peers that were served behind the
    others.

    Args:
        waiting: for each peer and each of its reads the bytes of the batches it has not started, in their order.
        under_way: for each peer the bytes of batches that were started and have not ended.
        per_peer, in_all: the most bytes to have under way. A peer that has nothing under way, while nobody has, may
            start one batch of any size.

    Returns:
        Peer and read of each batch to start, in that order.
    """
    out, total = list(under_way), sum(under_way)
    heads = [[0] * len(reads) for reads in waiting]
    at = [0] * len(waiting)
    served: list[tuple[int, int]] = []
    able = [peer for peer, reads in enumerate(waiting) if any(reads)]
    while able:
        for peer in list(able):
            read = _next(waiting[peer], heads[peer], at[peer])
            if read is None:
                able.remove(peer)
                continue
            size = waiting[peer][read][heads[peer][read]]
            if (out[peer] and out[peer] + size > per_peer) or (total and total + size > in_all):
                able.remove(peer)
                continue
            heads[peer][read] += 1
            at[peer] = (read + 1) % len(waiting[peer])
            out[peer], total = out[peer] + size, total + size
            served.append((peer, read))
    return served


def _next(reads: Sequence[Sequence[int]], heads: Sequence[int], at: int) -> int | None:
    """The first read from `at` on, around, that has a batch left."""
    for step in range(len(reads)):
        read = (at + step) % len(reads)
        if heads[read] < len(reads[read]):
            return read
    return None
