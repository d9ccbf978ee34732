"""Waiting counts while this process is running, and only then."""

from __future__ import annotations

from vllm_disagg.transport.patience import SLICE_S, Patience


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def turns_until_over(patience: Patience, clock: Clock, turn_s: float) -> int:
    turns = 0
    while not patience.is_over():
        clock.now_s += turn_s
        turns += 1
    return turns


def test_it_is_over_after_its_limit_of_short_turns() -> None:
    clock = Clock()

    assert turns_until_over(Patience(2.0, clock=clock), clock, 0.125) == 16


def test_a_freeze_of_any_length_counts_as_one_turn() -> None:
    clock = Clock()
    patience = Patience(2.0, clock=clock)

    clock.now_s += 3600.0

    assert not patience.is_over()
    assert turns_until_over(patience, clock, SLICE_S) == 7


def test_it_begins_anew_when_something_has_happened() -> None:
    clock = Clock()
    patience = Patience(1.0, clock=clock)
    assert turns_until_over(patience, clock, 0.25) == 4

    patience.renew()

    assert turns_until_over(patience, clock, 0.25) == 4
