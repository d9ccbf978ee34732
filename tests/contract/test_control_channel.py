"""The control channel between prefill and decode, over real sockets."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import msgspec
import pytest
import zmq

from tests.contract.control_harness import (
    BLOCKS,
    FINGERPRINT,
    KEYS,
    STRANGER,
    WAIT_S,
    Decode,
    Prefill,
    engines,
    eventually,
    free_port,
)
from vllm_disagg.connector import messages
from vllm_disagg.connector.control_server import DRAIN_GRACE_S, PrefillControl
from vllm_disagg.connector.messages import (
    BeginRead,
    CancelRead,
    ConnectPeer,
    DisconnectPeer,
    PeerState,
    Progress,
    ReadEnded,
    RebuildLinks,
    Release,
    Released,
)
from vllm_disagg.connector.pull import Drained, Settled
from vllm_disagg.connector.secure import client_socket, server_socket, start_authenticator
from vllm_disagg.connector.tally import LATE_READS, MAX_LABELS, OTHER, Tally
from vllm_disagg.core.handoff import HANDOFF_VERSION, Handoff
from vllm_disagg.core.types import EngineId, TransferId, new_nonce, new_transfer_id
from vllm_disagg.core.verify import DigestJob, HeadSums, packed
from vllm_disagg.errors import ConfigError


def changed(handoff: Handoff, **fields: Any) -> Handoff:
    return Handoff(**{**{field: getattr(handoff, field) for field in handoff.__struct_fields__}, **fields})


def test_a_read_is_received_only_after_prefill_has_confirmed_the_hold() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        decode.expect(handoff)
        decode.read_ends(handoff.transfer_id)

        settled: Settled = decode.report(Settled)

        assert (settled.result, settled.num_bytes, settled.num_descriptors, settled.draining) == (
            "received",
            100,
            2,
            False,
        )
        assert prefill.holds.take_freed() == [BLOCKS]


def test_all_ranks_must_have_read() -> None:
    prefill, decode = Prefill(ranks=2), Decode(ranks=2)
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        decode.expect(handoff)
        decode.read_ends(handoff.transfer_id, rank=0)
        decode.workers[1].wait_for(ConnectPeer)
        assert len(prefill.holds) == 1

        decode.read_ends(handoff.transfer_id, rank=1)

        assert decode.report(Settled).num_bytes == 200


def test_data_of_an_expired_lease_is_dropped() -> None:
    prefill, decode = Prefill(lease_s=0.05), Decode()
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        eventually(lambda: len(prefill.holds) == 0, "expiry")
        decode.expect(handoff)
        decode.read_ends(handoff.transfer_id)

        settled: Settled = decode.report(Settled)

        assert (settled.result, settled.cause) == ("failed", "lease_expired")


def test_a_read_that_ends_after_the_lease_is_dropped_and_counted() -> None:
    prefill, decode = Prefill(lease_s=0.2), Decode()
    with engines(decode, prefill):
        handoff = changed(prefill.hold(), lease_s=600.0)  # decode renews it too late
        decode.pair_with(handoff)
        decode.expect(handoff)
        eventually(lambda: len(prefill.holds) == 0, "expiry")
        decode.read_ends(handoff.transfer_id)

        settled: Settled = decode.report(Settled)

        assert (settled.result, settled.cause) == ("failed", "lease_expired")
        assert decode.control.tally.take() == {(LATE_READS, ""): 1}


def test_renewals_keep_a_lease_alive_while_decode_waits() -> None:
    prefill, decode = Prefill(lease_s=0.4), Decode()
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        begun_s = time.monotonic()
        eventually(lambda: time.monotonic() - begun_s > 1.0, "a second")
        assert len(prefill.holds) == 1

        decode.control.forget(handoff.transfer_id)

        eventually(lambda: len(prefill.holds) == 0, "release")


def test_a_failed_read_fails_its_request_and_releases_the_lease() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        decode.expect(handoff)
        decode.read_ends(handoff.transfer_id, error="link down")

        settled: Settled = decode.report(Settled)

        assert (settled.result, settled.cause, settled.draining) == ("failed", "transport", False)
        eventually(lambda: len(prefill.holds) == 0, "release")


def test_a_frozen_read_is_given_up_at_the_deadline_and_its_blocks_stay_out_of_use_until_it_is_quiet() -> None:
    prefill, decode = Prefill(), Decode(pull_timeout_s=0.1)
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        decode.expect(handoff)

        settled: Settled = decode.report(Settled)
        assert (settled.result, settled.cause, settled.draining) == ("failed", "pull_timeout", True)
        assert decode.workers[0].wait_for(CancelRead).transfer_id == handoff.transfer_id
        assert decode.reports_of(handoff.transfer_id) == [settled]

        decode.read_ends(handoff.transfer_id, error="cancelled")

        assert decode.report(Drained).transfer_id == handoff.transfer_id


def test_a_read_that_succeeds_after_it_was_given_up_is_not_used() -> None:
    prefill, decode = Prefill(), Decode(pull_timeout_s=0.1)
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        decode.expect(handoff)
        decode.report(Settled)
        decode.read_ends(handoff.transfer_id)

        decode.report(Drained)

        assert [type(item) for item in decode.reports_of(handoff.transfer_id)] == [Settled, Drained]


@pytest.mark.parametrize("when", ["announced", "reading", "read"])
def test_a_client_that_leaves_frees_both_sides(when: str) -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        if when == "announced":
            decode.control.forget(handoff.transfer_id)
        else:
            decode.expect(handoff)
            decode.control.cancel(handoff.transfer_id)
            assert decode.report(Settled).result == "cancelled"
            decode.read_ends(handoff.transfer_id, error="cancelled" if when == "reading" else "")
            decode.report(Drained)
        eventually(lambda: len(prefill.holds) == 0, "release")


def read_of(handoff: Handoff) -> BeginRead:
    return BeginRead(
        transfer_id=handoff.transfer_id, engine_id=handoff.engine_id, local_blocks=((1, 2),), remote_blocks=BLOCKS
    )


def test_a_read_on_arrival_is_announced_and_expected_with_its_order() -> None:
    prefill, decode = Prefill(lease_s=1.0), Decode()
    with engines(decode, prefill):
        decode.pair_with(prefill.hold())
        handoff = prefill.hold()
        decode.control.begin(handoff, read_of(handoff))
        assert decode.workers[0].wait_for(BeginRead) == read_of(handoff)

        decode.read_ends(handoff.transfer_id)

        assert decode.report(Settled).result == "received"
        assert handoff.transfer_id not in prefill.holds


def test_a_read_on_arrival_of_what_is_held_no_more_is_given_up_at_once() -> None:
    """Its handoff may have waited on its way."""
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        decode.pair_with(prefill.hold())
        handoff = prefill.hold()
        prefill.holds.forbid(handoff.transfer_id)

        decode.control.begin(handoff, read_of(handoff))

        settled = decode.report(Settled)
        assert (settled.result, settled.cause, settled.draining) == ("failed", "lease_expired", True)
        decode.workers[0].wait_for(CancelRead)
        decode.read_ends(handoff.transfer_id, error="cancelled")
        decode.report(Drained)


def test_engines_that_do_not_fit_refuse_each_other_and_name_the_factor(caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = Prefill(fingerprint={**FINGERPRINT, "dtype": "bfloat16"}), Decode()
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.control.announce(handoff)
        eventually(lambda: decode.control.readiness(handoff)[0] == "failed", "refusal")
        assert decode.control.readiness(handoff)[1] == "incompatible"
        assert "dtype is 'bfloat16' on prefill and 'float32' on decode" in caplog.text


def test_each_worker_is_told_of_all_ranks_of_prefill_however_many_there_are() -> None:
    prefill, decode = Prefill(ranks=4), Decode(ranks=2)
    with engines(decode, prefill):
        decode.pair_with(prefill.hold())

        told: list[ConnectPeer] = [worker.wait_for(ConnectPeer) for worker in decode.workers]

        assert [[rank.tp_rank for rank in message.ranks] for message in told] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(("misfit", "cause"), [(True, "incompatible"), (False, "peer_unreachable")])
def test_one_worker_that_cannot_read_is_enough_to_give_a_prefill_up(
    caplog: pytest.LogCaptureFixture, misfit: bool, cause: str
) -> None:
    prefill, decode = Prefill(), Decode(ranks=2)
    with engines(decode, prefill):
        handoff = prefill.hold()
        decode.control.announce(handoff)
        for worker in decode.workers:
            worker.wait_for(ConnectPeer)
        decode.workers[0].say(PeerState(engine_id=handoff.engine_id))
        decode.workers[1].say(PeerState(engine_id=handoff.engine_id, error="heads 4-7 are missing", misfit=misfit))

        eventually(lambda: decode.control.readiness(handoff)[0] == "failed", "refusal")

        assert decode.control.readiness(handoff)[1] == cause
        assert "heads 4-7 are missing" in caplog.text
        decode.workers[0].wait_for(DisconnectPeer)


def test_an_engine_restarted_on_the_same_port_is_not_taken_for_the_old_one() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        stale = changed(prefill.hold(), engine_id=EngineId("earlier"))
        decode.control.announce(stale)

        eventually(lambda: decode.control.readiness(stale)[0] == "failed", "refusal")

        assert decode.control.readiness(stale)[1] == "peer_lost"


def test_a_prefill_that_dies_fails_its_pulls_at_once_and_the_next_one_pairs() -> None:
    first, second, decode = Prefill(), Prefill(), Decode()
    with engines(decode, second):
        handoff = first.hold()
        decode.pair_with(handoff)
        decode.expect(handoff)
        first.close()

        settled: Settled = decode.report(Settled)
        assert (settled.result, settled.cause, settled.draining) == ("failed", "peer_lost", True)
        decode.workers[0].heard.clear()

        decode.pair_with(second.hold())


def test_an_address_where_nobody_listens_costs_the_handshake_time_only() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = changed(prefill.hold(), control=f"tcp://127.0.0.1:{free_port()}")
        decode.control.announce(handoff)
        begun_s = time.monotonic()
        while decode.control.readiness(handoff)[0] != "failed":
            assert time.monotonic() - begun_s < 6.0
            threading.Event().wait(0.01)
        assert decode.control.readiness(handoff)[1] == "handshake_timeout"


def test_workers_serve_peers_only_while_somebody_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_disagg.connector.control_server.HANDSHAKE_GRACE_S", 0.05)
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = prefill.hold()
        assert prefill.workers[0].wait_for(Progress).active
        decode.pair_with(handoff)
        decode.control.forget(handoff.transfer_id)

        eventually(lambda: [item.active for item in prefill.workers[0].hear()][-1] is False, "rest")


def test_a_peer_without_the_deployment_key_gets_no_answer() -> None:
    prefill = Prefill()
    try:
        context: zmq.Context[Any] = zmq.Context()
        link = client_socket(context, zmq.DEALER, STRANGER)
        link.connect(prefill.address)
        link.send(messages.encode(messages.Forbid(transfer_id=new_transfer_id())))
        assert link.poll(300) == 0
        context.destroy(linger=0)
    finally:
        prefill.close()


def test_malformed_frames_are_counted_and_the_next_request_is_answered() -> None:
    prefill = Prefill()
    try:
        context: zmq.Context[Any] = zmq.Context()
        link = client_socket(context, zmq.DEALER, KEYS)
        link.connect(prefill.address)
        handoff = prefill.hold()
        bad = [b"", b"\xff" * 100, b"GET / HTTP/1.1\r\n\r\n", messages.encode(["Hello", 1]), messages.encode({"a": 1})]
        for frame in [*bad, *(os.urandom(size) for size in range(1, 300))]:
            link.send(frame)
        link.send_multipart([b"two", b"frames"])
        release = Release(engine_id=prefill.engine_id, transfer_id=handoff.transfer_id, nonce=handoff.nonce)
        link.send(messages.encode(release))

        assert link.poll(2000)
        answer = messages.decode_or_none(messages.from_prefill, link.recv_multipart())

        assert answer == Released(transfer_id=handoff.transfer_id, ok=True)
        assert prefill.control.num_bad_frames == len(bad) + 300
        context.destroy(linger=0)
    finally:
        prefill.close()


def test_a_busy_port_is_a_setting_to_change() -> None:
    prefill = Prefill()
    try:
        with pytest.raises(ConfigError, match="--kv-control-port"):
            PrefillControl(
                engine_id=EngineId("x"),
                address=prefill.address,
                keys=KEYS,
                fingerprint={},
                ranks=[],
                worker_links=[],
                holds=prefill.holds,
            )
    finally:
        prefill.close()


def test_workers_serve_on_for_a_while_when_the_last_hold_has_ended() -> None:
    """A read that was given up is under way then, and where reads are emulated it ends only while its owner serves."""
    prefill = Prefill()
    try:
        handoff = prefill.hold()
        worker = prefill.workers[0]
        assert worker.wait_for(Progress).active
        ended_s = time.monotonic()
        prefill.holds.forbid(handoff.transfer_id)
        prefill.control.granted()  # any event

        eventually(lambda: Progress(active=False) in worker.hear(), "the end of serving")

        assert time.monotonic() - ended_s >= DRAIN_GRACE_S
    finally:
        prefill.close()


def test_a_nudge_tells_the_workers_once_more() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        decode.pair_with(prefill.hold())
        worker, told = prefill.workers[0], messages.LinkStalled(engine_id=prefill.engine_id, limits=1)
        before = worker.hear().count(Progress(active=True))

        decode.workers[0].say(told)

        eventually(lambda: worker.hear().count(Progress(active=True)) == before + 1, "the second order")
        assert not [item for item in decode.workers[0].hear() if isinstance(item, RebuildLinks)]

        decode.workers[0].say(messages.LinkStalled(engine_id=prefill.engine_id, limits=2))
        decode.workers[0].wait_for(RebuildLinks)


def test_both_ends_sleep_when_nothing_happens() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        decode.pair_with(handoff := prefill.hold())
        decode.control.forget(handoff.transfer_id)
        eventually(lambda: len(prefill.holds) == 0, "release")
        eventually(lambda: not prefill.control._serving, "rest")
        before_s = time.process_time()
        begun_s = time.monotonic()
        eventually(lambda: time.monotonic() - begun_s > 1.0, "a second")

        assert time.process_time() - before_s < 0.3  # one that spins uses all the time it gets


def test_a_read_that_ends_before_its_order_was_looked_at_is_not_lost() -> None:
    """Orders come by mailbox and ends of reads by socket: however fast a read is, its order counts as given first."""
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        decode.pair_with(first := prefill.hold())
        decode.control.forget(first.transfer_id)
        for _ in range(300):
            handoff = prefill.hold()
            decode.control.announce(handoff)
            decode.expect(handoff)
            decode.read_ends(handoff.transfer_id)
            eventually(
                lambda handoff=handoff: decode.reports_of(handoff.transfer_id), "report of a read that ended at once"
            )


def processor_seconds_of_half_a_second() -> float:
    begun_s, before_s = time.monotonic(), time.process_time()
    eventually(lambda: time.monotonic() - begun_s > 0.5, "half a second")
    return time.process_time() - before_s


def test_waiting_for_a_prefill_that_is_gone_costs_no_processor_time() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode):
        waiting = prefill.hold()
        decode.pair_with(waiting)
        prefill.close()
        eventually(lambda: decode.control.readiness(waiting)[0] == "failed", "the loss")
        eventually(lambda: time.monotonic() > decode.control.peers.get(waiting.engine_id).retry_at_s, "the back-off")

        assert processor_seconds_of_half_a_second() < 0.1


def test_a_prefill_that_says_nothing_is_given_up_as_a_whole_and_tried_again_later() -> None:
    """A frozen prefill: its control thread answers nothing, its sockets stay open."""
    prefill, decode = Prefill(), Decode(pull_timeout_s=0.2)
    with engines(decode, prefill):
        first, second = prefill.hold(), prefill.hold()
        decode.pair_with(first)
        decode.control.announce(second)
        prefill.control.stop()  # answers nothing from here on; a listener keeps the port, as the kernel would
        handoffs = [first, second]
        eventually(lambda: decode.control.readiness(first)[0] == "failed", "the loss")
        for handoff in handoffs:
            decode.expect(handoff)
            report: Settled = eventually(lambda handoff=handoff: decode.reports_of(handoff.transfer_id))[0]
            assert report.result == "failed"


def test_one_order_that_fails_does_not_take_the_next_ones_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff, other = prefill.hold(), prefill.hold()
        decode.pair_with(handoff)
        decode.control.announce(other)

        def broken(transfer_id: TransferId) -> None:
            raise RuntimeError("broken on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(decode.control, "_forgotten", broken)
            decode.control.forget(other.transfer_id)
        decode.expect(handoff)
        decode.read_ends(handoff.transfer_id)

        assert decode.report(Settled).result == "received"


def test_the_first_renewal_comes_at_once() -> None:
    """A request may have spent most of its lease on its way to decode."""
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        decode.pair_with(changed(prefill.hold(), lease_s=600.0))
        handoff = changed(prefill.hold(), lease_s=600.0)  # whose next renewal is due in 100 s
        table = prefill.holds._table._held
        granted_s = table[handoff.transfer_id].expires_s

        decode.control.announce(handoff)

        eventually(lambda: table[handoff.transfer_id].expires_s > granted_s, "the first renewal")


# What does not fit is refused when the engines meet.

FITTING = {
    "vllm version": "0.32.0", "model": "LlamaForCausalLM 1a", "dtype": "float32", "kv cache dtype": "auto",
    "block size": "32", "kv heads": "3", "head size": "64", "layers": "30", "speculative config": "none",
    "weights": "2b", "kv transport": "nixl", "instruction set": "amx", "kv cache layout": "LBHNC 3c",
}  # fmt: skip
MISFITS = {
    "vllm version": "0.33.0", "model": "LlamaForCausalLM 1b", "dtype": "bfloat16", "kv cache dtype": "fp8",
    "block size": "16", "kv heads": "4", "head size": "128", "layers": "16", "speculative config": "eagle x",
    "weights": "2c", "kv transport": "nccl", "instruction set": "vec", "kv cache layout": "LBNHC 3c",
    "vllm_disagg protocol": "1",
}  # fmt: skip


def refusals(control: Any) -> dict[str, float]:
    return {label: amount for (_, label), amount in control.tally.take().items()}


@pytest.mark.parametrize(("factor", "value"), MISFITS.items(), ids=lambda text: text.replace(" ", "-"))
def test_each_misfit_is_refused_at_once_by_name_on_both_sides_and_harms_nobody(
    factor: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    misfit, prefill = Prefill(fingerprint={**FITTING, factor: value}), Prefill(fingerprint=FITTING)
    decode, other = Decode(fingerprint=FITTING), Decode(fingerprint={**FITTING, factor: value})
    with engines(decode, misfit, prefill), engines(other):
        decode.pair_with(kept := prefill.hold())
        begun_s = time.monotonic()
        decode.control.announce(refused := misfit.hold())
        eventually(lambda: decode.control.readiness(refused)[0] == "failed", "refusal")
        refused_s = time.monotonic() - begun_s
        print(f"{factor}: refused in {1000 * refused_s:.1f} ms")

        assert refused_s < 5.0  # some milliseconds; the machine may freeze for a second
        assert decode.control.readiness(refused)[1] == "incompatible"
        ours = FITTING.get(factor, str(messages.PROTOCOL_VERSION))
        assert f"{factor} is {value!r} here and {ours!r} at the peer" in caplog.text  # prefill's words
        assert f"{factor} is {value!r} on prefill and {ours!r} on decode" in caplog.text
        assert refusals(decode.control) == refusals(misfit.control) == {factor: 1}

        decode.expect(kept)  # the decode engine still reads from those that fit
        decode.read_ends(kept.transfer_id)
        assert decode.report(Settled).result == "received"
        if factor in FITTING:  # and the misfit still serves its own kind
            other.pair_with(misfit.hold())


def test_another_deployment_key_is_refused_at_once_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode, stranger = Prefill(), Decode(), Decode(keys=STRANGER)
    with engines(decode, prefill), engines(stranger):
        handoff = prefill.hold()
        begun_s = time.monotonic()
        stranger.control.announce(handoff)
        eventually(lambda: stranger.control.readiness(handoff)[0] == "failed", "refusal")
        print(f"deployment key: refused in {1000 * (time.monotonic() - begun_s):.1f} ms")

        assert time.monotonic() - begun_s < 5.0
        assert stranger.control.readiness(handoff)[1] == "incompatible"
        assert "the deployment key differs" in caplog.text
        assert refusals(stranger.control) == {"deployment key": 1}
        eventually(lambda: "without this deployment's key" in caplog.text, "prefill's line")
        assert refusals(prefill.control) == {"deployment key": 1}

        decode.pair_with(handoff)


def test_what_a_peer_says_adds_only_so_many_series() -> None:
    tally = Tally()
    for number in range(MAX_LABELS + 10):
        tally.add("metric", f"label {number}")

    taken = tally.take()

    assert len(taken) == MAX_LABELS + 1
    assert taken["metric", OTHER] == 10
    assert tally.take() == {}


# Who may say what.


class Impostor:
    """A prefill engine that holds the deployment key and answers what it likes."""

    def __init__(self, engine_id: EngineId) -> None:
        self.engine_id = engine_id
        self.context: zmq.Context[Any] = zmq.Context()
        self.authenticator = start_authenticator(self.context, KEYS)
        self.router = server_socket(self.context, zmq.ROUTER, KEYS)
        self.address = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.sender = b""

    def handoff(self) -> Handoff:
        return Handoff(
            version=HANDOFF_VERSION, transfer_id=new_transfer_id(), engine_id=self.engine_id, control=self.address,
            block_ids=BLOCKS, num_tokens=40, prompt_digest=b"", lease_s=30.0, nonce=new_nonce(),
        )  # fmt: skip

    def greeted(self) -> None:
        assert self.router.poll(5000)
        self.sender, _ = self.router.recv_multipart()

    def say(self, message: messages.FromPrefill) -> None:
        self.router.send_multipart([self.sender, messages.encode(message)])

    def close(self) -> None:
        self.authenticator.stop()
        self.context.destroy(linger=0)


def test_an_engine_that_says_it_is_another_one_is_not_read_from() -> None:
    decode, impostor = Decode(), Impostor(EngineId("honest"))
    with engines(decode, impostor):
        handoff = impostor.handoff()
        decode.control.announce(handoff)
        impostor.greeted()
        impostor.say(messages.Welcome(engine_id=EngineId("another"), ranks=()))

        eventually(lambda: decode.control.readiness(handoff) == ("failed", "peer_lost"), "refusal")
        assert not [item for item in decode.workers[0].hear() if isinstance(item, ConnectPeer)]


@pytest.mark.parametrize("lie", ["released", "lost"])
def test_an_engine_has_no_say_in_transfers_of_another_one(lie: str) -> None:
    prefill, decode, impostor = Prefill(), Decode(), Impostor(EngineId("other"))
    with engines(decode, prefill, impostor):
        handoff = prefill.hold()
        decode.pair_with(handoff)
        decode.control.announce(impostor.handoff())
        impostor.greeted()
        held, asked, may_answer = prefill.holds.release, threading.Event(), threading.Event()

        def release(*hold: Any) -> bool:
            asked.set()
            assert may_answer.wait(WAIT_S)
            return held(*hold)

        def lies(message: messages.FromPrefill) -> None:
            peer = decode.control.peers.get(impostor.engine_id)
            heard_s = peer.heard_s
            impostor.say(message)
            eventually(lambda: peer.heard_s > heard_s, "the lie")

        prefill.holds.release = release  # type: ignore[method-assign]
        decode.expect(handoff)
        if lie == "lost":
            lies(messages.Renewed(engine_id=impostor.engine_id, lost=(handoff.transfer_id,)))
        decode.read_ends(handoff.transfer_id)
        assert asked.wait(WAIT_S)
        if lie == "released":
            lies(Released(transfer_id=handoff.transfer_id, ok=False))
        may_answer.set()

        assert decode.report(Settled).result == "received"


# Digests.


def digested(transfer_id: TransferId, number: int, *, error: str = "") -> messages.BlocksDigested:
    sums = () if error else (HeadSums(0, 0, packed([number, number])),)
    return messages.BlocksDigested(transfer_id=transfer_id, sums=sums, error=error)


def verified_hold(prefill: Prefill) -> Handoff:
    handoff = msgspec.structs.replace(prefill.hold(), verify="full")
    prefill.control.granted(
        DigestJob(transfer_id=handoff.transfer_id, nonce=handoff.nonce, places=(0, 1), blocks=BLOCKS)
    )
    order: messages.DigestBlocks = prefill.workers[0].wait_for(messages.DigestBlocks)
    assert order.job.blocks == BLOCKS
    return handoff


def read_with_digest(decode: Decode, handoff: Handoff, number: int) -> None:
    decode.pair_with(handoff)
    decode.expect(handoff)
    sums = (HeadSums(0, 0, packed([number, number])),)
    decode.workers[0].say(
        ReadEnded(transfer_id=handoff.transfer_id, num_bytes=100, num_descriptors=2, seconds=0.01, sums=sums)
    )


@pytest.mark.parametrize(("number", "result"), [(7, "received"), (8, "failed")])
def test_a_release_waits_for_the_digests_and_decode_compares_them(number: int, result: str) -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = verified_hold(prefill)
        read_with_digest(decode, handoff, 7)
        eventually(lambda: prefill.control._vouchers[handoff.transfer_id].asked, "the release")
        assert decode.reports_of(handoff.transfer_id) == []
        assert len(prefill.holds) == 1

        prefill.workers[0].say(digested(handoff.transfer_id, number))

        settled: Settled = decode.report(Settled)
        assert (settled.result, settled.cause) == (result, None if result == "received" else "kv_mismatch")
        assert len(prefill.holds) == 0


def test_digests_that_cannot_be_made_vouch_for_nothing() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = verified_hold(prefill)
        prefill.workers[0].say(digested(handoff.transfer_id, 0, error="no memory"))
        read_with_digest(decode, handoff, 0)

        assert decode.report(Settled).cause == "kv_mismatch"


def test_a_hold_that_ends_while_its_digests_are_made_is_not_confirmed() -> None:
    prefill, decode = Prefill(), Decode()
    with engines(decode, prefill):
        handoff = verified_hold(prefill)
        read_with_digest(decode, handoff, 7)
        eventually(lambda: prefill.control._vouchers[handoff.transfer_id].asked, "the release")
        prefill.holds.forbid(handoff.transfer_id)
        prefill.control.granted()  # any event

        assert decode.report(Settled).cause == "lease_expired"
        assert prefill.control._vouchers == {}


# Pairs whose reads fail.


def test_after_a_read_that_took_too_long_requests_are_declined_until_a_probe_is_proven() -> None:
    prefill, decode = Prefill(lease_s=1.2), Decode(pull_timeout_s=0.8)
    with engines(decode, prefill):
        first = prefill.hold()
        decode.pair_with(first)
        decode.expect(first)
        assert decode.report(Settled).cause == "pull_timeout"  # renewals are answered all the time: it is not silent
        refused = prefill.hold()
        decode.control.announce(refused)
        eventually(lambda: decode.control.readiness(refused) == ("failed", "peer_resting"), "quarantine")
        rests_until_s = decode.control.peers.get(prefill.engine_id).quarantine.rests_until_s
        eventually(lambda: time.monotonic() >= rests_until_s, "the end of its rest")

        probe, other = prefill.hold(), prefill.hold()
        decode.control.announce(probe)
        decode.control.announce(other)
        eventually(lambda: decode.control.readiness(probe)[0] == "ready", "the probe")
        eventually(lambda: decode.control.readiness(other) == ("failed", "peer_resting"), "the others' refusal")
        decode.expect(probe)
        decode.read_ends(probe.transfer_id)

        eventually(lambda: any(item.result == "received" for item in decode.reports_of(probe.transfer_id)), "the proof")
        assert decode.control.readiness(other)[0] == "ready"


def test_what_was_declined_while_a_peer_was_given_up_is_released_when_it_is_greeted_again() -> None:
    prefill, decode = Prefill(), Decode(pull_timeout_s=0.3)
    with engines(decode, prefill):
        first = prefill.hold()
        decode.pair_with(first)
        decode.expect(first)
        assert decode.report(Settled).cause == "pull_timeout"  # and nothing was heard meanwhile: the peer is given up
        declined = prefill.hold()
        decode.control.announce(declined)
        eventually(lambda: decode.control.readiness(declined)[0] == "failed", "the loss")
        decode.control.forget(declined.transfer_id)
        retry_at_s = decode.control.peers.get(prefill.engine_id).retry_at_s
        eventually(lambda: time.monotonic() >= retry_at_s, "the end of the back-off")
        assert declined.transfer_id in prefill.holds

        decode.control.announce(prefill.hold())

        eventually(lambda: declined.transfer_id not in prefill.holds, "the release")
