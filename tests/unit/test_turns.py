"""Batches of reads: bounded, in order, and no read waits for all of another."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.transport.turns import turns

sizes = st.lists(st.lists(st.lists(st.integers(1, 40), max_size=6), max_size=4), max_size=4)


@given(waiting=sizes, data=st.data(), per_peer=st.integers(1, 80), in_all=st.integers(1, 160))
def test_turns_are_bounded_fair_and_leave_nothing_that_fits(
    waiting: list[list[list[int]]], data: st.DataObject, per_peer: int, in_all: int
) -> None:
    under_way = [data.draw(st.integers(0, per_peer)) for _ in waiting]

    served = turns(waiting, under_way, per_peer=per_peer, in_all=in_all)

    out, left = list(under_way), [[list(read) for read in reads] for reads in waiting]
    for peer, read in served:
        size = left[peer][read].pop(0)  # raises where a read was served more often than it has batches
        assert not out[peer] or out[peer] + size <= per_peer
        assert not sum(out) or sum(out) + size <= in_all
        out[peer] += size
    counts = Counter(served)
    for peer, reads in enumerate(waiting):
        for read, batches in enumerate(reads):
            for other in range(len(reads)):
                # Who still has something waiting is at most one turn behind another.
                assert counts[peer, read] == len(batches) or counts[peer, other] <= counts[peer, read] + 1
    if not sum(out):
        assert not any(batches for reads in waiting for batches in reads)


def test_a_small_read_is_not_stuck_behind_a_huge_one() -> None:
    assert turns([[[16] * 100, [1]]], [0], per_peer=64, in_all=128) == [(0, 0), (0, 1), (0, 0), (0, 0)]


def test_peers_take_turns_within_the_common_bound() -> None:
    assert turns([[[30] * 9], [[30] * 9]], [0, 0], per_peer=64, in_all=100) == [(0, 0), (1, 0), (0, 0)]


def test_one_batch_of_any_size_may_start_where_nothing_is_under_way() -> None:
    assert turns([[[500, 1]]], [0], per_peer=64, in_all=128) == [(0, 0)]
    assert turns([[[500]]], [1], per_peer=64, in_all=128) == []
