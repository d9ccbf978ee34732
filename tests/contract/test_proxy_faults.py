"""What a client sees when engines fail: a slower answer, a clear error, never a wrong token and never a hang."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from tests.contract.proxy_harness import PROMPT, Answer, all_idle, one_and_one, proxy, proxy_of, until
from vllm_disagg.config import ProxySettings
from vllm_disagg.testing.fake_engine import FakeEngine, reference


async def test_the_only_prefill_dies_with_eight_requests_in_flight_and_returns() -> None:
    async with one_and_one() as (client, prefill, decode):
        prefill.prefill_s = 30.0
        requests = _start(client.complete(f"{i}: {PROMPT}", stream=i % 2 == 0) for i in range(8))
        await until("eight prefills run", lambda: prefill.running == 8)
        prefill.die()
        answers = await asyncio.gather(*requests)

        assert [answer.text for answer in answers] == [reference(f"{i}: {PROMPT}", 8) for i in range(8)]
        assert {answer.route for answer in answers} == {("local", "prefill_failed")}
        assert client.total("leg_failures_total", leg="prefill", cause="disconnect") == 8
        await until("its death is noticed", lambda: not client.total("instances_up", role="prefill", instance="0"))
        assert (await client.complete()).route == ("local", "no_prefill")

        prefill.prefill_s = 0.0
        await prefill.start()
        await until("it is back", lambda: client.total("instances_up", role="prefill", instance="0"))
        assert (await client.complete()).route == ("split", None)
        await all_idle(prefill, decode)


async def test_a_failed_prefill_is_tried_once_on_another() -> None:
    async with (
        FakeEngine("prefill") as p1,
        FakeEngine("prefill") as p2,
        FakeEngine("decode") as decode,
        proxy(p1, p2, decode) as client,
    ):
        p1.faults.crash_on_request = True
        answer = await client.complete()

        assert (answer.route, answer.text) == (("split", None), reference(PROMPT, 8))
        first, second = (p.requests()[0].json["kv_transfer_params"]["transfer_id"] for p in (p1, p2))
        assert first != second
        await all_idle(p2, decode)


@pytest.mark.parametrize(("status", "cause"), [(500, "server_error"), (503, "overloaded"), (429, "overloaded")])
async def test_a_prefill_that_answers_with_an_error_costs_a_local_run(status: int, cause: str) -> None:
    async with one_and_one() as (client, prefill, _):
        prefill.faults.status = status
        answer = await client.complete()

        assert (answer.route, answer.text) == (("local", "prefill_failed"), reference(PROMPT, 8))
        assert client.total("leg_failures_total", leg="prefill", cause=cause) == 1
        assert client.total("instances_up", role="prefill", instance="0") == 1


async def test_a_healthy_but_hanging_prefill_costs_its_deadline() -> None:
    async with one_and_one(prefill_timeout_s=0.2) as (client, prefill, decode):
        prefill.faults.hang = True
        answer = await client.complete()

        assert (answer.route, answer.text) == (("local", "prefill_failed"), reference(PROMPT, 8))
        assert client.total("leg_failures_total", leg="prefill", cause="timeout") == 1
        assert "prefill_lost" in answer.headers["Server-Timing"]
        await until("it was told to release", lambda: len(prefill.counts.releases) == 1)
        await all_idle(prefill, decode)


async def test_an_engine_found_dead_by_its_probe_is_not_waited_for() -> None:
    async with one_and_one() as (client, prefill, _):
        prefill.faults.hang = True
        request = asyncio.ensure_future(client.complete())
        await until("the prefill has arrived", lambda: prefill.requests())
        prefill.faults.healthy = False
        answer = await request

        assert (answer.route, answer.text) == (("local", "prefill_failed"), reference(PROMPT, 8))
        assert client.total("leg_failures_total", leg="prefill", cause="down") == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_frozen_engine_costs_a_few_probes_and_never_a_hang(role: str) -> None:
    async with (
        FakeEngine("prefill") as prefill,
        FakeEngine("decode") as d1,
        FakeEngine("decode") as d2,
        proxy(prefill, d1, d2, probe_timeout_s=0.1, connect_timeout_s=1.0) as client,
    ):
        frozen = prefill if role == "prefill" else d1
        frozen.faults.freeze = True
        answer = await client.complete()

        assert answer.text == reference(PROMPT, 8)
        assert client.total("leg_failures_total", leg=role, cause="down") == 1
        assert client.total("instances_up", role=role, instance="0") == 0

        frozen.faults.freeze = False
        await until("it is back", lambda: client.total("instances_up", role=role, instance="0"))


async def test_a_decode_that_freezes_mid_stream_ends_the_stream() -> None:
    async with one_and_one(probe_timeout_s=0.1) as (client, _, decode):
        decode.token_s = 0.02
        body = {"prompt": PROMPT, "max_tokens": 1000, "stream": True}
        async with client.http.post(f"{client.url}/v1/completions", json=body) as answer:
            await answer.content.readuntil(b"\n\n")
            decode.token_s, decode.faults.freeze = 30.0, True
            raw = await answer.read()
        last = Answer(status=answer.status, headers=answer.headers, raw=raw).events[-1]
        assert (last["error"]["code"], last["error"]["retryable"]) == (503, True)


async def test_wrong_kv_would_show() -> None:
    async with one_and_one() as (client, _, decode):
        decode.faults.wrong_kv = True
        assert (await client.complete()).text != reference(PROMPT, 8)


async def test_an_unused_handoff_is_used_on_another_decode_instance() -> None:
    async with (
        FakeEngine("prefill") as prefill,
        FakeEngine("decode") as d1,
        FakeEngine("decode") as d2,
        proxy(prefill, d1, d2, probe_interval_s=60.0) as client,
    ):
        d1.die()  # unnoticed: the next probe is a minute away
        answers = [await client.complete() for _ in range(2)]

        assert [answer.route for answer in answers] == [("split", None)] * 2
        assert (d2.counts.pulls, d2.counts.local_prefills) == (2, 0)
        assert client.total("leg_failures_total", leg="decode", cause="connect") == 1
        await all_idle(prefill, d2)


@pytest.mark.parametrize("fault", ["crash_on_request", "status", "error_first"])
async def test_a_decode_that_fails_before_its_first_event_is_replaced_by_a_local_run(fault: str) -> None:
    values = {"crash_on_request": True, "status": 503, "error_first": 500}
    async with (
        FakeEngine("prefill") as prefill,
        FakeEngine("decode") as d1,
        FakeEngine("decode") as d2,
        proxy(prefill, d1, d2) as client,
    ):
        setattr(d1.faults, fault, values[fault])
        answer = await client.complete(stream=True)

        assert (answer.route, answer.text) == (("local", "decode_failed"), reference(PROMPT, 8))
        assert (d2.counts.pulls, d2.counts.local_prefills) == (0, 1)
        await all_idle(prefill, d2)


@pytest.mark.parametrize(
    ("fault", "value", "status"),
    [("crash_on_request", True, 502), ("status", 500, 502), ("status", 503, 503), ("hang", True, 504)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_only_decode_fails(fault: str, value: Any, status: int, stream: bool) -> None:
    async with one_and_one(first_event_timeout_s=0.3, probe_interval_s=60.0) as (client, prefill, decode):
        setattr(decode.faults, fault, value)
        answer = await client.complete(stream=stream)

        assert answer.status == status
        _assert_openai_error(answer, status)
        assert ("Retry-After" in answer.headers) == (status == 503)
        assert str(decode.port) not in answer.raw.decode()
        await all_idle(prefill)


async def test_an_error_event_that_is_the_requests_own_fault_is_relayed() -> None:
    async with FakeEngine("decode") as d1, FakeEngine("decode") as d2, proxy(d1, d2) as client:
        d1.faults.error_first = d2.faults.error_first = 400
        answer = await client.complete(stream=True)

        assert answer.status == 200
        assert answer.events[0]["error"]["code"] == 400
        assert len(d1.requests() + d2.requests()) == 1


@pytest.mark.parametrize("fault", ["die_after_tokens", "cut_after_tokens"])
async def test_decode_dies_mid_stream(fault: str) -> None:
    async with one_and_one() as (client, prefill, decode):
        setattr(decode.faults, fault, 3)
        answer = await client.complete(stream=True)

        assert (answer.status, answer.route) == (200, ("split", None))
        *tokens, last = answer.events
        assert reference(PROMPT, 3).startswith("".join(event["choices"][0]["text"] for event in tokens))
        assert last["error"]["retryable"] is True
        assert last["error"].keys() == {"message", "type", "param", "code", "retryable"}
        assert client.total("leg_failures_total", leg="stream", cause="disconnect") == 1
        assert len(decode.requests()) == 1
        await all_idle(prefill)


async def test_a_stream_that_falls_silent_ends_with_an_error_event() -> None:
    async with one_and_one(idle_timeout_s=0.2) as (client, _, decode):
        decode.token_s = 0.05
        body = {"prompt": PROMPT, "max_tokens": 50, "stream": True}
        async with client.http.post(f"{client.url}/v1/completions", json=body) as answer:
            decode.token_s = 30.0
            raw = await answer.read()
        last = Answer(status=answer.status, headers=answer.headers, raw=raw).events[-1]
        assert last["error"]["code"] == 504
        await all_idle(decode)


@pytest.mark.parametrize("stream", [False, True])
async def test_with_all_decodes_down_a_prefill_instance_serves_whole_requests(stream: bool) -> None:
    async with one_and_one() as (client, prefill, decode):
        decode.die()
        await until("its death is noticed", lambda: not client.total("instances_up", role="decode", instance="0"))

        for answer in (await client.complete(stream=stream), await client.complete(stream=stream, n=1, echo=False)):
            assert (answer.status, answer.route) == (200, ("local", "no_decode"))
            assert answer.text == reference(PROMPT, 8)
        asked = [request.json for request in prefill.requests()]
        assert [body["max_tokens"] for body in asked] == [8, 8]
        assert not any("kv_transfer_params" in body for body in asked)
        ready = await client.get("/ready")
        assert (ready.status, ready.json["ready"], ready.json["splitting"]) == (200, True, False)
        assert (await client.get("/v1/models")).status == 200

        await decode.start()
        await until("it is back", lambda: client.total("instances_up", role="decode", instance="0"))
        assert (await client.complete()).route == ("split", None)
        await all_idle(prefill, decode)


async def test_a_decode_that_dies_while_the_prompt_is_computed_is_stood_in_for() -> None:
    async with one_and_one() as (client, prefill, decode):
        prefill.prefill_s = 0.2
        asked = asyncio.create_task(client.complete())
        await until("prefill computes", lambda: prefill.running)
        decode.die()
        answer = await asked

        assert (answer.status, answer.route) == (200, ("local", "no_decode"))
        assert answer.text == reference(PROMPT, 8)
        await all_idle(prefill)
        assert len(prefill.counts.releases) == 1


async def test_a_prefill_that_stands_in_and_fails_too_is_an_error() -> None:
    async with one_and_one() as (client, prefill, decode):
        decode.die()
        await until("its death is noticed", lambda: not client.total("instances_up", role="decode", instance="0"))
        prefill.faults.status = 500

        _assert_openai_error(await client.complete(), 502)
        assert len(prefill.requests()) == 1


async def test_with_everybody_down_it_is_refused_at_once() -> None:
    async with one_and_one() as (client, prefill, decode):
        decode.die()
        prefill.die()
        await until("decode's death is noticed", lambda: not client.total("instances_up", role="decode", instance="0"))
        await until(
            "prefill's death is noticed", lambda: not client.total("instances_up", role="prefill", instance="0")
        )
        answer = await client.complete()

        _assert_openai_error(answer, 503)
        assert int(answer.headers["Retry-After"]) >= 1
        labels = {"api": "completions", "route": "refuse", "reason": "no_instance"}
        await until("it is counted", lambda: client.total("requests_total", **labels) == 1)
        ready = await client.get("/ready")
        assert (ready.status, ready.json["ready"]) == (503, False)
        assert "Retry-After" in ready.headers
        _assert_openai_error(await client.get("/v1/models"), 503)
        assert (await client.get("/health")).status == 200

        await decode.start()
        await until("it is back", lambda: client.total("instances_up", role="decode", instance="0"))
        assert (await client.complete()).text == reference(PROMPT, 8)


async def test_engines_may_start_after_the_proxy() -> None:
    decode = FakeEngine("decode")
    await decode.start()
    await decode.stop()
    async with proxy_of(ProxySettings(decode=(decode.url,), probe_interval_s=0.05)) as client:
        assert (await client.complete()).status == 503
        await decode.start()
        await until("it is up", lambda: client.total("instances_up", role="decode", instance="0"))
        assert (await client.complete()).status == 200
        await decode.stop()


async def test_an_engine_restarted_as_another_kind_is_looked_at_again() -> None:
    async with one_and_one() as (client, prefill, _):
        prefill.die()
        await until("its death is noticed", lambda: not client.total("instances_up", role="prefill", instance="0"))
        prefill.fingerprint = {**(prefill.fingerprint or {}), "block_size": "128"}
        await prefill.start()
        await until("it is back", lambda: client.total("instances_up", role="prefill", instance="0"))

        assert (await client.complete()).route == ("local", "incompatible")


def _start(work: Iterable[Any]) -> list[asyncio.Future[Answer]]:
    return [asyncio.ensure_future(item) for item in work]


def _assert_openai_error(answer: Answer, status: int) -> None:
    assert answer.status == status
    error = answer.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status


async def test_one_cut_stream_does_not_take_a_living_engine_out() -> None:
    async with one_and_one(probe_interval_s=30.0) as (client, _, decode):
        decode.faults.cut_after_tokens = 3
        await client.complete(stream=True)
        decode.faults.cut_after_tokens = None

        assert (await client.complete()).status == 200
        assert client.total("instances_up", role="decode", instance="0") == 1


async def test_an_answer_that_takes_too_long_is_not_begun_on_another_engine() -> None:
    async with (
        FakeEngine("prefill") as prefill,
        FakeEngine("decode") as d1,
        FakeEngine("decode") as d2,
        proxy(prefill, d1, d2, first_event_timeout_s=0.2) as client,
    ):
        d1.faults.hang = d2.faults.hang = True
        answer = await client.complete()

        assert answer.status == 504
        assert len(d1.requests() + d2.requests()) == 1


async def test_a_deadline_that_ends_in_the_moment_an_engine_is_declared_down_ends_nothing_else() -> None:
    """asyncio refuses to move a timeout that is just ending; the watch must survive that."""
    async with one_and_one() as (client, prefill, _):
        instance = client.services.pool.prefill[0]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10) as clock:
                instance.clocks.add(clock)
                clock.reschedule(0.0)
                while not clock.expired():  # the loop turns until the deadline is being carried out
                    await asyncio.sleep(0)
                    client.services.pool.declare_down(instance, "down in this very moment")
        instance.clocks.discard(clock)
        await until("it is up again", lambda: client.total("instances_up", role="prefill", instance="0"))
        assert (await client.complete()).route == ("split", None)
        await all_idle(prefill)


async def test_what_prefill_had_cached_reaches_decode_for_the_clients_usage() -> None:
    async with one_and_one() as (client, prefill, decode):
        prefill.num_cached_tokens = 17
        await client.complete()

        (request,) = decode.requests()
        assert request.json["kv_transfer_params"]["remote_prefill_cached_tokens"] == 17
