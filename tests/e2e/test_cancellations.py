"""Clients that leave at random moments leave nothing behind on either engine."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp

from tests.e2e import cases
from tests.e2e.conftest import Deployment
from tests.e2e.engines import Server

NUM_REQUESTS = 300
AT_ONCE = 4
CALM_S = 3.0


def load(server: Server) -> tuple[float, float, float]:
    """KV cache usage, running and waiting requests."""
    metrics = server.metrics("vllm:")
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
    return metrics[names[0]], metrics[names[1]], metrics[names[2]]


async def leave_early(
    http: aiohttp.ClientSession, url: str, index: int, rng: random.Random, *, longest_wait_s: float
) -> bool:
    """Send a request and leave after a random while. Whether the answer came first."""
    length, wait_s = rng.choice([5, 20, 40, 90]), rng.uniform(0.0, longest_wait_s)
    body = {
        "model": "model", "prompt": cases.prompt_of(length, 10_000 + index), "max_tokens": 8, "ignore_eos": True,
        "stream": rng.random() < 0.5, "temperature": 0,
    }  # fmt: skip

    async def send() -> None:
        async with http.post(url + "/v1/completions", json=body) as response:
            await response.read()

    try:
        await asyncio.wait_for(send(), wait_s)
    except TimeoutError:
        return False
    return True


async def test_three_hundred_cancelled_requests_leave_no_block_behind(deployment: Deployment) -> None:
    rng, gate = random.Random(11), asyncio.Semaphore(AT_ONCE)
    before = (load(deployment.prefill), load(deployment.decode))
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def one(index: int) -> bool:
            async with gate:
                return await leave_early(http, deployment.proxy.url, index, rng, longest_wait_s=1.6 * deployment.pace)

        answered = await asyncio.gather(*(one(index) for index in range(NUM_REQUESTS)))
    left_s = time.monotonic()

    while (after := (load(deployment.prefill), load(deployment.decode))) != before:
        assert time.monotonic() - left_s < CALM_S, f"{before} before, {after} {CALM_S} s after the last client left"
        await asyncio.sleep(0.05)  # bounded polling of the engines' metrics
    assert after == ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    print(f"{NUM_REQUESTS - sum(answered)} of {NUM_REQUESTS} left early; calm after {time.monotonic() - left_s:.2f} s")
    assert sum(answered) < NUM_REQUESTS * 0.8
    moments = deployment.prefill.metrics("vllm_disagg_kv_holds_total")
    print(f"holds on prefill: {moments}")
    assert moments["vllm_disagg_kv_holds_total{granted}"] > NUM_REQUESTS / 10, "too few left after their prefill"
    deployment.assert_alive()
    draining = deployment.decode.metrics("vllm_disagg_kv_draining_requests")
    assert draining["vllm_disagg_kv_draining_requests"] == 0
