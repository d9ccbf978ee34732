"""The proxy introduces engines to each other before their first request, and again when one of them is a new one."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.contract.proxy_harness import one_and_one, proxy, until
from vllm_disagg.testing.fake_engine import FakeEngine


async def test_every_prefill_instance_is_introduced_to_every_decode_instance_before_any_request() -> None:
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(FakeEngine(role)) for role in ("prefill", "prefill", "decode", "decode")
        ]
        client = await stack.enter_async_context(proxy(*engines))
        runs = sorted(engine.engine_id for engine in engines[:2])

        for decode in engines[2:]:
            await until("the introductions", lambda decode=decode: sorted(decode.counts.introduced) == runs)

        await until("the count", lambda: client.total("introductions_total", result="taken") == 4)
        assert all(not engine.requests() for engine in engines)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_engine_that_was_restarted_is_introduced_again(role: str) -> None:
    async with one_and_one() as (client, prefill, decode):
        await until("the first one", lambda: decode.counts.introduced == [prefill.engine_id])
        restarted = prefill if role == "prefill" else decode
        before = restarted.engine_id

        restarted.die()
        await until("its death is noticed", lambda: not client.total("instances_up", role=role, instance="0"))
        await restarted.start()

        assert restarted.engine_id != before
        await until("the second one", lambda: decode.counts.introduced[-1:] == [prefill.engine_id])


async def test_an_introduction_that_fails_is_tried_again_and_requests_are_split_meanwhile() -> None:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(FakeEngine("prefill"))
        decode = await stack.enter_async_context(FakeEngine("decode"))
        prefill.faults.shy = "error"
        client = await stack.enter_async_context(proxy(prefill, decode))
        await until("the refusal", lambda: client.total("introductions_total", result="refused") >= 1)

        assert (await client.complete()).route[0] == "split"

        prefill.faults.shy = None
        await until("the introduction", lambda: decode.counts.introduced == [prefill.engine_id])


async def test_an_engine_that_knows_of_no_introductions_is_asked_once() -> None:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(FakeEngine("prefill"))
        decode = await stack.enter_async_context(FakeEngine("decode"))
        decode.faults.shy = "unknown"
        client = await stack.enter_async_context(proxy(prefill, decode))

        await until("the answer", lambda: client.total("introductions_total", result="unsupported") == 1)
        for _ in range(20):  # turns of the introducer
            client.services.pool.appeared.set()
            await asyncio.sleep(0)
        assert client.total("introductions_total", result="unsupported") == 1


async def test_a_pair_that_does_not_fit_is_not_introduced() -> None:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(FakeEngine("prefill", fingerprint={"model": "another"}))
        fitting = await stack.enter_async_context(FakeEngine("prefill"))
        decode = await stack.enter_async_context(FakeEngine("decode"))
        client = await stack.enter_async_context(proxy(prefill, fitting, decode))

        await until("the introduction", lambda: client.total("introductions_total", result="taken") == 1)
        assert decode.counts.introduced == [fitting.engine_id]
