"""KV that is fetched when its request arrives, before the scheduler has looked at it: into blocks that are the
request's own afterwards, without another step, and without one left over whatever happens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.vllm.in_process import BLOCK_SIZE, Pair, Policy, prompt
from vllm_disagg.connector.reserve import GrowthOutlook, Reserve
from vllm_disagg.core.scheduling.reserve import reserve_target
from vllm_disagg.errors import TransportError
from vllm_disagg.testing.leaks import assert_no_leaks

pytestmark = pytest.mark.vllm

LENGTH = 100


class Busy(Pair):
    """Decode runs a stream all the time, knows its prefill engine, and has seen prompts of `LENGTH`."""

    def begin(self) -> None:
        self.stream = self.decode.add(prompt(20, seed=99), None, max_tokens=900)
        first = self.decode.add(prompt(LENGTH, seed=98), self.prefilled(prompt(LENGTH, seed=98)), within_step=int)
        self.decode.run_until_finished(first)
        self.received()
        self.decode.step()

    def arrive(self, token_ids: list[int], params: Any, *, max_tokens: int = 4, landed: bool = True) -> str:
        """A request that arrives within a step; when it is added its KV is here, unless it need not be."""
        return self.decode.add(
            token_ids, params, max_tokens=max_tokens, within_step=self.until_settled if landed else lambda: None
        )

    def until_settled(self) -> None:
        self.until(lambda: self.control.has_reports)

    @staticmethod
    def until(condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.001)

    @property
    def side(self) -> Any:
        return self.decode.scheduler.connector._decode

    @property
    def control(self) -> Any:
        return self.side._control


def at_rest(engines: Busy) -> None:
    engines.decode.abort(engines.stream)
    engines.settle()
    engines.decode.step()
    assert_no_leaks(engines.decode.scheduler)
    assert_no_leaks(engines.prefill.scheduler)


@pytest.fixture
def policy() -> Policy:
    """The order of vLLM's queues."""
    return "fcfs"


@pytest.fixture
def busy(tmp_path: Path, policy: Policy) -> Iterator[Busy]:
    engines = Busy(tmp_path, policy=policy)
    engines.begin()
    yield engines
    at_rest(engines)
    engines.close()


@pytest.mark.parametrize("length", [2, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE, LENGTH])
def test_the_next_step_computes_the_last_token(busy: Busy, length: int) -> None:
    tokens = prompt(length, seed=1)
    request_id = busy.arrive(tokens, busy.prefilled(tokens))

    output = busy.decode.step()

    assert output.num_scheduled_tokens[request_id] == 1
    assert busy.decode.prompt_blocks_are_right(request_id)
    busy.decode.run_until_finished(request_id)
    assert busy.received() == length
    assert busy.failures() == {}


def test_what_is_cached_here_is_not_fetched(busy: Busy) -> None:
    shared = prompt(3 * BLOCK_SIZE, seed=2)
    busy.decode.run_until_finished(busy.decode.add(shared, None))
    longer = [*shared, *prompt(20, seed=3)]
    request_id = busy.arrive(longer, busy.prefilled(longer))

    output = busy.decode.step()

    assert output.num_scheduled_tokens[request_id] == 1
    assert busy.decode.prompt_blocks_are_right(request_id)
    busy.decode.run_until_finished(request_id)
    assert busy.received() == 20


def test_what_is_cached_meanwhile_frees_the_blocks_it_came_into(busy: Busy) -> None:
    tokens = prompt(LENGTH, seed=4)
    params = busy.prefilled(tokens)

    def step_ends() -> None:
        busy.until_settled()
        busy.decode.run_until_finished(busy.decode.add(tokens, None))

    request_id = busy.decode.add(tokens, params, max_tokens=4, within_step=step_ends)
    output = busy.decode.step()

    assert output.num_scheduled_tokens[request_id] == 1
    assert busy.decode.prompt_blocks_are_right(request_id)
    busy.decode.run_until_finished(request_id)


def test_a_cached_prefix_that_is_evicted_meanwhile_costs_a_recompute(busy: Busy) -> None:
    shared = prompt(2 * BLOCK_SIZE, seed=5)
    busy.decode.run_until_finished(busy.decode.add(shared, None))
    longer = [*shared, *prompt(LENGTH - len(shared), seed=6)]
    params = busy.prefilled(longer)

    def step_ends() -> None:
        busy.until_settled()
        busy.decode.pool.evict_blocks(set(range(1, busy.decode.pool.num_gpu_blocks)))

    request_id = busy.decode.add(longer, params, max_tokens=4, within_step=step_ends)
    output = busy.decode.step()

    assert output.num_scheduled_tokens[request_id] == LENGTH
    busy.decode.run_until_finished(request_id)
    assert busy.failures() == {"prefix_evicted": 1}


