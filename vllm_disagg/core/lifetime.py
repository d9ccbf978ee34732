"""The life of a request that is handed over: its states on each side, and every way from one to the next.

The two tables are the only place that knows them. Both sides ask them for each step (`Lives.step`), the metric
`vllm_disagg_kv_transitions_total` counts by them, and `docs/transfer.md` draws them. What is not in a table does not
happen: an event that comes in the wrong state is logged and counted, and changes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

logger = logging.getLogger(__name__)


class State(StrEnum):
    """Where a request is on one side. The first three are prefill's, the next four decode's; both have the ends."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    HELD = "held"
    QUEUED_ON_DECODE = "queued_on_decode"
    RECEIVING = "receiving"
    RECEIVED = "received"
    RUNNING = "running"
    RELEASED = "released"
    EXPIRED = "expired"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDS: Final = frozenset({State.RELEASED, State.EXPIRED, State.FAILED, State.CANCELLED})
"""Nothing of the request's KV is kept on this side any more. On decode, a request that goes on computes its prompt."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One step. `before` is None where a life begins; `meaning` says what has happened, for the docs."""

    before: State | None
    event: str
    after: State
    meaning: str

    @property
    def label(self) -> str:
        """Its name in the metrics: the state it leaves and the event."""
        return f"{self.before or 'new'}.{self.event}"


PREFILL: Final = (
    Transition(None, "arrived", State.QUEUED, "a prompt came whose KV is wanted elsewhere"),
    Transition(State.QUEUED, "scheduled", State.PREFILLING, "its blocks are reserved, its first tokens computed"),
    Transition(State.QUEUED, "client_left", State.CANCELLED, "aborted before a token was computed"),
    Transition(State.QUEUED, "not_kept", State.FAILED, "vLLM ended it without computing it"),
    Transition(State.PREFILLING, "client_left", State.CANCELLED, "aborted before its prompt was complete"),
    Transition(State.PREFILLING, "not_kept", State.FAILED, "nothing that could be handed over under its id"),
    Transition(State.PREFILLING, "refused", State.CANCELLED, "its release had come before its end, or its id is taken"),
    Transition(State.PREFILLING, "granted", State.HELD, "its prompt is complete; the answer carries the handoff"),
    Transition(State.HELD, "renewed", State.HELD, "decode still wants it"),
    Transition(State.HELD, "released", State.RELEASED, "decode has read it, or wants it no more"),
    Transition(State.HELD, "forbidden", State.CANCELLED, "the proxy said that the client had left"),
    Transition(State.HELD, "expired", State.EXPIRED, "nobody renewed it for a lease, or it reached the cap"),
    Transition(State.HELD, "reset", State.FAILED, "the cache was reset: its content is not right any more"),
)
"""Prefill's side."""

DECODE: Final = (
    Transition(None, "accepted", State.QUEUED_ON_DECODE, "a request came with a genuine handoff for its own prompt"),
    Transition(None, "refused", State.FAILED, "its handoff is not genuine, not its own, or was used before"),
    Transition(State.QUEUED_ON_DECODE, "reserved", State.RECEIVING, "there is room: blocks are reserved, reads begin"),
    Transition(State.QUEUED_ON_DECODE, "not_needed", State.RUNNING, "all but its last token is cached here already"),
    Transition(State.QUEUED_ON_DECODE, "declined", State.FAILED, "its prefill instance cannot be read from now"),
    Transition(State.QUEUED_ON_DECODE, "client_left", State.CANCELLED, "aborted while it waited for room"),
    Transition(State.RECEIVING, "proven", State.RECEIVED, "all bytes are here, and were held until they were"),
    Transition(State.RECEIVING, "lease_expired", State.EXPIRED, "prefill had let the blocks go"),
    Transition(State.RECEIVING, "failed", State.FAILED, "the read failed, took too long, or was not proven"),
    Transition(State.RECEIVING, "not_needed", State.RUNNING, "fetched early, and vLLM went on without waiting"),
    Transition(State.RECEIVING, "client_left", State.CANCELLED, "aborted while its KV was on its way"),
    Transition(State.RECEIVED, "scheduled", State.RUNNING, "its last prompt token is computed, then it generates"),
    Transition(State.RECEIVED, "not_needed", State.RUNNING, "fetched early, and meanwhile cached here"),
    Transition(State.RECEIVED, "declined", State.FAILED, "fetched early, and its blocks cannot become the request's"),
    Transition(State.RECEIVED, "client_left", State.CANCELLED, "aborted before its first step"),
    Transition(State.RUNNING, "finished", State.RELEASED, "answered; its blocks are free"),
    Transition(State.RUNNING, "client_left", State.CANCELLED, "aborted while it generated"),
    Transition(
        State.RUNNING, "preempted", State.RELEASED, "its blocks were needed; it is computed here when it returns"
    ),
)
"""Decode's side."""


class Lives:
    """Takes every step of one side's requests by its table, and counts them. Any thread may call it.

    Args:
        table: `PREFILL` or `DECODE`.
    """

    def __init__(self, table: Sequence[Transition]) -> None:
        self._table = {(item.before, item.event): item for item in table}
        self._lock = threading.Lock()
        self._taken: Counter[Transition] = Counter()
        self.num_unexpected = 0

    def begin(self, event: str) -> State:
        """The first state of a life."""
        return self._take(self._table[None, event])

    def step(self, state: State, event: str) -> State:
        """The state that follows. An event that cannot come in this state is logged, counted, and changes nothing:
        in the engine's loop a mistake of ours must cost as little as it can."""
        transition = self._table.get((state, event))
        if transition is None:
            self.num_unexpected += 1
            logger.error("lifetime.unexpected state=%s event=%s: ignored", state, event)
            return state
        return self._take(transition)

    def take(self) -> Counter[Transition]:
        """How often each step was taken since the last call."""
        with self._lock:
            taken, self._taken = self._taken, Counter()
        return taken

    def _take(self, transition: Transition) -> State:
        with self._lock:
            self._taken[transition] += 1
        return transition.after


def by_event(taken: Counter[Transition], events: Iterable[str], *, before: Iterable[State]) -> dict[str, int]:
    """Sum the steps that left one of these states, by event; only events that came."""
    states, wanted, found = frozenset(before), frozenset(events), Counter[str]()
    for transition, count in taken.items():
        if transition.before in states and transition.event in wanted:
            found[transition.event] += count
    return dict(found)
