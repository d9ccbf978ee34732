"""KV that is fetched when its request comes to an idle engine: no step until it is here, and then one that computes."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine import EngineCoreRequestType

from tests.vllm.in_process import BLOCK_SIZE, Pair, prompt
from vllm_disagg.errors import TransportError
from vllm_disagg.scheduler import wakeup
from vllm_disagg.testing.leaks import assert_no_leaks

pytestmark = pytest.mark.vllm

LENGTH = 100


class Idle(Pair):
    """Decode knows its prefill engine and has nothing to do."""

    def begin(self) -> None:
        tokens = prompt(LENGTH, seed=98)
        self.decode.run_until_finished(self.decode.add(tokens, self.prefilled(tokens)))
        self.decode.step()
        self.received()

    def until_settled(self) -> None:
        until(lambda: self.side._control.has_reports)

    @property
    def side(self) -> Any:
        return self.decode.scheduler.connector._decode


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def at_rest(engines: Idle) -> None:
    engines.settle()
    engines.decode.step()
    assert_no_leaks(engines.decode.scheduler)
    assert_no_leaks(engines.prefill.scheduler)


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Idle]:
    engines = Idle(tmp_path)
    engines.begin()
    yield engines
    at_rest(engines)
    engines.close()


@pytest.mark.parametrize("length", [2, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE, LENGTH, 400])
def test_the_first_step_computes_the_last_token(idle: Idle, length: int) -> None:
    tokens = prompt(length, seed=1)
    request_id = idle.decode.add(tokens, idle.prefilled(tokens), max_tokens=4)
    idle.until_settled()

    output = idle.decode.step()

    assert output.num_scheduled_tokens[request_id] == 1
    assert output.kv_connector_metadata.reads == ()
    assert idle.decode.prompt_blocks_are_right(request_id)
    idle.decode.run_until_finished(request_id)
    assert idle.received() == length
    assert idle.failures() == {}


def test_what_the_prefix_cache_holds_is_not_evicted_while_the_rest_comes(idle: Idle) -> None:
    shared, pool = prompt(2 * BLOCK_SIZE, seed=5), idle.decode.pool
    idle.decode.run_until_finished(idle.decode.add(shared, None))
    longer = [*shared, *prompt(LENGTH - len(shared), seed=6)]
    request_id = idle.decode.add(longer, idle.prefilled(longer), max_tokens=4)
    idle.until_settled()
    pool.free_blocks(pool.get_new_blocks(pool.get_num_free_blocks()))  # evicts whatever may be evicted

    output = idle.decode.step()

    assert output.num_scheduled_tokens == {request_id: 1}
    assert idle.decode.prompt_blocks_are_right(request_id)
    idle.decode.run_until_finished(request_id)
    assert idle.failures() == {}


def test_a_request_that_goes_lets_go_of_what_the_prefix_cache_holds(idle: Idle) -> None:
    shared = prompt(2 * BLOCK_SIZE, seed=5)
    idle.decode.run_until_finished(idle.decode.add(shared, None))
    longer = [*shared, *prompt(LENGTH - len(shared), seed=6)]
    idle.prefill.transport.frozen = True
    request_id = idle.decode.add(longer, idle.prefilled(longer), max_tokens=4)
    assert idle.decode.scheduler.connector.num_kept_blocks == 2

    idle.decode.abort(request_id)
    idle.prefill.transport.frozen = False

    idle.settle()
    assert idle.decode.scheduler.connector.num_kept_blocks == 0


@pytest.mark.parametrize("presses_back", [False, True])
def test_so_it_is_where_vllm_orders_the_requests(idle: Idle, presses_back: bool) -> None:
    scheduler = idle.decode.scheduler
    scheduler._plans, scheduler._presses_back = False, presses_back  # as with --kv-scheduling vllm
    tokens = prompt(LENGTH, seed=19)
    request_id = idle.decode.add(tokens, idle.prefilled(tokens), max_tokens=4)
    idle.until_settled()

    assert idle.decode.step().num_scheduled_tokens[request_id] == 1
    assert idle.decode.prompt_blocks_are_right(request_id)
    idle.decode.run_until_finished(request_id)


def test_queues_with_an_order_of_their_own_fetch_nothing_at_once(idle: Idle) -> None:
    """Where an early one cannot be put first, its blocks might keep a longer prompt before it waiting for ever."""
    idle.decode.scheduler._is_fcfs = False
    tokens = prompt(LENGTH, seed=20)
    request_id = idle.decode.add(tokens, idle.prefilled(tokens), max_tokens=4)
    assert not idle.side._by_request[request_id].early
    idle.decode.run_until_finished(request_id)


def test_the_engine_sleeps_until_the_kv_is_here(idle: Idle) -> None:
    tokens = prompt(LENGTH, seed=2)
    params = idle.prefilled(tokens)
    idle.prefill.transport.frozen = True
    request_id = idle.decode.add(tokens, params, max_tokens=4)
    assert idle.decode.scheduler.only_awaits_kv
    assert not idle.decode.step().num_scheduled_tokens  # as it does now and then, in case that word is lost
    assert idle.decode.scheduler.only_awaits_kv

    idle.prefill.transport.frozen = False
    idle.until_settled()
    assert not idle.decode.scheduler.only_awaits_kv
    idle.decode.run_until_finished(request_id)


def test_two_that_come_at_once_are_both_fetched(idle: Idle) -> None:
    prompts = [prompt(LENGTH, seed=3), prompt(250, seed=4)]
    params = [idle.prefilled(tokens) for tokens in prompts]
    names = [idle.decode.add(tokens, each, max_tokens=4) for tokens, each in zip(prompts, params, strict=True)]
    assert idle.decode.scheduler.only_awaits_kv
    until(lambda: len(idle.side._control._reports) == 2)

    assert dict(idle.decode.step().num_scheduled_tokens) == dict.fromkeys(names, 1)
    assert all(map(idle.decode.prompt_blocks_are_right, names))
    for name in names:
        idle.decode.run_until_finished(name)


def test_another_request_does_not_wait_for_the_kv(idle: Idle) -> None:
    tokens = prompt(LENGTH, seed=5)
    params = idle.prefilled(tokens)
    idle.prefill.transport.frozen = True
    fetched = idle.decode.add(tokens, params, max_tokens=4)
    local = idle.decode.add(prompt(20, seed=6), None, max_tokens=4)
    assert not idle.decode.scheduler.only_awaits_kv
    assert list(idle.decode.step().num_scheduled_tokens) == [local]

    idle.prefill.transport.frozen = False
    idle.decode.run_until_finished(fetched)
    idle.decode.run_until_finished(local)


def test_a_cached_prefix_is_not_given_away_for_the_rest(idle: Idle) -> None:
    """The blocks that vLLM would give out next hold the prompt's beginning."""
    shared = prompt(3 * BLOCK_SIZE, seed=7)
    for tokens in (shared, prompt(2 * BLOCK_SIZE, seed=16)):
        idle.decode.run_until_finished(idle.decode.add(tokens, None))
        idle.decode.step()
    longer = [*shared, *prompt(40, seed=8)]
    params = idle.prefilled(longer)
    pool = idle.decode.pool
    others = pool.get_new_blocks(pool.get_num_free_blocks() - 5)  # those that were freed last are left

    request_id = idle.decode.add(longer, params, max_tokens=4)
    assert idle.side._by_request[request_id].early
    idle.until_settled()
    assert idle.decode.step().num_scheduled_tokens[request_id] == 1
    assert idle.decode.prompt_blocks_are_right(request_id)
    idle.decode.run_until_finished(request_id)
    assert idle.received() == 40
    pool.free_blocks(others)


