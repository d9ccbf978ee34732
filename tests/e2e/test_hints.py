"""What a client asks of the schedulers in headers reaches the engines, and orders their work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import aiohttp
import pytest

from tests.e2e import cases
from tests.e2e.client import Case, ask
from tests.e2e.conftest import Pair, emulated_pair
from tests.e2e.engines import ForkHost

COUNTED = "vllm_disagg_proxy_slo_hints_total"
OUTSTANDING = "vllm_disagg_proxy_outstanding_tokens"
RUNNING = "vllm:num_requests_running"


@pytest.fixture(scope="module", params=[pytest.param("fcfs", marks=pytest.mark.full), "edf"])
def pair(request: pytest.FixtureRequest, host: ForkHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Prefill computes prompts one by one, long ones in several steps."""
    flags = ("--kv-batch-tokens", "16", "--max-num-batched-tokens", "512", "--kv-prefill-order", request.param)
    with emulated_pair(tmp_path_factory.mktemp("hints"), host, flags) as deployed:
        yield deployed


async def send(pair: Pair, name: str, seed: int, done: list[str], headers: dict[str, str], *, tokens: int) -> None:
    case = Case(name=name, body={"prompt": cases.prompt_of(tokens, 40_000 + seed), "max_tokens": 1})
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), headers=headers) as http:
        await ask(http, pair.proxy.url, case)
    done.append(name)


async def begun(pair: Pair) -> None:
    """Until prefill has computed the first part of a long prompt."""
    deadline_s = time.monotonic() + 20
    while not sum(pair.prefill.metrics(RUNNING).values()):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)  # bounded polling of the engine's metrics


async def outstanding(pair: Pair, tokens: int) -> None:
    """Until the proxy has sent prompts of so many tokens in all."""
    deadline_s = time.monotonic() + 20
    while pair.proxy.metrics(OUTSTANDING)[OUTSTANDING] < 2 * tokens:  # each counts on prefill and on decode
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)  # bounded polling of the proxy's metrics


async def order_of(pair: Pair, asked: dict[str, dict[str, str]], seed: int) -> list[str]:
    """In which order these are answered, if all of them wait for one that is computed."""
    done: list[str] = []
    pair.prefill.inject({"kind": "slow", "factor": 200.0})
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send(pair, "first", seed, done, {}, tokens=1500))
            await begun(pair)
            for number, (name, headers) in enumerate(asked.items()):
                await outstanding(pair, 1500 + 200 * number)
                tasks.create_task(send(pair, name, seed + number + 1, done, headers, tokens=200))
    finally:
        pair.prefill.inject()
    return done


async def test_who_is_more_important_goes_first(pair: Pair) -> None:
    asked = {name: {"X-SLO-Priority": str(-place)} for place, name in enumerate(("low", "middle", "high"))}

    assert await order_of(pair, asked, 0) == ["first", "high", "middle", "low"]


async def test_who_is_due_first_goes_first_where_deadlines_count(pair: Pair) -> None:
    asked = {name: {"X-SLO-TTFT-Ms": str(due)} for name, due in (("later", 900_000), ("soon", 300_000))}
    by_deadline = "edf" in pair.prefill.argv

    assert await order_of(pair, asked, 10) == (
        ["first", "soon", "later"] if by_deadline else ["first", "later", "soon"]
    )


async def test_absurd_hints_are_clamped_and_counted_and_cost_nothing(pair: Pair) -> None:
    before, done = pair.proxy.metrics(COUNTED), list[str]()
    headers = {"X-SLO-TTFT-Ms": "-5", "X-SLO-TPOT-Ms": "1e300", "X-SLO-Priority": "soon"}
    await send(pair, "odd", 20, done, headers, tokens=100)

    assert done == ["odd"]
    assert sum(pair.proxy.metrics(COUNTED).values()) - sum(before.values()) == 3
    for engine in (pair.prefill, pair.decode):  # what reaches them has been cleaned
        assert sum(engine.metrics("vllm_disagg_sched_hints_total").values()) == 0
