"""Every step of both lifetime tables, taken by the real connector under vLLM's own scheduler.

A transition without a scenario here fails; so does a scenario that does not take its step, or one that ends with
anything left on either engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import zmq

from tests.vllm.in_process import Engine, Pair, prompt
from vllm_disagg.connector import decode_side, messages
from vllm_disagg.connector.secure import client_socket, curve_keys
from vllm_disagg.core.keys import load_key
from vllm_disagg.core.lifetime import DECODE, PREFILL
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.testing.leaks import assert_no_leaks

pytestmark = pytest.mark.vllm

Scenario = Callable[[Pair, pytest.MonkeyPatch], None]

METRIC = "vllm_disagg_kv_transitions_total"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    engines = Pair(tmp_path, lease_s=1.0, pull_timeout_s=0.5)
    yield engines
    engines.close()


def taken(engine: Engine) -> dict[str, int]:
    """Steps by label since the last look."""
    data = engine.take_stats()
    return {key[len(METRIC) + 1 : -1]: value for key, value in data.items() if key.startswith(METRIC)}


def for_decode(engine: Engine, length: int = 70, *, transfer_id: str | None = None, max_tokens: int = 1) -> str:
    """A prompt that is to be handed over."""
    params = {"do_remote_decode": True, "transfer_id": transfer_id or new_transfer_id()}
    return engine.add(prompt(length), params, max_tokens=max_tokens)


def release(pair: Pair, transfer_id: str) -> None:
    """As the proxy's release reaches the control channel."""
    settings = pair.prefill.scheduler.connector.settings
    context: zmq.Context[Any] = zmq.Context()
    with context, client_socket(context, zmq.DEALER, curve_keys(load_key(settings.key_file))) as link:
        link.connect(f"tcp://{settings.control_host}:{settings.control_port}")
        link.send(messages.encode(messages.Forbid(transfer_id=transfer_id)))
        assert link.poll(5000)
        link.recv_multipart()


