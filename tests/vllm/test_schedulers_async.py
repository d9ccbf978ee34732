"""Our schedulers over vLLM's `AsyncScheduler`, which schedules a step before it knows the tokens of the last one. CPUs
never run it in an engine, so the test plays the engine: a step is under way while the next one is scheduled."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from tests.vllm import in_process
from tests.vllm.in_process import BLOCK_SIZE, Engine, Pair, prompt
from vllm_disagg.testing.leaks import assert_no_leaks

pytestmark = pytest.mark.vllm


class AsyncEngine(Engine):
    """Two steps in flight."""

    def step(self) -> Any:
        under_way: deque[tuple[Any, ModelRunnerOutput]] = self.__dict__.setdefault("under_way", deque())
        output = self.scheduler.schedule()
        for rank in self.ranks:
            rank.worker.bind_connector_metadata(output.kv_connector_metadata)
        self._forward(output)
        for rank in self.ranks:
            rank.worker.clear_connector_metadata()
        ids = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[self._sample(request_id) for request_id in ids],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(),
        )
        under_way.append((output, result))
        while len(under_way) > bool(ids):
            for outputs in self.scheduler.update_from_output(*under_way.popleft()).values():
                for item in outputs.outputs:
                    self.numbers[item.request_id] = self.numbers.get(item.request_id, 0) + len(item.new_token_ids)
                    if item.finish_reason is not None:
                        self.finished[item.request_id] = item
        return output

    @property
    def numbers(self) -> dict[str, int]:
        """How many tokens each request has been given."""
        found: dict[str, int] = self.__dict__.setdefault("given", {})
        return found


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    plain = in_process.vllm_config

    def asynchronous(*args: Any) -> Any:
        config = copy.copy(plain(*args))
        config.scheduler_config = copy.copy(config.scheduler_config)
        config.scheduler_config.async_scheduling = True
        return config

    monkeypatch.setattr(in_process, "vllm_config", asynchronous)
    monkeypatch.setattr(in_process, "Engine", AsyncEngine)
    engines = Pair(tmp_path)
    yield engines
    engines.settle()
    for engine in (engines.decode, engines.prefill):
        assert_no_leaks(engine.scheduler)
        assert engine.scheduler.facts == {}
        engine.step()
        assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
    engines.close()


def test_requests_of_all_kinds_get_all_their_tokens(pair: Pair) -> None:
    assert isinstance(pair.decode.scheduler, AsyncScheduler)
    rng, wanted = random.Random(4), {}
    for number in range(40):
        tokens = prompt(rng.choice([2, 31, 32, 33, 90, 200]), seed=number)
        length = rng.choice([1, 2, 7, 40, 120])
        params = None if rng.random() < 0.3 else pair.prefilled(tokens)
        wanted[pair.decode.add(tokens, params, max_tokens=length)] = length
        for _ in range(rng.randrange(6)):
            if pair.decode.scheduler.has_requests():
                pair.decode.step()
    pair.decode.run_until(lambda: wanted.keys() <= pair.decode.finished.keys(), "the end of all answers")

    numbers = pair.decode.numbers  # type: ignore[attr-defined]
    assert {name: numbers[name] for name in wanted} == wanted


def test_fetched_blocks_are_right_while_steps_overlap(pair: Pair) -> None:
    for seed in range(6):
        tokens = prompt(3 * BLOCK_SIZE + seed, seed=seed)
        pair.decode_rightly(tokens, pair.prefilled(tokens))
