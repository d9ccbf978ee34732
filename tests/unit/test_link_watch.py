"""When a link counts as standing still, and when it is only slow, idle, or watched by a host that stood still."""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec")

from vllm_disagg.connector.link_watch import SLOWEST_BYTES_PER_S, LinkWatch
from vllm_disagg.transport.base import Movement, PeerName

PEER, OTHER = PeerName("prefill/0"), PeerName("prefill/1")
LIMIT_S, STEP_S = 2.0, 0.05


class Time:
    def __init__(self) -> None:
        self.now_s = 10.0
        self.watch = LinkWatch(LIMIT_S, clock=lambda: self.now_s)

    def passes(self, seconds: float, movement: Movement, peer: PeerName = PEER) -> list[int]:
        """Look at it all the time. What the looks have told, without the zeros."""
        told = []
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            told.append(self.watch.look(peer, movement))
        return [limits for limits in told if limits]


def moved(number: int, under_way: int = 1000) -> Movement:
    return Movement(num_arrived=number, bytes_under_way=under_way)


def test_nothing_that_comes_for_a_limit_is_told_once_per_limit() -> None:
    time = Time()

    assert time.passes(LIMIT_S - 0.2, moved(5)) == []
    assert not time.watch.stands_still(PEER)
    assert time.passes(0.4, moved(5)) == [1]
    assert time.watch.stands_still(PEER)
    assert time.passes(2 * LIMIT_S, moved(5)) == [2, 3]


def test_any_read_that_gets_on_is_a_sign_of_life() -> None:
    time = Time()

    for number in range(10):
        assert time.passes(LIMIT_S - 0.2, moved(number)) == []


def test_one_with_nothing_under_way_does_not_stand_still() -> None:
    time = Time()

    assert time.passes(10 * LIMIT_S, moved(0, under_way=0)) == []
    assert time.passes(LIMIT_S - 0.2, moved(0)) == []


def test_peers_are_judged_one_by_one() -> None:
    time = Time()
    told = []
    for number in range(round(1.5 * LIMIT_S / STEP_S)):
        time.now_s += STEP_S
        told.append((time.watch.look(PEER, moved(0)), time.watch.look(OTHER, moved(number))))

    assert (1, 0) in told
    assert not any(other for _, other in told)


def test_a_slow_link_gets_the_time_that_its_bytes_need() -> None:
    time = Time()
    seconds = 8.0

    assert time.passes(seconds - 0.2, moved(0, under_way=int(seconds * SLOWEST_BYTES_PER_S))) == []
    assert time.passes(0.4, moved(0, under_way=int(seconds * SLOWEST_BYTES_PER_S))) == [1]


def test_a_host_that_stood_still_blames_no_link() -> None:
    time = Time()
    assert time.passes(1.0, moved(0)) == []

    time.now_s += 3600.0

    assert time.passes(0.5, moved(0)) == []


def test_a_new_link_begins_anew() -> None:
    time = Time()
    assert time.passes(LIMIT_S + 0.2, moved(0)) == [1]

    time.watch.forget(PEER)

    assert not time.watch.stands_still(PEER)
    assert time.passes(LIMIT_S + 0.2, moved(0)) == [1]


def test_looks_are_seldom() -> None:
    time = Time()

    assert time.watch.is_due
    assert not time.watch.is_due
    time.now_s += 1.0
    assert time.watch.is_due
