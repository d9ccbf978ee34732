"""Prefill is killed under load: every client still gets the right answer, and splitting resumes when it is back."""

from __future__ import annotations

import asyncio
import signal
import time

import aiohttp
import pytest

from tests.e2e import cases
from tests.e2e.client import Answer, Case, ask, compare
from tests.e2e.conftest import Deployment

IN_FLIGHT = 8


def requests(seed: int) -> list[Case]:
    return [
        Case(name=f"{index}", body={"prompt": cases.prompt_of(400 + 50 * index, seed + index), "max_tokens": 8})
        for index in range(IN_FLIGHT)
    ]


async def answers(url: str, asked: list[Case]) -> list[Answer]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        return list(await asyncio.gather(*(ask(http, url, case) for case in asked)))


async def prefill_is_busy(deployment: Deployment) -> None:
    """Until prefill computes the prompts. An engine tells of a step when it is over, which is too late: the proxy knows
    when it has sent them, and their computation takes seconds."""
    deadline_s, outstanding = time.monotonic() + 20, "vllm_disagg_proxy_outstanding_tokens"
    while deployment.proxy.metrics(outstanding)[outstanding] == 0:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)  # bounded polling of the proxy's metrics
    await asyncio.sleep(0.5)


async def splits_again(deployment: Deployment, *, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    case = Case(name="probe", body={"prompt": "Are you back?", "max_tokens": 1})
    while (await answers(deployment.proxy.url, [case]))[0].headers["x-disagg-route"] != "split":
        assert time.monotonic() < deadline_s, "splitting did not resume"
        await asyncio.sleep(0.1)  # bounded polling through the proxy


@pytest.mark.heavy
async def test_killed_under_load_and_restarted(deployment: Deployment) -> None:
    asked = requests(20_000)
    expected = await answers(deployment.undivided.url, asked)

    with deployment.slow_prefill():
        under_way = asyncio.create_task(answers(deployment.proxy.url, asked))
        await prefill_is_busy(deployment)
        deployment.prefill.kill()
        begun_s = time.monotonic()
        got = await under_way

    print(
        f"answered {time.monotonic() - begun_s:.1f} s after the kill; routes",
        [a.headers["x-disagg-route"] for a in got],
    )
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    deployment.decode.assert_alive()

    deployment.prefill.start()
    deployment.prefill.wait_until_ready()
    await splits_again(deployment, within_s=10)
    verdict = await compare(deployment.proxy.url, deployment.undivided.url, requests(21_000))
    assert verdict.different == []


@pytest.mark.heavy
async def test_frozen_under_load_and_thawed(deployment: Deployment) -> None:
    """A frozen peer answers nothing and closes nothing: only deadlines help. Each request ends within its own."""
    asked = requests(22_000)
    expected = await answers(deployment.undivided.url, asked)

    with deployment.slow_prefill():
        under_way = asyncio.create_task(answers(deployment.proxy.url, asked))
        await prefill_is_busy(deployment)
        deployment.prefill.signal_all(signal.SIGSTOP)
        try:
            got = await under_way
        finally:
            deployment.prefill.signal_all(signal.SIGCONT)

    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    deployment.decode.assert_alive()
    await splits_again(deployment, within_s=30)
