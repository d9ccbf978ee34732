"""The tables of lifetimes are machines: every state is reached, every life ends, and a wrong event changes nothing."""

from __future__ import annotations

import pytest

from vllm_disagg.core.lifetime import DECODE, ENDS, PREFILL, Lives, State, Transition

TABLES = pytest.mark.parametrize("table", [PREFILL, DECODE], ids=["prefill", "decode"])


@TABLES
def test_an_event_leads_to_one_state(table: tuple[Transition, ...]) -> None:
    assert len({(step.before, step.event) for step in table}) == len(table)


@TABLES
def test_every_life_begins_and_can_end_from_every_state(table: tuple[Transition, ...]) -> None:
    reached, ending = {step.after for step in table if step.before is None}, set(ENDS)
    for _ in table:
        reached |= {step.after for step in table if step.before in reached}
        ending |= {step.before for step in table if step.after in ending and step.before is not None}

    assert {step.before for step in table} - {None} <= reached
    assert reached - ENDS <= ending
    assert not any(step.before in ENDS for step in table), "nothing follows an end"


def test_the_tables_have_every_state() -> None:
    assert {step.after for step in (*PREFILL, *DECODE)} == set(State)


@TABLES
def test_a_client_may_leave_in_every_state(table: tuple[Transition, ...]) -> None:
    living = {step.before for step in table} - {None}
    leaving = {step.before for step in table if step.event in ("client_left", "forbidden")}

    assert leaving == living


def test_steps_are_counted_until_they_are_taken() -> None:
    lives = Lives(PREFILL)
    state = lives.step(lives.begin("arrived"), "scheduled")

    assert state is State.PREFILLING
    assert {step.label: count for step, count in lives.take().items()} == {"new.arrived": 1, "queued.scheduled": 1}
    assert not lives.take()


def test_an_event_in_the_wrong_state_changes_nothing() -> None:
    lives = Lives(DECODE)

    assert lives.step(State.RELEASED, "proven") is State.RELEASED
    assert lives.num_unexpected == 1
    assert not lives.take()
