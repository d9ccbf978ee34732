"""What a client asks of the schedulers in headers reaches the engines, and orders their work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import aiohttp
import pytest

from tests.e2e import cases
from tests.e2e.client import Case, ask
from tests.e2e.engines import EmulatedEngine, Server, emulated_engine, fork_host, proxy
from vllm_disagg.core.keys import create_key_file

COUNTED = "vllm_disagg_proxy_slo_hints_total"
OUTSTANDING = "vllm_disagg_proxy_outstanding_tokens"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A pair whose prefill computes prompts one by one, and the proxy in front."""

    prefill: EmulatedEngine
    decode: EmulatedEngine
    front: Server


@pytest.fixture(scope="module", params=["fcfs", "edf"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("hints")
    key_file = folder / "key"
    create_key_file(key_file)
    flags = {"prefill": ("--kv-batch-tokens", "16", "--kv-prefill-order", request.param), "decode": ()}
    with ExitStack() as stack:
        host = fork_host(folder)
        stack.callback(host.kill)
        host.start()
        host.wait_until_ready()
        prefill, decode = (
            emulated_engine(role, host=host, folder=folder, key_file=key_file, role=role, flags=flags[role])
            for role in ("prefill", "decode")
        )
        for engine in (prefill, decode):
            stack.callback(engine.kill)
            engine.start()
        for engine in (prefill, decode):
            engine.wait_until_ready()
        front = proxy(prefill=[prefill], decode=[decode], folder=folder)
        stack.callback(front.kill)
        front.start()
        front.wait_until_ready("/ready")
        yield Site(prefill=prefill, decode=decode, front=front)


async def send(site: Site, name: str, seed: int, done: list[str], headers: dict[str, str], *, tokens: int) -> None:
    case = Case(name=name, body={"prompt": cases.prompt_of(tokens, 40_000 + seed), "max_tokens": 1})
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120), headers=headers) as http:
        await ask(http, site.front.url, case)
    done.append(name)


async def outstanding(site: Site, tokens: int) -> None:
    """Until the proxy has sent prompts of so many tokens in all."""
    deadline_s = time.monotonic() + 20
    while site.front.metrics(OUTSTANDING)[OUTSTANDING] < 2 * tokens:  # each counts on prefill and on decode
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)  # bounded polling of the proxy's metrics


async def order_of(site: Site, asked: dict[str, dict[str, str]], seed: int) -> list[str]:
    """In which order these are answered, if all of them wait for one that is computed."""
    done: list[str] = []
    site.prefill.inject({"kind": "slow", "factor": 200.0})
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send(site, "first", seed, done, {}, tokens=1500))
            for number, (name, headers) in enumerate(asked.items()):
                await outstanding(site, 1500 + 200 * number)
                tasks.create_task(send(site, name, seed + number + 1, done, headers, tokens=200))
    finally:
        site.prefill.inject()
    return done


async def test_who_is_more_important_goes_first(site: Site) -> None:
    asked = {name: {"X-SLO-Priority": str(-place)} for place, name in enumerate(("low", "middle", "high"))}

    assert await order_of(site, asked, 0) == ["first", "high", "middle", "low"]


async def test_who_is_due_first_goes_first_where_deadlines_count(site: Site) -> None:
    asked = {name: {"X-SLO-TTFT-Ms": str(due)} for name, due in (("later", 900_000), ("soon", 300_000))}
    by_deadline = "edf" in site.prefill.argv

    assert await order_of(site, asked, 10) == (
        ["first", "soon", "later"] if by_deadline else ["first", "later", "soon"]
    )


async def test_absurd_hints_are_clamped_and_counted_and_cost_nothing(site: Site) -> None:
    before, done = site.front.metrics(COUNTED), list[str]()
    headers = {"X-SLO-TTFT-Ms": "-5", "X-SLO-TPOT-Ms": "1e300", "X-SLO-Priority": "soon"}
    await send(site, "odd", 20, done, headers, tokens=100)

    assert done == ["odd"]
    assert sum(site.front.metrics(COUNTED).values()) - sum(before.values()) == 3
    for engine in (site.prefill, site.decode):  # what reaches them has been cleaned
        assert sum(engine.metrics("vllm_disagg_sched_hints_total").values()) == 0