def handed_over(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.decode.run_until_finished(pair.decode.add(prompt(70), pair.prefilled(prompt(70)), max_tokens=3))


def left_in_prefills_queue(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.prefill.abort(for_decode(pair.prefill))


def ended_in_prefills_queue(pair: Pair, _: pytest.MonkeyPatch) -> None:
    from vllm.v1.request import RequestStatus

    pair.prefill.scheduler.finish_requests(for_decode(pair.prefill), RequestStatus.FINISHED_ERROR)


def left_during_prefill(pair: Pair, _: pytest.MonkeyPatch) -> None:
    request_id = for_decode(pair.prefill, max_tokens=9)
    pair.prefill.step()
    pair.prefill.abort(request_id)


def no_id_to_hold_under(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.prefill.run_until_finished(for_decode(pair.prefill, transfer_id="../../etc"))


def released_before_the_prompts_end(pair: Pair, _: pytest.MonkeyPatch) -> None:
    transfer_id = new_transfer_id()
    request_id = for_decode(pair.prefill, transfer_id=transfer_id)
    release(pair, transfer_id)
    assert pair.prefill.run_until_finished(request_id).kv_transfer_params is None


def released_by_the_proxy(pair: Pair, _: pytest.MonkeyPatch) -> None:
    release(pair, pair.prefilled(prompt(70))["transfer_id"])


def not_fetched_in_time(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.prefilled(prompt(70))
    pair.prefill.run_until(lambda: pair.prefill.scheduler.connector.num_outstanding == 0, "expiry")


def cache_reset(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.prefilled(prompt(70))
    pair.prefill.scheduler.connector.reset_cache()


def bad_handoff(pair: Pair, _: pytest.MonkeyPatch) -> None:
    params = {"do_remote_prefill": True, "handoff": "AAAA"}
    pair.decode.run_until_finished(pair.decode.add(prompt(70), params))


def cached_on_decode(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        pair.decode.run_until_finished(pair.decode.add(prompt(65), pair.prefilled(prompt(65))))


def prefill_not_to_be_reached(pair: Pair, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pair.decode.scheduler.connector._decode._control, "announce", lambda handoff: None)
    patch.setattr(decode_side, "PAIRING_LIMIT_S", 0.05)
    pair.decode.run_until_finished(pair.decode.add(prompt(70), pair.prefilled(prompt(70))))


def left_in_decodes_queue(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.decode.abort(pair.decode.add(prompt(70), pair.prefilled(prompt(70))))


def parked(pair: Pair) -> tuple[str, str]:
    """A request whose KV does not come. Returns its id and its transfer's."""
    params = pair.prefilled(prompt(70))
    pair.prefill.transport.frozen = True
    request_id = pair.decode.add(prompt(70), params, max_tokens=9)
    pair.decode.run_until(lambda: pair.decode.parked(request_id), "parking")
    return request_id, params["transfer_id"]


def hold_lost_during_the_read(pair: Pair, _: pytest.MonkeyPatch) -> None:
    request_id, transfer_id = parked(pair)
    release(pair, transfer_id)
    pair.decode.run_until_finished(request_id)


def frozen_during_the_read(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.decode.run_until_finished(parked(pair)[0])


def left_during_the_read(pair: Pair, _: pytest.MonkeyPatch) -> None:
    pair.decode.abort(parked(pair)[0])


def left_before_the_first_step(pair: Pair, _: pytest.MonkeyPatch) -> None:
    request_id = pair.decode.add(prompt(70), pair.prefilled(prompt(70)), max_tokens=9)
    pair.decode.run_until(lambda: pair.decode.parked(request_id), "parking")
    connector, deadline_s = pair.decode.scheduler.connector, time.monotonic() + 10
    while not connector.has_pending_push_work():
        assert time.monotonic() < deadline_s
    pair.decode.scheduler._apply(connector.begin_step())
    pair.decode.abort(request_id)


def left_while_running(pair: Pair, _: pytest.MonkeyPatch) -> None:
    request_id = pair.decode.add(prompt(70), pair.prefilled(prompt(70)), max_tokens=99)
    pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")
    pair.decode.abort(request_id)


def short_of_blocks(pair: Pair, _: pytest.MonkeyPatch) -> None:
    scheduler = pair.decode.scheduler
    scheduler._plans = scheduler._presses_back = False  # ours admits so that there is next to no preemption
    tokens = [prompt(200, seed=seed) for seed in range(8)]
    ids = [pair.decode.add(each, pair.prefilled(each), max_tokens=150) for each in tokens]
    for request_id in ids:
        pair.decode.run_until_finished(request_id)


def arrived_early(pair: Pair, *, frozen: bool = False) -> str:
    """A request whose read has begun before the scheduler hears of it: decode runs something, and knows its prefill
    engine and how long prompts are."""
    pair.decode.add(prompt(20, seed=77), None, max_tokens=900, name="busy")
    first = pair.decode.add(prompt(70, seed=4), pair.prefilled(prompt(70, seed=4)), within_step=int)
    pair.decode.run_until_finished(first)
    pair.decode.step()
    params = pair.prefilled(prompt(70, seed=3))
    pair.prefill.transport.frozen = frozen
    request_id = pair.decode.add(prompt(70, seed=3), params, max_tokens=3, within_step=int)
    assert pair.decode.scheduler.connector._decode._by_request[request_id].early
    return request_id


def not_waited_for_though_early(pair: Pair, _: pytest.MonkeyPatch) -> None:
    request_id = arrived_early(pair, frozen=True)
    connector = pair.decode.scheduler.connector
    connector.update_state_after_alloc(pair.decode.scheduler.requests[request_id], None, 0)
    pair.decode.run_until_finished(request_id)
    pair.decode.abort("busy")


def here_early(pair: Pair) -> str:
    """A request whose KV lies in the reserve, proven."""
    request_id = arrived_early(pair)
    side, deadline_s = pair.decode.scheduler.connector._decode, time.monotonic() + 10
    while not side.has_work:
        assert time.monotonic() < deadline_s
    side.take_reports()
    return request_id


def cached_meanwhile_though_early(pair: Pair, _: pytest.MonkeyPatch) -> None:
    request_id = here_early(pair)
    connector = pair.decode.scheduler.connector
    connector.update_state_after_alloc(pair.decode.scheduler.requests[request_id], None, 0)
    pair.decode.run_until_finished(request_id)
    pair.decode.abort("busy")


def evicted_meanwhile_though_early(pair: Pair, _: pytest.MonkeyPatch) -> None:
    request_id = here_early(pair)
    pair.decode.scheduler.connector._decode._by_request[request_id].first = 99  # as if earlier blocks had been cached
    pair.decode.run_until_finished(request_id)
    pair.decode.abort("busy")


SCENARIOS: dict[str, Scenario] = {
    "new.arrived": handed_over,
    "queued.scheduled": handed_over,
    "queued.client_left": left_in_prefills_queue,
    "queued.not_kept": ended_in_prefills_queue,
    "prefilling.client_left": left_during_prefill,
    "prefilling.not_kept": no_id_to_hold_under,
    "prefilling.refused": released_before_the_prompts_end,
    "prefilling.granted": handed_over,
    "held.renewed": handed_over,
    "held.released": handed_over,
    "held.forbidden": released_by_the_proxy,
    "held.expired": not_fetched_in_time,
    "held.reset": cache_reset,
    "new.accepted": handed_over,
    "new.refused": bad_handoff,
    "queued_on_decode.reserved": handed_over,
    "queued_on_decode.not_needed": cached_on_decode,
    "queued_on_decode.declined": prefill_not_to_be_reached,
    "queued_on_decode.client_left": left_in_decodes_queue,
    "receiving.proven": handed_over,
    "receiving.lease_expired": hold_lost_during_the_read,
    "receiving.failed": frozen_during_the_read,
    "receiving.not_needed": not_waited_for_though_early,
    "receiving.client_left": left_during_the_read,
    "received.scheduled": handed_over,
    "received.not_needed": cached_meanwhile_though_early,
    "received.declined": evicted_meanwhile_though_early,
    "received.client_left": left_before_the_first_step,
    "running.finished": handed_over,
    "running.client_left": left_while_running,
    "running.preempted": short_of_blocks,
}


def test_there_is_a_scenario_for_every_step_and_no_other() -> None:
    assert SCENARIOS.keys() == {step.label for step in (*PREFILL, *DECODE)}


@pytest.mark.parametrize("scenario", dict.fromkeys(SCENARIOS.values()), ids=lambda scenario: scenario.__name__)
def test_the_connector_takes_the_step_and_leaves_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    scenario(pair, monkeypatch)
    pair.prefill.transport.frozen = False
    pair.settle()
    steps = {**taken(pair.prefill), **taken(pair.decode)}

    assert {label for label, wanted in SCENARIOS.items() if wanted is scenario} <= steps.keys()
    for engine in (pair.prefill, pair.decode):
        assert_no_leaks(engine.scheduler)
    assert pair.prefill.scheduler.connector._prefill._lives.num_unexpected == 0
    assert pair.decode.scheduler.connector._decode._lives.num_unexpected == 0


def test_a_preempted_request_is_computed_here_and_fetches_nothing_again(pair: Pair) -> None:
    scheduler = pair.decode.scheduler
    scheduler._plans = scheduler._presses_back = False  # ours admits so that there is next to no preemption
    tokens = [prompt(200, seed=seed) for seed in range(8)]
    ids = [pair.decode.add(each, pair.prefilled(each), max_tokens=150) for each in tokens]
    preempted: set[str] = set()
    again: set[str] = set()
    deadline_s = time.monotonic() + 60
    while pair.decode.scheduler.has_requests():
        assert time.monotonic() < deadline_s
        output = pair.decode.step()
        preempted |= output.preempted_req_ids or set()
        for request_id in preempted & set(ids):
            if pair.decode.status(request_id) == "RUNNING":
                again.add(request_id)
                assert pair.decode.prompt_blocks_are_right(request_id)

    assert again == preempted != set()
    assert pair.received() == sum(map(len, tokens))