def test_without_room_it_waits_for_it_like_any_other(idle: Idle) -> None:
    pool, long, short = idle.decode.pool, prompt(640, seed=9), prompt(LENGTH, seed=10)
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 22)
    params = idle.prefilled(long), idle.prefilled(short)
    first = idle.decode.add(long, params[0], max_tokens=60)
    second = idle.decode.add(short, params[1], max_tokens=60)
    assert idle.side._by_request[first].early
    assert not idle.side._by_request[second].early

    idle.decode.run_until_finished(first)
    idle.decode.run_until_finished(second)
    assert idle.failures() == {}
    pool.free_blocks(taken)


def test_nobody_who_waits_for_a_step_is_passed(idle: Idle) -> None:
    tokens = prompt(LENGTH, seed=17)
    params = idle.prefilled(tokens)
    local = idle.decode.add(prompt(20, seed=18), None, max_tokens=2)
    request_id = idle.decode.add(tokens, params, max_tokens=2)
    assert not idle.side._by_request[request_id].early
    assert list(idle.decode.step().num_scheduled_tokens) == [local]
    idle.decode.run_until_finished(request_id)


def test_while_a_step_is_under_way_nothing_is_taken_from_the_pool(idle: Idle) -> None:
    """It may still write to blocks that were freed meanwhile."""
    tokens = prompt(LENGTH, seed=11)
    params = idle.prefilled(tokens)
    idle.decode.scheduler.num_steps_under_way += 1
    request_id = idle.decode.add(tokens, params, max_tokens=4)
    idle.decode.scheduler.num_steps_under_way -= 1
    assert not idle.side._by_request[request_id].early
    idle.decode.step()
    assert idle.decode.parked(request_id)
    idle.decode.run_until_finished(request_id)


def test_a_prefill_engine_that_is_not_connected_yet_is_waited_for(tmp_path: Path) -> None:
    engines = Idle(tmp_path)
    tokens = prompt(LENGTH, seed=12)
    request_id = engines.decode.add(tokens, engines.prefilled(tokens), max_tokens=4)
    assert not engines.side._by_request[request_id].early
    engines.decode.run_until_finished(request_id)
    assert engines.received() == LENGTH
    at_rest(engines)
    engines.close()


