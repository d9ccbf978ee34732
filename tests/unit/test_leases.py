"""Holds on prefill: granted, renewed, released, expired, forbidden."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.connector.holds import Holds
from vllm_disagg.core.lease import Lease, LeaseTable
from vllm_disagg.core.types import TransferId

A, B = TransferId("a"), TransferId("b")
NONCE = "once"
BLOCKS = ((3, 4, 5),)


def make_lease(*, expires_s: float, cap_s: float = 300.0) -> Lease:
    return Lease(transfer_id=A, nonce=NONCE, block_ids=BLOCKS, granted_s=0.0, expires_s=expires_s, cap_s=cap_s)


def make_table() -> LeaseTable:
    return LeaseTable(lease_s=30.0, cap_s=300.0)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_holds(clock: Clock) -> tuple[Holds, list[None]]:
    wakes: list[None] = []
    return Holds(lease_s=30.0, cap_s=300.0, on_freed=lambda: wakes.append(None), clock=clock), wakes


def test_late_renewal_never_shortens_a_lease() -> None:
    lease = make_lease(expires_s=30.0)

    assert lease.renewed(now_s=5.0, extension_s=20.0).expires_s == 30.0
    assert lease.renewed(now_s=15.0, extension_s=20.0).expires_s == 35.0


def test_no_renewal_passes_the_cap() -> None:
    assert make_lease(expires_s=290.0).renewed(now_s=299.0, extension_s=30.0).expires_s == 300.0


def test_a_released_hold_was_held_until_then() -> None:
    table = make_table()
    table.grant(A, NONCE, BLOCKS, now_s=0.0)

    assert table.release(A, NONCE) is not None
    assert table.release(A, NONCE) is None


def test_an_expired_hold_cannot_be_released_or_renewed() -> None:
    table = make_table()
    table.grant(A, NONCE, BLOCKS, now_s=0.0)

    assert [lease.transfer_id for lease in table.expire(now_s=30.0)] == [A]
    assert table.release(A, NONCE) is None
    assert not table.renew(A, now_s=30.0)


def test_a_hold_whose_time_is_over_is_not_renewed_before_it_is_collected() -> None:
    table = make_table()
    table.grant(A, NONCE, BLOCKS, now_s=0.0)

    assert not table.renew(A, now_s=31.0)
    assert len(table.expire(now_s=31.0)) == 1


def test_a_transfer_is_granted_once() -> None:
    table = make_table()

    assert table.grant(A, NONCE, BLOCKS, now_s=0.0) is not None
    assert table.grant(A, NONCE, BLOCKS, now_s=1.0) is None


def test_an_earlier_handoff_cannot_release_a_later_hold_of_the_same_transfer() -> None:
    table = make_table()
    table.grant(A, "first", BLOCKS, now_s=0.0)
    table.release(A, "first")
    table.grant(A, "second", ((8,),), now_s=1.0)

    assert table.release(A, "first") is None
    assert table.release(A, "second") is not None


def test_refusals_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_disagg.core.lease._MAX_FORBIDDEN", 2)
    table = make_table()
    for name in "abc":
        table.forbid(TransferId(name), now_s=0.0)

    assert table.grant(A, NONCE, BLOCKS, now_s=1.0) is not None
    assert table.grant(B, NONCE, BLOCKS, now_s=1.0) is None


def test_a_reset_cache_ends_every_hold() -> None:
    holds, wakes = make_holds(Clock())
    holds.grant(A, NONCE, BLOCKS)

    holds.reset()

    assert not holds.release(A, NONCE)
    assert holds.take_freed() == [BLOCKS]
    assert len(wakes) == 1


def test_a_client_that_left_during_its_prefill_leaves_no_hold() -> None:
    table = make_table()

    assert table.forbid(A, now_s=0.0) is None
    assert table.grant(A, NONCE, BLOCKS, now_s=5.0) is None
    assert len(table) == 0


def test_refusals_are_forgotten_after_the_cap() -> None:
    table = make_table()
    table.forbid(A, now_s=0.0)

    assert table.next_expiry_s() == 300.0
    table.expire(now_s=300.0)
    assert table.next_expiry_s() is None


def test_usage_counts_what_is_held() -> None:
    table = make_table()
    table.grant(A, NONCE, BLOCKS, now_s=0.0)
    table.grant(B, NONCE, ((7,),), now_s=4.0)

    assert (len(table), table.num_blocks, table.oldest_age_s(10.0)) == (2, 4, 10.0)


def test_blocks_of_a_hold_are_given_back_exactly_once_whatever_ends_it() -> None:
    clock = Clock()
    holds, wakes = make_holds(clock)
    holds.grant(A, NONCE, BLOCKS)
    holds.grant(B, NONCE, ((7,),))

    assert holds.release(A, NONCE)
    assert not holds.release(A, NONCE)
    assert holds.forbid(B)
    assert not holds.forbid(B)

    assert holds.take_freed() == [BLOCKS, ((7,),)]
    assert holds.take_freed() == []
    assert len(wakes) == 2
    labels = {transition.label: count for transition, count in holds.lives.take().items()}
    assert labels == {"prefilling.granted": 2, "held.released": 1, "held.forbidden": 1}


def test_expiry_frees_and_wakes() -> None:
    clock = Clock()
    holds, wakes = make_holds(clock)
    holds.grant(A, NONCE, BLOCKS)
    assert holds.seconds_to_expiry() == 30.0

    clock.now_s = 30.0
    assert holds.expire() == 1

    assert holds.has_freed
    assert len(wakes) == 1
    assert holds.seconds_to_expiry() is None


@given(st.lists(st.tuples(st.sampled_from("gnrfe"), st.integers(0, 3), st.floats(0, 50)), max_size=60))
def test_every_granted_hold_is_freed_at_most_once_and_lives_no_longer_than_the_cap(
    story: list[tuple[str, int, float]],
) -> None:
    clock = Clock()
    holds, _ = make_holds(clock)
    granted, freed = 0, 0
    for index, (event, who, wait_s) in enumerate(story):
        clock.now_s += wait_s
        transfer_id = TransferId(str(who))
        if event == "g":
            granted += holds.grant(transfer_id, NONCE, ((index,),))
        elif event == "n":
            holds.renew([transfer_id])
        elif event == "r":
            holds.release(transfer_id, NONCE)
        elif event == "f":
            holds.forbid(transfer_id)
        else:
            holds.expire()
            assert holds.usage()[2] < 300.0
        freed += len(holds.take_freed())
    clock.now_s += 301.0
    holds.expire()
    assert freed + len(holds.take_freed()) == granted