def test_a_slow_read_holds_up_only_its_own_request(busy: Busy) -> None:
    tokens = prompt(LENGTH, seed=7)
    params = busy.prefilled(tokens)
    busy.prefill.transport.frozen = True
    request_id = busy.arrive(tokens, params, landed=False)
    for _ in range(5):
        output = busy.decode.step()
        assert list(output.num_scheduled_tokens) == [busy.stream]

    busy.prefill.transport.frozen = False
    busy.until_settled()
    assert busy.decode.step().num_scheduled_tokens[request_id] == 1
    assert busy.decode.prompt_blocks_are_right(request_id)
    busy.decode.run_until_finished(request_id)


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_client_that_leaves_gives_the_blocks_back(busy: Busy, landed: bool, steps: int) -> None:
    tokens = prompt(LENGTH, seed=8)
    params = busy.prefilled(tokens)
    busy.prefill.transport.frozen = not landed
    request_id = busy.arrive(tokens, params, landed=landed)
    for _ in range(steps):
        busy.decode.step()

    busy.decode.abort(request_id)
    busy.prefill.transport.frozen = False

    busy.until(lambda: (busy.decode.step(), busy.side.num_followed == 0)[1])
    assert busy.failures() == {}


def broken(*args: Any) -> Any:
    raise TransportError("broken")


