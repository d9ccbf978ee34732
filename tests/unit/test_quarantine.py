"""A peer that has just failed is left alone, and found again by one request at a time."""

from __future__ import annotations

from vllm_disagg.core.quarantine import FIRST_REST_S, LAST_REST_S, PROBE_S, Quarantine
from vllm_disagg.core.types import TransferId

A, B, C = TransferId("a"), TransferId("b"), TransferId("c")


def resting(now_s: float = 0.0) -> Quarantine:
    standing = Quarantine()
    assert standing.failed(A, timed_out=True, now_s=now_s)
    return standing


def test_a_single_failure_that_cost_no_time_changes_nothing() -> None:
    standing = Quarantine()

    assert not standing.failed(A, timed_out=False, now_s=0.0)
    assert standing.admits(B, now_s=0.0)


def test_two_in_a_row_make_it_rest() -> None:
    standing = Quarantine()
    standing.failed(A, timed_out=False, now_s=0.0)

    assert standing.failed(B, timed_out=False, now_s=0.0)
    assert not standing.admits(C, now_s=0.5)


def test_a_good_read_between_two_bad_ones_forgives() -> None:
    standing = Quarantine()
    standing.failed(A, timed_out=False, now_s=0.0)
    standing.proven()

    assert not standing.failed(B, timed_out=False, now_s=0.0)


def test_one_timeout_is_enough() -> None:
    assert not resting().admits(B, now_s=FIRST_REST_S - 0.01)


def test_after_the_rest_one_request_probes_and_the_others_are_not_tried() -> None:
    standing = resting()

    assert standing.admits(B, now_s=FIRST_REST_S)
    assert not standing.admits(C, now_s=FIRST_REST_S)
    assert standing.admits(B, now_s=FIRST_REST_S)


def test_a_proven_probe_ends_it() -> None:
    standing = resting()
    standing.admits(B, now_s=FIRST_REST_S)
    standing.proven()

    assert standing.admits(C, now_s=FIRST_REST_S)


def test_each_failed_probe_doubles_the_rest_up_to_a_limit() -> None:
    standing, now_s, rests = resting(), 0.0, []
    for number in range(8):
        assert standing.rests_until_s is not None
        rests.append(standing.rests_until_s - now_s)
        now_s = standing.rests_until_s
        probe = TransferId(str(number))
        assert standing.admits(probe, now_s=now_s)
        assert standing.failed(probe, timed_out=False, now_s=now_s)

    assert rests == [1.0, 2.0, 4.0, 8.0, 16.0, LAST_REST_S, LAST_REST_S, LAST_REST_S]


def test_reads_that_were_under_way_add_nothing() -> None:
    standing = resting()

    assert not standing.failed(B, timed_out=True, now_s=0.5)
    assert standing.rests_until_s == FIRST_REST_S


def test_a_probe_that_says_nothing_is_followed_by_another() -> None:
    standing = resting()
    standing.admits(B, now_s=FIRST_REST_S)
    standing.undecided(B)

    assert standing.admits(C, now_s=FIRST_REST_S)


def test_a_probe_that_waits_too_long_for_room_is_followed_by_another() -> None:
    standing = resting()
    standing.admits(B, now_s=FIRST_REST_S)

    assert standing.admits(C, now_s=FIRST_REST_S + PROBE_S)
    assert not standing.admits(B, now_s=FIRST_REST_S + PROBE_S)
