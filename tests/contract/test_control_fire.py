"""The control channel against peers that send anything at all, and against strangers that fill it with connections."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.contract.control_fire import (
    GREETING_BYTES,
    OPENINGS,
    ZMTP_GREETING,
    bombard,
    greeted_in,
    send_oversized,
    strangers,
)
from tests.contract.control_harness import FINGERPRINT, KEYS, STRANGER, Decode, Prefill, engines, eventually
from vllm_disagg.connector import messages
from vllm_disagg.connector.control_server import MAX_REQUEST_BYTES
from vllm_disagg.connector.messages import Hello, Renew
from vllm_disagg.core.types import EngineId, new_transfer_id

COUNTS = [
    pytest.param(2_000, 100, id="2000-frames-100-sockets"),
    pytest.param(100_000, 1_000, id="100000-frames-1000-sockets", marks=pytest.mark.full),
]
LIMIT_S = 5.0
"""Far above what is measured, since the machine may freeze for a second."""


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    engine = Prefill()
    try:
        yield engine
    finally:
        engine.close()


def hello(prefill: Prefill) -> Hello:
    return Hello(version=messages.PROTOCOL_VERSION, engine_id=prefill.engine_id, fingerprint=FINGERPRINT)


def handshakes(prefill: Prefill, count: int = 20) -> list[float]:
    """How long that many real handshakes take, one after the other, seconds."""
    return [greeted_in(prefill.address, KEYS, hello(prefill)) for _ in range(count)]


def shown(what: str, seconds: list[float]) -> str:
    milliseconds = sorted(1000 * each for each in seconds)
    return (
        f"{what}: {len(milliseconds)} handshakes, first {1000 * seconds[0]:.1f} ms, "
        f"median {statistics.median(milliseconds):.1f} ms, slowest {milliseconds[-1]:.1f} ms"
    )


@pytest.mark.parametrize(("num_frames", "num_sockets"), COUNTS)
def test_hostile_frames_and_idle_strangers_cost_nobody_else_anything(
    prefill: Prefill, num_frames: int, num_sockets: int
) -> None:
    kept, decode = prefill.hold(), Decode()
    process = psutil.Process()
    with engines(decode):
        decode.pair_with(kept)
        handshakes(prefill, 1)
        before = process.num_fds(), threading.active_count(), prefill.control._guard.num_failures
        print(shown("at rest", handshakes(prefill)))
        with strangers(prefill.address, STRANGER, num_sockets=num_sockets, num_zmq=num_sockets // 10) as crowd:
            beside = handshakes(prefill)
            print(shown(f"beside {num_sockets} strangers", beside))
            fire = bombard(prefill.address, KEYS, prefill.engine_id, num_frames=num_frames, seed=7)
            send_oversized(prefill.address, KEYS, count=5)
            after = handshakes(prefill)
            print(shown(f"after {num_frames} frames in {fire.seconds:.1f} s beside them", after))
            crowd.listen(0.2)
        assert max(*beside, *after) < LIMIT_S
        assert fire.num_malformed > num_frames / 2
        assert prefill.control.num_bad_frames == fire.num_malformed
        assert prefill.control._guard.num_failures == before[2]  # nothing was an exception
        assert crowd.answers == []
        assert crowd.heard
        assert [told for told in crowd.heard.values() if len(told) > GREETING_BYTES] == []

        decode.expect(kept)
        decode.read_ends(kept.transfer_id)
        assert decode.reports_of(kept.transfer_id) or eventually(lambda: decode.reports_of(kept.transfer_id))
        assert decode.reports_of(kept.transfer_id)[0].result == "received"
        eventually(lambda: process.num_fds() <= before[0] + 2, "the strangers' descriptors")
        assert threading.active_count() <= before[1]


def test_a_stranger_is_told_the_same_greeting_whatever_it_says_and_nothing_else(prefill: Prefill) -> None:
    with strangers(prefill.address, STRANGER, num_sockets=2 * len(OPENINGS), num_zmq=4) as crowd:
        crowd.listen(1.0)

    assert len(crowd.heard) == 2 * len(OPENINGS)  # everyone gets at most a part of it
    greetings = {told for told in crowd.heard.values() if told}
    longest = max(greetings, key=len)
    assert len(longest) == GREETING_BYTES
    assert longest.startswith(ZMTP_GREETING) and b"CURVE" in longest
    assert all(longest.startswith(told) for told in greetings)
    assert crowd.answers == []


def test_strangers_are_put_out_when_they_have_had_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_disagg.connector.secure.HANDSHAKE_S", 0.5)
    prefill, process = Prefill(), psutil.Process()
    try:
        handshakes(prefill, 1)
        before = process.num_fds()
        with strangers(prefill.address, STRANGER, num_sockets=2 * len(OPENINGS), num_zmq=0) as crowd:
            own = len(crowd.sockets) + 5  # and what the crowd's own context takes
            eventually(lambda: process.num_fds() <= before + own, "the server's ends of their connections")
    finally:
        prefill.close()


def test_a_flood_of_requests_keeps_no_lease_alive() -> None:
    """Leases run out on time however many frames wait."""
    prefill = Prefill(lease_s=0.2)
    try:
        prefill.hold()
        begun_s = time.monotonic()
        bombard(prefill.address, KEYS, prefill.engine_id, num_frames=1_000, seed=11, peers=1)
        eventually(lambda: len(prefill.holds) == 0, "expiry")
        assert time.monotonic() - begun_s < LIMIT_S
    finally:
        prefill.close()


def test_renewals_of_many_transfers_fit_what_prefill_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = Renew(engine_id=EngineId("0" * 64), transfer_ids=(new_transfer_id(),) * messages.RENEWALS_PER_FRAME)
    assert len(messages.encode(largest)) < MAX_REQUEST_BYTES

    monkeypatch.setattr(messages, "RENEWALS_PER_FRAME", 3)
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoffs = [prefill.hold() for _ in range(8)]
        table = prefill.holds._table._held
        granted_s = {handoff.transfer_id: table[handoff.transfer_id].expires_s for handoff in handoffs}
        for handoff in handoffs:
            decode.control.announce(handoff)
        eventually(lambda: all(table[each].expires_s > granted_s[each] for each in granted_s), "renewals of all")
        for handoff in handoffs:
            decode.control.forget(handoff.transfer_id)
