"""The connector's threads survive what goes wrong in them, and do not shout about it."""

from __future__ import annotations

import pytest

from vllm_disagg.connector import guard
from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.mailbox import Mailbox
from vllm_disagg.connector.recent import RecentIds
from vllm_disagg.core.types import TransferId


def test_a_failing_item_costs_itself_only(caplog: pytest.LogCaptureFixture) -> None:
    handled: list[int] = []

    def handle(item: int) -> None:
        if item == 2:
            raise ValueError("two")
        handled.append(item)

    watch = Guard("test")
    watch.each([1, 2, 3], handle)

    assert handled == [1, 3]
    assert "two" in caplog.text


def test_a_failure_that_repeats_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PAUSE_S", 0.0)
    turns = 0

    def turn() -> bool:
        nonlocal turns
        turns += 1
        if turns < 50:
            raise OSError("again")
        return False

    watch = Guard("test")
    watch.run(turn)

    assert watch.num_failures == 49
    assert len(caplog.records) == 1


def test_a_mailbox_hands_over_in_order_and_drops_what_comes_after_its_end() -> None:
    box: Mailbox[int] = Mailbox()
    for item in range(5):
        box.put(item)

    assert box.take_all() == [0, 1, 2, 3, 4]
    assert box.take_all() == []
    box.close()
    box.close()
    box.put(6)


def test_ids_are_remembered_for_a_while() -> None:
    ids = RecentIds(keep_s=10.0)
    ids.add(TransferId("a"), now_s=0.0)
    ids.add(TransferId("b"), now_s=9.0)
    assert TransferId("a") in ids

    ids.add(TransferId("c"), now_s=11.0)

    assert TransferId("a") not in ids
    assert len(ids) == 2
