"""The life of a request on both engines, in every state, against vLLM's real scheduler. Each test ends with both
engines as empty as they began."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.vllm import in_process
from tests.vllm.in_process import BLOCK_SIZE, Engine, Pair, free_port, prompt
from vllm_disagg.connector import decode_side
from vllm_disagg.connector.pull import Drained, Settled
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.errors import ConfigError
from vllm_disagg.testing.leaks import assert_no_leaks

pytestmark = pytest.mark.vllm


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    engines = Pair(tmp_path)
    yield engines
    engines.settle()
    assert_no_leaks(engines.decode.scheduler)
    assert_no_leaks(engines.prefill.scheduler)
    engines.close()


@pytest.fixture
def hasty_pair(tmp_path: Path) -> Iterator[Pair]:
    """Short deadlines: a lease of 0.6 s and pulls of 0.3 s."""
    engines = Pair(tmp_path, lease_s=0.6, pull_timeout_s=0.3)
    yield engines
    engines.settle()
    assert_no_leaks(engines.decode.scheduler)
    assert_no_leaks(engines.prefill.scheduler)
    engines.close()


@pytest.mark.parametrize("length", [2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 5 * BLOCK_SIZE, 300])
def test_a_prompts_blocks_arrive_and_only_its_last_token_is_computed(pair: Pair, length: int) -> None:
    params = pair.prefilled(prompt(length))
    request_id = pair.decode.add(prompt(length), params, max_tokens=3)
    scheduled: list[int] = []

    def admitted() -> bool:
        output = pair.decode.step()
        scheduled.extend(output.num_scheduled_tokens.values())
        return bool(scheduled)

    deadline_s = time.monotonic() + 10
    while not admitted():
        assert time.monotonic() < deadline_s

    assert scheduled == [1]
    assert pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)
    assert pair.received() == length


def test_prefill_holds_the_blocks_while_vllm_has_forgotten_the_request(pair: Pair) -> None:
    params = pair.prefilled(prompt(100))

    assert pair.prefill.scheduler.requests == {}
    assert pair.prefill.pool.get_num_free_blocks() == pair.prefill.pool.num_gpu_blocks - 1 - 4
    assert not pair.prefill.scheduler.has_finished_requests() or pair.prefill.step() is not None

    pair.decode.run_until_finished(pair.decode.add(prompt(100), params, max_tokens=2))


def test_an_engine_sleeps_while_every_request_is_parked_and_until_then_only(pair: Pair) -> None:
    params, scheduler = pair.prefilled(prompt(70)), pair.decode.scheduler
    pair.prefill.transport.frozen = True
    assert not scheduler.only_awaits_kv  # there is nothing to wait for

    request_id = pair.decode.add(prompt(70), params, max_tokens=2)
    assert not scheduler.only_awaits_kv
    pair.decode.run_until(lambda: pair.decode.parked(request_id), "parking")
    assert scheduler.only_awaits_kv

    other = pair.decode.add(prompt(20), None, max_tokens=2)
    assert not scheduler.only_awaits_kv
    pair.decode.run_until_finished(other)
    assert not scheduler.only_awaits_kv  # the workers are still to be told
    pair.decode.step()
    assert scheduler.only_awaits_kv

    pair.prefill.transport.frozen = False
    pair.decode.run_until(lambda: scheduler.connector.has_pending_push_work(), "word of the KV")
    assert not scheduler.only_awaits_kv
    pair.decode.run_until_finished(request_id)


def test_an_engine_sleeps_until_a_request_that_left_while_parked_can_be_freed(pair: Pair) -> None:
    params, scheduler = pair.prefilled(prompt(70)), pair.decode.scheduler
    pair.prefill.transport.frozen = True
    request_id = pair.decode.add(prompt(70), params, max_tokens=2)
    pair.decode.run_until(lambda: pair.decode.parked(request_id), "parking")
    pair.decode.abort(request_id)
    assert not scheduler.only_awaits_kv  # the workers are still to be told

    pair.decode.run_until(lambda: not scheduler.has_requests(), "rest")
    pair.prefill.transport.frozen = False


def test_blocks_are_not_reused_while_they_are_held(pair: Pair) -> None:
    params = pair.prefilled(prompt(100, seed=1))
    for seed in range(2, 20):  # more prompts than the cache has room for beside the held one
        other = pair.prefill.add(prompt(300, seed=seed), None)
        pair.prefill.run_until_finished(other)

    request_id = pair.decode.add(prompt(100, seed=1), params, max_tokens=8)
    pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")

    assert pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)


def test_a_cached_prefix_on_decode_is_not_fetched_again(pair: Pair) -> None:
    shared = prompt(100)
    pair.decode.run_until_finished(pair.decode.add(shared, pair.prefilled(shared), max_tokens=1))
    assert pair.received() == 100

    longer = [*shared, *prompt(30, seed=5)]
    request_id = pair.decode.add(longer, pair.prefilled(longer), max_tokens=4)
    pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")

    assert pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)
    assert pair.received() == 130 - 96


def test_a_prompt_that_is_cached_but_for_its_last_token_is_released_unread(pair: Pair) -> None:
    tokens = prompt(65)
    pair.decode.run_until_finished(pair.decode.add(tokens, pair.prefilled(tokens), max_tokens=1))
    pair.received()

    pair.decode.run_until_finished(pair.decode.add(tokens, pair.prefilled(tokens), max_tokens=1))

    assert pair.received() == 0
    assert pair.failures() == {}


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda params: {**params, "handoff": params["handoff"].swapcase()}, "invalid_handoff"),
        (lambda params: {**params, "handoff": None}, "invalid_handoff"),
        (lambda params: {"do_remote_prefill": True}, "invalid_handoff"),
        (lambda params: {**params, "handoff": {"block_ids": [[1]]}}, "invalid_handoff"),
    ],
)
def test_a_bad_handoff_costs_a_local_prefill(pair: Pair, spoil: Any, cause: str) -> None:
    params = pair.prefilled(prompt(70))
    request_id = pair.decode.add(prompt(70), spoil(params), max_tokens=2)

    output = pair.decode.step()

    assert list(output.num_scheduled_tokens.values()) == [70]
    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {cause: 1}
    pair.decode.run_until_finished(pair.decode.add(prompt(70), params, max_tokens=1))


def test_another_prompts_handoff_is_not_used(pair: Pair) -> None:
    params = pair.prefilled(prompt(70, seed=1))
    request_id = pair.decode.add(prompt(70, seed=2), params, max_tokens=2)

    pair.decode.step()

    assert pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {"invalid_handoff": 1}
    pair.decode.run_until_finished(pair.decode.add(prompt(70, seed=1), params, max_tokens=1))


@pytest.mark.parametrize("params", ["text", 7, ["do_remote_prefill"], True, [[]]])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_parameters_that_are_no_mapping_do_not_end_the_engine(pair: Pair, role: str, params: Any) -> None:
    engine = getattr(pair, role)

    engine.run_until_finished(engine.add(prompt(10), params, max_tokens=1))


def test_a_handoff_works_once(pair: Pair) -> None:
    params = pair.prefilled(prompt(70, seed=1))
    pair.decode.run_until_finished(pair.decode.add(prompt(70, seed=1), params, max_tokens=1))
    pair.decode.scheduler.reset_prefix_cache()
    pair.prefill.step()
    pair.overwrite_prefills_cache()

    pair.decode_rightly(prompt(70, seed=1), params)
    assert pair.failures() == {"invalid_handoff": 1}


def test_one_handoff_for_two_requests_serves_one_and_recomputes_the_other(pair: Pair) -> None:
    params = pair.prefilled(prompt(70))
    both = [pair.decode.add(prompt(70), params, max_tokens=2) for _ in range(2)]

    for request_id in both:
        pair.decode.run_until_finished(request_id)

    assert pair.failures() == {"invalid_handoff": 1}


def test_a_handoff_used_on_another_decode_engine_is_recomputed_there(pair: Pair, tmp_path: Path) -> None:
    params = pair.prefilled(prompt(70, seed=1))
    other = Engine.start("decode", tmp_path / "key", control_port=free_port())
    other.run_until_finished(other.add(prompt(70, seed=1), params, max_tokens=1))
    pair.overwrite_prefills_cache()

    pair.decode_rightly(prompt(70, seed=1), params)
    assert pair.failures() == {"lease_expired": 1}
    assert_no_leaks(other.scheduler)
    other.stop()


def test_a_control_thread_that_never_answers_does_not_hold_a_request_for_ever(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = pair.prefilled(prompt(70))
    control = pair.decode.scheduler.connector._decode._control
    monkeypatch.setattr(control, "announce", lambda handoff: None)
    monkeypatch.setattr(decode_side, "PAIRING_LIMIT_S", 0.05)

    request_id = pair.decode.add(prompt(70), params, max_tokens=2)

    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {"handshake_timeout": 1}
    pair.prefill.scheduler.connector._prefill.reset()


@pytest.mark.parametrize("draining_at_last", [True, False])
def test_a_settlement_that_comes_after_the_last_resort_gives_the_blocks_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, draining_at_last: bool
) -> None:
    params = pair.prefilled(prompt(70))
    side = pair.decode.scheduler.connector._decode
    reports: list[Any] = []
    monkeypatch.setattr(side._control, "take_reports", lambda: [reports.pop(0)] if reports else [])
    monkeypatch.setattr(side, "_overdue_s", 0.1)
    request_id = pair.decode.add(prompt(70), params, max_tokens=2)
    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {"overdue": 1}
    assert side.num_outstanding == 1

    reports.append(Settled(transfer_id=params["transfer_id"], result="received", draining=draining_at_last))
    if draining_at_last:
        reports.append(Drained(params["transfer_id"]))
    pair.decode.step()
    pair.decode.step()
    assert side.num_outstanding == 0
    monkeypatch.undo()


def test_a_policy_that_would_take_a_failed_transfer_for_a_good_one_is_refused(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    create_key_file(key_file)
    config = in_process.vllm_config("decode", key_file, free_port(), 30.0, 10.0)
    config.kv_transfer_config.kv_load_failure_policy = "fail"

    with pytest.raises(ConfigError, match="must be recompute"):
        in_process.build_scheduler("decode", config)


def test_an_expired_lease_is_recomputed(hasty_pair: Pair) -> None:
    pair = hasty_pair
    params = pair.prefilled(prompt(70))
    pair.prefill.run_until(lambda: pair.prefill.scheduler.connector.num_outstanding == 0, "expiry")

    request_id = pair.decode.add(prompt(70), params, max_tokens=2)
    pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")

    assert pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {"lease_expired": 1}


def test_a_frozen_transfer_is_recomputed_in_other_blocks_by_the_deadline(hasty_pair: Pair) -> None:
    pair = hasty_pair
    params = pair.prefilled(prompt(70))
    pair.prefill.transport.frozen = True
    request_id = pair.decode.add(prompt(70), params, max_tokens=2)
    pair.decode.run_until(lambda: pair.decode.parked(request_id), "parking")
    abandoned, begun_s = set(pair.decode.blocks_of(request_id)), time.monotonic()

    pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")

    assert time.monotonic() - begun_s < 2.0
    assert (
        not abandoned & set(pair.decode.blocks_of(request_id)) or pair.decode.scheduler.connector.num_outstanding == 0
    )
    assert pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {"pull_timeout": 1}


@pytest.mark.parametrize("state", ["added", "parked", "received", "running"])
def test_a_client_that_leaves_frees_both_sides(pair: Pair, state: str) -> None:
    params = pair.prefilled(prompt(70))
    pair.prefill.transport.frozen = state == "parked"
    request_id = pair.decode.add(prompt(70), params, max_tokens=50)
    if state == "parked":
        pair.decode.run_until(lambda: pair.decode.parked(request_id), "parking")
    elif state == "received":
        pair.decode.run_until(lambda: pair.decode.parked(request_id), "parking")
        deadline_s = time.monotonic() + 10
        while not pair.decode.scheduler.connector.has_pending_push_work():  # proven, and not yet told to vLLM
            assert time.monotonic() < deadline_s
    elif state == "running":
        pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")

    pair.decode.abort(request_id)

    pair.settle()
    assert pair.failures() == {}


@pytest.mark.parametrize("state", ["added", "running"])
def test_a_client_that_leaves_during_prefill_leaves_no_hold(pair: Pair, state: str) -> None:
    request_id = pair.prefill.add(
        prompt(70), {"do_remote_decode": True, "transfer_id": new_transfer_id()}, max_tokens=9
    )
    if state == "running":
        pair.prefill.step()

    pair.prefill.abort(request_id)

    pair.settle()


def test_a_transfer_id_of_a_wrong_form_gets_no_handoff(pair: Pair) -> None:
    request_id = pair.prefill.add(prompt(70), {"do_remote_decode": True, "transfer_id": "../../etc"})

    assert pair.prefill.run_until_finished(request_id).kv_transfer_params is None


def test_ids_that_vllm_does_not_know_do_not_end_the_engine(pair: Pair) -> None:
    from vllm.v1.outputs import KVConnectorOutput

    running = pair.decode.add(prompt(40), None, max_tokens=3)
    pair.decode.step()

    pair.decode.scheduler._update_from_kv_xfer_finished(
        KVConnectorOutput(finished_recving={"nobody", running}, finished_sending={"nobody", running})
    )

    assert pair.decode.scheduler.num_unknown_transfers == 4
    pair.decode.run_until_finished(running)


def test_prefill_gone_before_the_pull_costs_a_local_prefill(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    params = pair.prefilled(prompt(70))
    pair.decode.run_until_finished(pair.decode.add(prompt(40), pair.prefilled(prompt(40)), max_tokens=1))
    pair.prefill.stop()

    request_id = pair.decode.add(prompt(70), params, max_tokens=2)
    pair.decode.run_until_finished(request_id)

    assert sum(pair.failures().values()) == 1
    pair.decode.run_until(lambda: not pair.decode.scheduler.has_requests(), "rest")
    assert_no_leaks(pair.decode.scheduler)
    pair.decode.stop()


@pytest.mark.parametrize("seed", range(6))
def test_random_interleavings_end_as_they_began(hasty_pair: Pair, seed: int) -> None:
    pair, rng = hasty_pair, random.Random(seed)
    alive: list[str] = []
    for number in range(40):
        tokens = prompt(rng.choice([3, 31, 32, 33, 64, 90, 200]), seed=rng.randrange(8))
        params = pair.prefilled(tokens) if rng.random() < 0.9 else None
        if params and rng.random() < 0.1:
            params["handoff"] = params["handoff"][::-1]
        pair.prefill.transport.frozen = rng.random() < 0.2
        alive.append(pair.decode.add(tokens, params, max_tokens=rng.choice([1, 2, 30]), name=f"{seed}-{number}"))
        for _ in range(rng.randrange(6)):
            pair.decode.step()
        for request_id in list(alive):
            if pair.decode.status(request_id) == "RUNNING":
                assert pair.decode.prompt_blocks_are_right(request_id)
            if pair.decode.status(request_id) == "gone" or rng.random() < 0.1:
                pair.decode.abort(request_id)
                alive.remove(request_id)
    pair.prefill.transport.frozen = False
    for request_id in alive:
        pair.decode.run_until(lambda request_id=request_id: pair.decode.status(request_id) == "gone", request_id)
