"""A probe of one pair, through every thread that takes part in it: the door, both control channels and both workers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import zmq

from tests.contract.control_harness import FINGERPRINT, KEYS, STRANGER, WAIT_S, eventually, free_port
from tests.contract.pair_harness import KEY, Pair, pair
from vllm_disagg.connector import messages
from vllm_disagg.connector.door import door_address
from vllm_disagg.connector.messages import OpenProbe, ProbeOpened
from vllm_disagg.connector.peer_table import MAX_INTRODUCED
from vllm_disagg.connector.probe_run import SIZES
from vllm_disagg.connector.secure import client_socket
from vllm_disagg.core.introduction import answer_challenge, make_challenge
from vllm_disagg.core.probe import PairReport, sign_order
from vllm_disagg.core.types import EngineId
from vllm_disagg.transport.base import Copy, PeerName, TransferHandle, Transport


def test_a_healthy_pair_is_measured_and_nothing_is_left_of_it() -> None:
    with pair() as engines:
        first, second = engines.probe(), engines.probe()

        for report in (first, second):
            assert (report.stage, report.cause, report.error) == ("done", "", "")
            assert report.greeting_s > 0 and len(report.round_trips_s) == 30
            assert report.lease is not None and report.lease.good
            [worker] = report.workers
            [source] = worker.sources
            assert worker.copy_bytes_per_s > 0 and (worker.error, source.error) == ("", "")
            assert source.intact
            assert [timing.copy_bytes for timing in source.reads] == list(SIZES)
            assert all(timing.seconds > 0 for timing in source.reads)
            assert max(timing.num_copies for timing in source.reads) == 1024
        assert len(engines.holds) == 0
        assert not engines.reader.cache.any() and not engines.owner.cache.any()  # the KV cache was not touched


class Spoiled:
    """A transport whose reads bring one wrong byte."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.name = inner, inner.name

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        first = copies[0]
        return self.inner.read(peer, [Copy(first.local, first.remote + 1, first.num_bytes - 1), *copies[1:]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_bytes_that_are_not_prefills_are_noticed() -> None:
    with pair(wrap=Spoiled) as engines:
        report = engines.probe()

        assert report.stage == "done" and not report.workers[0].sources[0].intact


def test_an_engine_that_does_not_fit_is_named_as_at_any_handshake() -> None:
    with pair(fingerprint={**FINGERPRINT, "dtype": "bfloat16"}) as engines:
        report = engines.probe()

        assert (report.stage, report.cause) == ("greeting", "incompatible")
        assert (report.factor, report.prefill, report.decode) == ("dtype", "float32", "bfloat16")


def test_another_run_of_the_prefill_engine_is_told_apart() -> None:
    with pair() as engines:
        report = engines.probe(engines.order(prefill_id=EngineId("earlier")))

        assert (report.stage, report.cause) == ("greeting", "peer_lost")


def test_nobody_listening_costs_the_greeting_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_disagg.connector.pair_probe.HELLO_TIMEOUT_S", 0.3)
    with pair() as engines:
        report = engines.probe(engines.order(control=f"tcp://127.0.0.1:{free_port()}"))

        assert (report.stage, report.cause) == ("greeting", "handshake_timeout")
        monkeypatch.undo()
        assert engines.probe().stage == "done"


def test_an_owner_that_answers_no_read_costs_the_limit_and_the_next_probe_is_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_disagg.connector.probe_run.RUN_LIMIT_S", 0.5)
    with pair() as engines:
        engines.owner.transport.frozen = True
        report = engines.probe()

        [source] = report.workers[0].sources
        assert "was not over" in source.error and not source.intact
        assert report.lease is not None and report.lease.good  # its control thread is well
        eventually(lambda: len(engines.holds) == 0, "the end of the hold")

        monkeypatch.undo()
        engines.owner.transport.frozen = False
        assert engines.probe().workers[0].sources[0].intact


def test_an_order_is_obeyed_once_by_the_engine_it_names_and_only_with_the_key() -> None:
    with pair() as engines:
        order = engines.order()
        assert engines.probe(order).stage == "done"

        assert "obeyed before" in engines.probe(order).error
        assert "another engine" in engines.probe(engines.order(engine_id=EngineId("other"))).error
        assert "not signed" in engines.probe(key=b"s" * 32).error
        assert "version" in engines.probe(engines.order(version=99)).error
        assert len(engines.holds) == 0


def test_probes_that_nobody_ends_are_limited_and_end_with_their_lease() -> None:
    with pair() as engines, zmq.Context() as context, client_socket(context, zmq.DEALER, KEYS) as link:
        link.connect(engines.address)
        for _ in range(100):
            link.send(messages.encode(OpenProbe(engine_id=engines.prefill_id)))
        link.send(messages.encode(OpenProbe(engine_id=EngineId("nobody"))))  # answered last
        answers = [messages.decode_or_none(messages.from_prefill, link.recv_multipart())]
        eventually(lambda: len(engines.holds) == 64, "the holds")
        while len(answers) < 65:
            assert link.poll(WAIT_S * 1000)
            answers.append(messages.decode_or_none(messages.from_prefill, link.recv_multipart()))

        assert sum(isinstance(answer, ProbeOpened) for answer in answers) == 64
        assert link.poll(100) == 0


def test_the_door_opens_to_no_stranger() -> None:
    with pair() as engines, zmq.Context() as context, client_socket(context, zmq.DEALER, STRANGER) as link:
        link.connect(door_address(engines.decode_id))
        link.send_multipart([b"probe", sign_order(engines.order(), KEY)])

        assert link.poll(300) == 0


# Introductions come through the same door.


def hand_in(engines: Pair, raw: str) -> str:
    with zmq.Context() as context, client_socket(context, zmq.DEALER, KEYS) as link:
        link.connect(door_address(engines.decode_id))
        link.send_multipart([b"introduce", raw.encode()])
        assert link.poll(WAIT_S * 1000)
        return str(msgspec.json.decode(link.recv())["outcome"])


def introduction(engines: Pair, *, key: bytes = KEY, decode: str = "", age_s: float = 0.0, control: str = "") -> str:
    challenge = make_challenge(EngineId(decode or engines.decode_id), key, now_s=time.monotonic() - age_s)
    return answer_challenge(challenge, engine_id=engines.prefill_id, control=control or engines.address, key=key)


def phase(engines: Pair) -> str:
    return engines.decode.peer_state(engines.prefill_id)[0]


def test_an_introduced_engine_is_connected_without_a_request() -> None:
    with pair() as engines:
        assert hand_in(engines, raw := introduction(engines)) == "taken"
        eventually(lambda: phase(engines) == "ready", "the connection")

        assert hand_in(engines, raw) == "reused"
        assert hand_in(engines, introduction(engines)) == "taken"  # harmless
        assert phase(engines) == "ready"
        told = {label: amount for (_, label), amount in engines.decode.tally.take().items()}
        assert told == {"taken": 2, "reused": 1}


@pytest.mark.parametrize(
    ("outcome", "how"),
    [
        ("forged", {"key": b"x" * 32}),
        ("foreign", {"decode": "an earlier run"}),
        ("expired", {"age_s": 3600.0}),
        ("expired", {"age_s": -3600.0}),
    ],
)
def test_a_bad_introduction_connects_to_nobody(outcome: str, how: dict[str, Any]) -> None:
    with pair() as engines, socket.create_server(("127.0.0.1", 0)) as canary:
        address = f"tcp://127.0.0.1:{canary.getsockname()[1]}"
        assert hand_in(engines, introduction(engines, control=address, **how)) == outcome
        assert hand_in(engines, introduction(engines)) == "taken"  # in the same order on the control thread
        eventually(lambda: phase(engines) == "ready", "the connection to the right one")

        canary.setblocking(False)
        with pytest.raises(BlockingIOError):
            canary.accept()


def test_a_flood_of_introductions_is_bounded_and_the_next_good_one_is_taken() -> None:
    with pair() as engines, zmq.Context() as context, client_socket(context, zmq.DEALER, KEYS) as link:
        link.connect(door_address(engines.decode_id))
        for number in range(2000):
            link.send_multipart([b"introduce", b"x" * (number % 4000)])
        for number in range(MAX_INTRODUCED + 50):
            challenge = make_challenge(engines.decode_id, KEY, now_s=time.monotonic())
            raw = answer_challenge(challenge, engine_id=EngineId(f"no {number}"), control="tcp://127.0.0.1:1", key=KEY)
            link.send_multipart([b"introduce", raw.encode()])
        for _ in range(2000 + MAX_INTRODUCED + 50):
            assert link.poll(WAIT_S * 1000)
            link.recv()

        eventually(lambda: engines.decode.peers.num_known == MAX_INTRODUCED, "as many as may be known")
        assert hand_in(engines, introduction(engines)) == "full"
        engines.decode.pair(engines.prefill_id, engines.address)  # as a request does
        eventually(lambda: phase(engines) == "ready", "a request's own engine")


def test_a_probe_under_way_does_not_keep_introductions_waiting() -> None:
    with pair() as engines, zmq.Context() as context, client_socket(context, zmq.DEALER, KEYS) as link:
        begun, may_end = threading.Event(), threading.Event()
        engines.door._probe = lambda raw: begun.set() or (may_end.wait(WAIT_S) and PairReport(stage="done"))  # type: ignore
        link.connect(door_address(engines.decode_id))
        link.send_multipart([b"probe", b""])
        assert begun.wait(WAIT_S)

        assert hand_in(engines, introduction(engines)) == "taken"

        may_end.set()
        assert link.poll(WAIT_S * 1000)