def test_a_failed_read_costs_a_recompute(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(LENGTH, seed=9)
    params = busy.prefilled(tokens)
    monkeypatch.setattr(busy.decode.transport, "read", broken)
    request_id = busy.arrive(tokens, params)

    output = busy.decode.step()

    assert output.num_scheduled_tokens[request_id] == LENGTH
    busy.decode.run_until_finished(request_id)
    assert busy.failures() == {"transport": 1}


def test_a_handoff_that_came_twice_is_fetched_once(busy: Busy) -> None:
    tokens = prompt(LENGTH, seed=10)
    params = busy.prefilled(tokens)
    first = busy.arrive(tokens, params)
    second = busy.arrive(tokens, params, landed=False)

    busy.decode.run_until_finished(first)
    busy.decode.run_until_finished(second)
    assert busy.failures() == {"invalid_handoff": 1}


def test_an_edited_handoff_begins_nothing(busy: Busy) -> None:
    tokens = prompt(LENGTH, seed=11)
    params = busy.prefilled(tokens)
    request_id = busy.arrive(tokens, {**params, "handoff": params["handoff"][:-6] + "AAAAAA"}, landed=False)

    assert busy.decode.step().num_scheduled_tokens[request_id] == LENGTH
    busy.decode.run_until_finished(request_id)
    assert busy.failures() == {"invalid_handoff": 1}
    busy.prefill.scheduler.connector.reset_cache()  # it would be held until its lease ends


def test_a_request_that_is_lost_on_its_way_leaves_no_blocks(busy: Busy) -> None:
    tokens = prompt(LENGTH, seed=12)
    params = busy.prefilled(tokens)
    busy.side._overdue_s = 0.05
    lost = busy.decode.request(tokens, params)
    busy.decode.scheduler.connector.on_arrival(lost)
    busy.until(lambda: (busy.decode.step(), busy.side.num_followed == 0)[1])


def test_blocks_that_are_not_the_ones_are_not_believed(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should vLLM's pool ever give out others than it was just given back."""
    tokens = prompt(LENGTH, seed=13)
    request_id = busy.arrive(tokens, busy.prefilled(tokens))
    pool = busy.decode.pool
    free = type(pool).free_blocks
    with monkeypatch.context() as patch:
        patch.setattr(pool, "free_blocks", lambda blocks: free(pool, list(blocks)[::-1]))
        assert request_id not in busy.decode.step().num_scheduled_tokens

    assert busy.decode.step().num_scheduled_tokens[request_id] == LENGTH
    busy.decode.run_until_finished(request_id)
    assert busy.failures() == {"misplaced": 1}

    again = prompt(LENGTH, seed=14)
    busy.decode_rightly(again, busy.prefilled(again))
    assert not len(busy.side._early._reserve)


def test_memory_that_is_short_is_enough_for_what_has_come_early(busy: Busy) -> None:
    tokens = prompt(LENGTH, seed=15)
    request_id = busy.arrive(tokens, busy.prefilled(tokens))
    taken = busy.decode.pool.get_new_blocks(busy.decode.pool.get_num_free_blocks())

    assert busy.decode.step().num_scheduled_tokens[request_id] == 1
    assert busy.decode.prompt_blocks_are_right(request_id)
    busy.decode.pool.free_blocks(taken)
    busy.decode.run_until_finished(request_id)


def test_a_request_that_vllm_gives_no_blocks_yet_keeps_its_kv(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt(LENGTH, seed=16)
    request_id = busy.arrive(tokens, busy.prefilled(tokens))
    with monkeypatch.context() as patch:
        patch.setattr(busy.decode.scheduler, "_allocate_slots", lambda *args, **kwargs: None)
        for _ in range(3):
            assert request_id not in busy.decode.step().num_scheduled_tokens

    assert busy.decode.step().num_scheduled_tokens[request_id] == 1
    assert busy.decode.prompt_blocks_are_right(request_id)
    busy.decode.run_until_finished(request_id)


def test_an_engine_at_rest_keeps_no_reserve(busy: Busy) -> None:
    assert len(busy.side._early._reserve)
    busy.decode.abort(busy.stream)
    busy.decode.step()
    assert not len(busy.side._early._reserve)
    assert_no_leaks(busy.decode.scheduler)


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_ends_as_it_began(tmp_path: Path, seed: int) -> None:
    """Arrivals, steps, failures, slow reads and clients that leave, in a random order."""
    engines = Busy(tmp_path, lease_s=2.0, pull_timeout_s=1.0)
    engines.begin()
    rng = random.Random(seed)
    fails, read = False, engines.decode.transport.read

    def may_fail(*args: Any) -> Any:
        if fails:
            raise TransportError("broken")
        return read(*args)

    engines.decode.transport.read = may_fail  # type: ignore[method-assign]
    alive: list[str] = []
    for number in range(60):
        match rng.randrange(8):
            case 0 | 1 | 2:
                tokens = prompt(rng.choice((5, 40, 64, 100, 130)), seed=rng.randrange(8))
                params = engines.prefilled(tokens)
                alive.append(engines.arrive(tokens, params, max_tokens=rng.randrange(1, 6), landed=False))
            case 3:
                engines.prefill.transport.frozen = rng.random() < 0.3
            case 4:
                fails = rng.random() < 0.2
            case 5 if alive:
                engines.decode.abort(alive.pop(rng.randrange(len(alive))))
            case _:
                engines.decode.step()
        for request in engines.decode.scheduler.running:
            if number % 5 == 0 and request.num_computed_tokens >= request.num_prompt_tokens:
                assert engines.decode.prompt_blocks_are_right(request.request_id)
    engines.prefill.transport.frozen = False
    del engines.decode.transport.read
    for request_id in alive:
        engines.decode.run_until_finished(request_id)
    at_rest(engines)
    engines.close()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_early_kv_does_not_keep_a_longer_prompt_before_it_waiting_for_ever(busy: Busy) -> None:
    """The first in line wants more than the early KV behind it leaves, and nobody else holds any blocks."""
    pool, long, short = busy.decode.pool, prompt(1000, seed=5), prompt(LENGTH, seed=6)
    in_use = len(busy.decode.blocks_of(busy.stream)) + len(busy.side._early._reserve)
    taken = pool.get_new_blocks(pool.get_num_free_blocks() + in_use - 35)  # 32 and 4 do not fit together
    first = busy.decode.add(long, busy.prefilled(long), max_tokens=2)
    busy.decode.step()
    second = busy.arrive(short, busy.prefilled(short), max_tokens=2)
    assert busy.side._by_request[second].early
    assert busy.decode.status(first) == "WAITING"

    busy.decode.abort(busy.stream)

    busy.decode.run_until_finished(second)
    busy.decode.run_until_finished(first)
    pool.free_blocks(taken)


def test_the_reserve_is_a_part_of_what_is_free() -> None:
    plenty = {"num_free": 1000, "num_reserved": 0, "num_lent": 0, "num_running": 8}
    assert reserve_target(**plenty, longest=20) == 40
    assert reserve_target(**plenty, longest=0) == 0
    assert reserve_target(**{**plenty, "num_running": 0}, longest=20) == 0
    assert reserve_target(**{**plenty, "num_free": 88}, longest=20) == 20
    assert reserve_target(**{**plenty, "num_free": 10}, longest=20) == 0
    assert reserve_target(**{**plenty, "num_free": 88, "num_lent": 20}, longest=20) == 5


def test_a_block_lies_in_reserve_for_as_many_steps_as_may_still_write_to_it(busy: Busy) -> None:
    reserve = Reserve(age=2)
    assert reserve.bind(busy.decode.pool)
    reserve.expect(2)
    for _ in range(2):
        reserve.step(num_running=1, outlook=GrowthOutlook())
        assert reserve.take(2) == ()
    reserve.step(num_running=1, outlook=GrowthOutlook())
    taken = reserve.take(2)
    assert len(taken) == 2
    reserve.put_back(taken)
    reserve.step(num_running=0, outlook=GrowthOutlook())
    assert not len(reserve)
