"""Clients that leave at random moments leave nothing behind on either engine: no block, no thread, no descriptor, no
memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import aiohttp
import pytest

from tests.e2e import cases
from tests.e2e.conftest import Deployment
from tests.e2e.engines import EmulatedEngine, Server
from tests.e2e.footprint import Footprint, footprint

AT_ONCE = 12
CALM_S = 3.0
REST_S = 60.0
"""For connections that are kept open for a while, and for what runs on after its client has left."""

MEMORY_MARGIN = 0.02
KEPT_CONNECTIONS = 4
"""The proxy probes each of two engines every second, on the connection that was idle longest, and closes one that was
idle for two: of a burst so many may stay open. Nothing else may be open that was not before."""

PROXY_MARGIN_BYTES = 8 * 2**20
"""The proxy is so small that 2 % of it is what an allocator keeps."""

STEPS = "vllm_disagg_kv_transitions_total"

COMMON = {
    "queued.client_left",
    "prefilling.client_left",
    "held.forbidden",
    "queued_on_decode.client_left",
    "running.client_left",
}
RARE = {"prefilling.refused", "receiving.client_left", "received.client_left", "running.finished"}
"""A client leaves in each of these moments, and just after the last one; some of the second kind last only
milliseconds."""


def load(server: Server) -> tuple[float, float, float]:
    """KV cache usage, running and waiting requests."""
    metrics = server.metrics("vllm:")
    names = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
    return metrics[names[0]], metrics[names[1]], metrics[names[2]]


def steps(deployment: Deployment) -> Counter[str]:
    """How often which step was taken on either side."""
    found = {**deployment.prefill.metrics(STEPS), **deployment.decode.metrics(STEPS)}
    return Counter({name[len(STEPS) + 1 : -1]: int(value) for name, value in found.items()})


def body_of(index: int, rng: random.Random) -> dict[str, Any]:
    """A request of its own."""
    return {
        "model": "model", "prompt": cases.prompt_of(rng.choice([5, 20, 40, 90]), 10_000 + index), "max_tokens": 8,
        "ignore_eos": True, "stream": rng.random() < 0.5, "temperature": 0,
    }  # fmt: skip


async def send(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with http.post(url + "/v1/completions", json=body) as response:
        await response.read()


async def leave_early(http: aiohttp.ClientSession, url: str, body: dict[str, Any], *, wait_s: float) -> bool:
    """Send a request and leave after a while. Whether the answer came first."""
    try:
        await asyncio.wait_for(send(http, url, body), wait_s)
    except TimeoutError:
        return False
    return True


async def time_of_a_crowd(deployment: Deployment, rng: random.Random, seed: int) -> float:
    """Seconds until as many as are out at once are all answered: who leaves within it leaves in every state, however
    slow the machine is now."""
    begun_s, url = time.monotonic(), deployment.proxy.url
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        bodies = [body_of(seed * 100_000 + 50_000 + index, rng) for index in range(AT_ONCE)]
        await asyncio.gather(*(send(http, url, body) for body in bodies))
    return time.monotonic() - begun_s


async def cancel_many(deployment: Deployment, count: int, *, seed: int) -> int:
    """Returns how many left before their answer. Both engines are calm and empty afterwards."""
    rng, gate = random.Random(seed), asyncio.Semaphore(AT_ONCE)
    await empty(deployment, within_s=REST_S)  # an earlier test may have left holds to their leases
    longest_s = 0.6 if deployment.is_emulated else await time_of_a_crowd(deployment, rng, seed)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def one(index: int) -> bool:
            async with gate:
                body = body_of(index, rng)
                return await leave_early(http, deployment.proxy.url, body, wait_s=rng.uniform(0.0, longest_s))

        answered = await asyncio.gather(*(one(seed * 100_000 + index) for index in range(count)))
    calm_s = await empty(deployment, within_s=CALM_S)
    print(f"{count - sum(answered)} of {count} left early; calm after {calm_s:.2f} s", flush=True)
    return count - sum(answered)


async def empty(deployment: Deployment, *, within_s: float) -> float:
    """Until no block of either engine is in use, and nothing runs or waits. Returns how long that took, in seconds."""
    begun_s, nothing = time.monotonic(), ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    while (now := (load(deployment.prefill), load(deployment.decode))) != nothing:
        assert time.monotonic() - begun_s < within_s, f"{now} after {within_s} s"
        await asyncio.sleep(0.05)  # bounded polling of the engines' metrics
    return time.monotonic() - begun_s


async def most_of(deployment: Deployment) -> dict[str, Footprint]:
    """The most that each server uses at rest within some seconds: connections that are kept come and go."""
    found: dict[str, Footprint] = {}
    for _ in range(6):
        for name in ("prefill", "decode", "proxy"):
            found[name] = footprint(getattr(deployment, name)).most(found.get(name, Footprint()))
        await asyncio.sleep(1.0)
    return found


def allowed_bytes(name: str, before: Footprint) -> float:
    more = PROXY_MARGIN_BYTES if name == "proxy" else before.memory_bytes * MEMORY_MARGIN
    return before.memory_bytes + more


async def grown(deployment: Deployment, before: dict[str, Footprint]) -> dict[str, str]:
    """Which servers use more than before, once they have come to rest, and of what."""
    deadline_s = time.monotonic() + REST_S
    ports = {server.port for server in (deployment.prefill, deployment.decode, deployment.proxy)}
    while True:
        after = {name: footprint(getattr(deployment, name)) for name in before}
        found = {
            name: after[name].since(before[name])
            for name in before
            if after[name].threads > before[name].threads
            or after[name].lasting(ports) > before[name].lasting(ports)
            or after[name].descriptors.total() > before[name].descriptors.total() + KEPT_CONNECTIONS
            or after[name].memory_bytes > allowed_bytes(name, before[name])
        }
        if not found or time.monotonic() > deadline_s:
            for name, most in before.items():
                print(f"{name}: {most}, then {after[name]}: {after[name].since(most)}", flush=True)
            return found
        await asyncio.sleep(1.0)  # bounded polling of processes


def slow_down(deployment: Deployment) -> None:
    """Emulated engines are so fast that hardly anybody could leave them in time."""
    for server in (deployment.prefill, deployment.decode):
        if isinstance(server, EmulatedEngine):
            server.inject({"kind": "slow", "factor": 30.0})


def speed_up(deployment: Deployment) -> None:
    for server in (deployment.prefill, deployment.decode):
        if isinstance(server, EmulatedEngine):
            server.inject()


@pytest.mark.heavy
async def test_cancelled_requests_leave_no_block_behind(deployment: Deployment) -> None:
    count, before = 300 if deployment.is_emulated else 100, steps(deployment)
    slow_down(deployment)
    try:
        num_left = await cancel_many(deployment, count, seed=1)
    finally:
        speed_up(deployment)

    taken = steps(deployment) - before
    print(dict(sorted(taken.items())))
    assert num_left > count * 0.2
    assert taken["prefilling.granted"] > count / 10, "too few left after their prefill"
    deployment.assert_alive()
    draining = deployment.decode.metrics("vllm_disagg_kv_draining_requests")
    assert draining["vllm_disagg_kv_draining_requests"] == 0


@pytest.mark.full
async def test_thousands_of_cancelled_requests_leave_nothing_behind(deployment: Deployment) -> None:
    count, warm = (5000, 1000) if deployment.is_emulated else (500, 100)
    slow_down(deployment)
    try:
        await cancel_many(deployment, warm, seed=2)
        await asyncio.sleep(10.0)  # connections that were kept open are closed by now
        before = await most_of(deployment)
        counted, num_left, seed = steps(deployment), 0, 3
        while num_left < count:
            num_left += await cancel_many(deployment, count // 5, seed=seed)
            seed += 1
    finally:
        speed_up(deployment)

    taken = steps(deployment) - counted
    print(f"{num_left} clients left:", dict(sorted(taken.items())), flush=True)
    assert set(taken) >= COMMON
    assert len(set(taken) & RARE) >= 2
    assert await grown(deployment, before) == {}
    deployment.assert_alive()
