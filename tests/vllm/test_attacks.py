"""What somebody can do who reaches an engine's API but has not got the key, or has an old handoff: nothing but cost
himself a prefill. See `docs/transfer.md`."""

from __future__ import annotations

import base64
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

from tests.vllm.in_process import Pair, prompt
from vllm_disagg.connector import peers
from vllm_disagg.core.handoff import Handoff, seal, unseal
from vllm_disagg.core.types import EngineId, new_transfer_id
from vllm_disagg.testing.leaks import assert_no_leaks

pytestmark = pytest.mark.vllm

TOKENS = prompt(70, seed=1)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    engines = Pair(tmp_path)
    yield engines
    engines.prefill.scheduler.connector.reset_cache()  # holds that an attack has left to their lease
    engines.settle()
    assert_no_leaks(engines.decode.scheduler)
    assert_no_leaks(engines.prefill.scheduler)
    engines.close()


@pytest.fixture
def canary() -> Iterator[socket.socket]:
    """Somebody who notices whoever connects."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def address_of(canary: socket.socket) -> str:
    return "tcp://127.0.0.1:{1}".format(*canary.getsockname())


def was_visited(canary: socket.socket, *, within_s: float = 0.2) -> bool:
    return bool(select.select([canary], [], [], within_s)[0])


def signed(pair: Pair, params: dict[str, Any], **values: Any) -> Handoff:
    told: Handoff = msgspec.structs.replace(unseal(params["handoff"], pair.decode.scheduler.connector._key), **values)
    return told


def with_old_signature(handoff: str, told: Handoff) -> str:
    mac = base64.urlsafe_b64decode(handoff)[:32]
    return base64.urlsafe_b64encode(mac + msgspec.msgpack.encode(told)).decode()


@pytest.mark.parametrize("attack", ["another signature", "the old signature", "beside the handoff", "no handoff"])
def test_no_address_of_a_request_is_ever_connected_to(pair: Pair, canary: socket.socket, attack: str) -> None:
    params = pair.prefilled(TOKENS)
    there = {"control": address_of(canary), "engine_id": EngineId("new")}
    told = signed(pair, params, **there)
    plain = {
        **there, "remote_host": "127.0.0.1", "remote_port": canary.getsockname()[1], "remote_engine_id": "new",
        "remote_block_ids": [[1, 2, 3]], "tp_size": 1,
    }  # fmt: skip
    forged = {
        "another signature": {**params, "handoff": seal(told, bytes(32))},
        "the old signature": {**params, "handoff": with_old_signature(params["handoff"], told)},
        "beside the handoff": {**params, **plain},
        "no handoff": {"do_remote_prefill": True, "transfer_id": params["transfer_id"], **plain},
    }[attack]

    pair.decode_rightly(TOKENS, forged)

    assert not was_visited(canary)
    assert pair.failures() == ({} if attack == "beside the handoff" else {"invalid_handoff": 1})


def test_the_canary_would_have_noticed(pair: Pair, canary: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HELLO_TIMEOUT_S", 0.5)
    params = pair.prefilled(TOKENS)
    told = signed(pair, params, control=address_of(canary), engine_id=EngineId("new"))
    key = pair.decode.scheduler.connector._key

    pair.decode_rightly(TOKENS, {**params, "handoff": seal(told, key)})

    assert was_visited(canary)
    assert pair.failures() == {"handshake_timeout": 1}


def test_a_hold_under_an_old_name_is_another_hold(pair: Pair) -> None:
    """The name is used a second time, for another prompt; the first handoff is for what lay there before."""
    transfer_id = new_transfer_id()
    wanted = {"do_remote_decode": True, "transfer_id": transfer_id}
    holds = pair.prefill.scheduler.connector._prefill._holds

    def handed_over(tokens: list[int]) -> dict[str, Any]:
        done = pair.prefill.run_until_finished(pair.prefill.add(tokens, wanted))
        handoff = done.kv_transfer_params["handoff"]
        return {"do_remote_prefill": True, "transfer_id": transfer_id, "handoff": handoff}

    first = handed_over(TOKENS)
    assert holds.release(transfer_id, unseal(first["handoff"], pair.decode.scheduler.connector._key).nonce)
    pair.prefill.step()
    pair.overwrite_prefills_cache()
    handed_over(prompt(90, seed=2))

    pair.decode_rightly(TOKENS, first)

    assert pair.failures() == {"lease_expired": 1}
    assert len(holds) == 1


def test_a_name_that_is_in_use_cannot_be_taken(pair: Pair) -> None:
    params = pair.prefilled(TOKENS)
    again = pair.prefill.add(prompt(40), {"do_remote_decode": True, "transfer_id": params["transfer_id"]})

    assert pair.prefill.run_until_finished(again).kv_transfer_params is None
    pair.decode_rightly(TOKENS, params)
    assert pair.failures() == {}


def test_a_request_that_never_reached_the_engine_gives_its_kv_back_and_is_no_failure(pair: Pair) -> None:
    """vLLM's API server tells connectors of it by a request with one made-up token, which it aborts at once."""
    params = pair.prefilled(TOKENS)
    pair.decode.abort(pair.decode.add([0], params, max_tokens=1))

    pair.prefill.run_until(lambda: pair.prefill.scheduler.connector.num_outstanding == 0, "the release")
    assert pair.failures() == {}
    pair.decode_rightly(TOKENS, params)
    assert pair.failures() == {"invalid_handoff": 1}, "it was given back"


def test_the_same_notice_after_the_request_has_begun_changes_nothing(pair: Pair) -> None:
    params = pair.prefilled(TOKENS)
    request_id = pair.decode.add(TOKENS, params, max_tokens=4)
    pair.decode.abort(pair.decode.add([0], params, max_tokens=1))

    pair.decode.run_until_finished(request_id)
    assert pair.received() == len(TOKENS)


def test_a_forged_notice_gives_nothing_back(pair: Pair) -> None:
    params = pair.prefilled(TOKENS)
    forged = seal(signed(pair, params), bytes(32))
    pair.decode.abort(pair.decode.add([0], {**params, "handoff": forged}, max_tokens=1))

    pair.decode_rightly(TOKENS, params)
    assert pair.failures() == {}


def test_a_proof_is_what_keeps_anothers_bytes_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same late read, believed without the proof, brings another prompt's bytes: the tests above can fail."""
    params = pair.prefilled(TOKENS)
    holds = pair.prefill.scheduler.connector._prefill._holds
    holds.forbid(params["transfer_id"])
    pair.prefill.step()
    pair.overwrite_prefills_cache()
    monkeypatch.setattr(holds, "release", lambda *_: True)
    monkeypatch.setattr(holds, "renew", lambda _: ())

    request_id = pair.decode.add(TOKENS, params, max_tokens=4)
    pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")

    assert not pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {}