@pytest.mark.parametrize("landed", [False, True])
def test_a_client_that_leaves_gives_the_blocks_back(idle: Idle, landed: bool) -> None:
    tokens = prompt(LENGTH, seed=13)
    params = idle.prefilled(tokens)
    idle.prefill.transport.frozen = not landed
    request_id = idle.decode.add(tokens, params, max_tokens=4)
    if landed:
        idle.until_settled()

    idle.decode.abort(request_id)
    assert not idle.decode.scheduler.only_awaits_kv
    idle.prefill.transport.frozen = False
    until(lambda: (idle.decode.step(), idle.side.num_followed == 0)[1])
    assert idle.failures() == {}


def test_a_failed_read_costs_a_recompute(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise TransportError("broken")

    tokens = prompt(LENGTH, seed=14)
    params = idle.prefilled(tokens)
    monkeypatch.setattr(idle.decode.transport, "read", broken)
    request_id = idle.decode.add(tokens, params, max_tokens=4)
    idle.until_settled()

    assert idle.decode.step().num_scheduled_tokens[request_id] == LENGTH
    idle.decode.run_until_finished(request_id)
    assert idle.failures() == {"transport": 1}


def test_a_hold_that_has_ended_costs_a_recompute(idle: Idle) -> None:
    tokens = prompt(LENGTH, seed=15)
    params = idle.prefilled(tokens)
    idle.prefill.scheduler.connector.reset_cache()
    request_id = idle.decode.add(tokens, params, max_tokens=4)
    idle.until_settled()

    assert idle.decode.step().num_scheduled_tokens[request_id] == LENGTH
    idle.decode.run_until_finished(request_id)
    assert idle.failures() == {"lease_expired": 1}


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_ends_as_it_began(tmp_path: Path, seed: int) -> None:
    """Requests that come to an engine which is mostly idle, failures, slow reads and clients that leave."""
    engines = Idle(tmp_path, lease_s=2.0, pull_timeout_s=1.0)
    engines.begin()
    rng = random.Random(seed)
    fails, read = False, engines.decode.transport.read

    def may_fail(*args: Any) -> Any:
        if fails:
            raise TransportError("broken")
        return read(*args)

    engines.decode.transport.read = may_fail  # type: ignore[method-assign]
    alive: list[str] = []
    for _ in range(40):
        match rng.randrange(8):
            case 0 | 1:
                tokens = prompt(rng.choice((5, 40, 64, 100, 130)), seed=rng.randrange(8))
                alive.append(engines.decode.add(tokens, engines.prefilled(tokens), max_tokens=rng.randrange(1, 3)))
            case 2:
                engines.prefill.transport.frozen = rng.random() < 0.3
            case 3:
                fails = rng.random() < 0.2
            case 4 if alive:
                engines.decode.abort(alive.pop(rng.randrange(len(alive))))
            case 5 if alive and not engines.prefill.transport.frozen:
                engines.decode.run_until_finished(alive.pop())
            case _:
                engines.decode.step()
        for request in engines.decode.scheduler.running:
            if request.num_computed_tokens >= request.num_prompt_tokens:
                assert engines.decode.prompt_blocks_are_right(request.request_id)
    engines.prefill.transport.frozen = False
    del engines.decode.transport.read
    for request_id in alive:
        engines.decode.run_until_finished(request_id)
    at_rest(engines)
    engines.close()


class Core:
    """As much of vLLM's engine core as the wrapped method looks at."""

    def __init__(self, waits: Callable[[], bool]) -> None:
        self.scheduler = type("Scheduler", (), {"only_awaits_kv": property(lambda _: waits())})()
        self.batch_queue = None
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.handled: list[Any] = []

    def _handle_client_request(self, kind: Any, request: Any) -> None:
        self.handled.append(request)


def test_what_comes_in_is_handed_on_and_does_not_end_the_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeup, "LONGEST_SLEEP_S", 30.0)
    core = Core(lambda: len(core.handled) < 3)
    for number in range(2):
        core.input_queue.put((EngineCoreRequestType.ADD, number))
    sleeper = threading.Thread(target=wakeup._await_kv, args=(core,))
    sleeper.start()
    until(lambda: len(core.handled) == 2)
    assert sleeper.is_alive()

    core.input_queue.put((EngineCoreRequestType.WAKEUP, None))
    sleeper.join(5)
    assert not sleeper.is_alive()
    assert core.handled == [0, 1, None]


def test_an_engine_looks_for_itself_now_and_then() -> None:
    core = Core(lambda: True)
    began_s = time.monotonic()
    wakeup._await_kv(core)
    assert time.monotonic() - began_s >= wakeup.LONGEST_SLEEP_S
    assert core.handled == []
