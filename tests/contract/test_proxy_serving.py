"""What a client sees when all goes well."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.contract.proxy_harness import PROMPT, all_idle, one_and_one, proxy, until
from vllm_disagg.core.policy import LOCAL_REASONS
from vllm_disagg.proxy.metrics import METRICS
from vllm_disagg.testing.fake_engine import FINGERPRINT, FakeEngine, reference, token_ids_of

CHAT = [{"role": "user", "content": PROMPT}]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completion_is_split_and_equals_the_undivided_engine(stream: bool) -> None:
    async with one_and_one() as (client, prefill, decode):
        answer = await client.complete(stream=stream)

        assert (answer.status, answer.route) == (200, ("split", None))
        assert answer.text == reference(PROMPT, 8)
        assert (prefill.counts.prefills, decode.counts.pulls, decode.counts.local_prefills) == (1, 1, 0)
        await all_idle(prefill, decode)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_split_and_equals_the_undivided_engine(stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"request_id": {}}}}}]
    fields: dict[str, Any] = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    async with one_and_one() as (client, prefill, decode):
        answer = await client.chat(stream=stream, **fields)

        assert answer.route == ("split", None)
        assert answer.text == reference({"messages": CHAT, **fields}, 8)
        assert decode.counts.pulls == 1
        await all_idle(prefill, decode)


@pytest.mark.parametrize("prompt", [token_ids_of(PROMPT), [token_ids_of(PROMPT)], [PROMPT]])
async def test_one_prompt_in_any_form_is_split(prompt: Any) -> None:
    async with one_and_one() as (client, _, _):
        answer = await client.complete(prompt)

        assert (answer.route, answer.text) == (("split", None), reference(PROMPT, 8))


async def test_what_each_engine_is_asked() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "seed": 3,
        "stop": ["x"],
        "min_tokens": 4,
        "cache_salt": "salt",
        "logprobs": 2,
    }
    async with one_and_one() as (client, prefill, decode):
        answer = await client.complete(**fields, unknown="x", model="fake-model")

        asked, then = prefill.requests()[0].json, decode.requests()[0].json
        transfer_id = asked["kv_transfer_params"]["transfer_id"]
        assert asked == {
            "model": "fake-model",
            "prompt": PROMPT,
            "cache_salt": "salt",
            "max_tokens": 1,
            "temperature": 0,
            "stream": False,
            "return_token_ids": True,
            "kv_transfer_params": {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "transfer_id": transfer_id,
            },
        }
        params = then.pop("kv_transfer_params")
        assert then == {"model": "fake-model", "prompt": token_ids_of(PROMPT), "max_tokens": 8, **fields}
        assert params.pop("handoff")
        assert params == {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_prefill_cached_tokens": 0,
        }
        assert answer.text == reference(PROMPT, 8, salt="salt")
        assert client.total("dropped_fields_total") == 1


async def test_targets_reach_both_engines_within_bounds_and_with_the_time_that_is_left() -> None:
    xargs = {"slo_tpot_ms": 0, "slo_priority": "urgent", "mine": "x"}
    async with one_and_one() as (client, prefill, decode):
        body = {"prompt": PROMPT, "max_tokens": 4, "vllm_xargs": xargs}
        headers = {"X-SLO-TTFT-Ms": "5000", "X-SLO-TPOT-Ms": "70", "X-SLO-Priority": "1"}
        answer = await client.post("/v1/completions", body, headers=headers)

        assert answer.status == 200
        asked, then = (engine.requests()[0].json["vllm_xargs"] for engine in (prefill, decode))
        assert asked.keys() == {"slo_ttft_ms", "slo_tpot_ms"}
        assert 0 < then["slo_ttft_ms"] <= asked["slo_ttft_ms"] <= 5000
        assert asked["slo_tpot_ms"] == then["slo_tpot_ms"] == 1.0  # what the body says prevails
        assert then["mine"] == "x"
        assert client.total("slo_hints_total", outcome="clamped") == 1
        assert client.total("slo_hints_total", outcome="ignored") == 1


async def test_chat_asks_prefill_for_the_prompt_and_decode_for_the_rest() -> None:
    sent = {"messages": CHAT, "max_tokens": 5, "max_completion_tokens": 6, "response_format": {"type": "text"}}
    async with one_and_one() as (client, prefill, decode):
        await client.post("/v1/chat/completions", {**sent, "stop": "x"})

        asked, then = prefill.requests()[0].json, decode.requests()[0].json
        assert asked["max_completion_tokens"] == 1
        assert asked["response_format"] == {"type": "text"}  # some chat templates render it
        assert not {"max_tokens", "stop"} & asked.keys()
        params = then.pop("kv_transfer_params")
        assert then == {**sent, "stop": "x"}
        assert params["prompt_token_ids"]


async def test_headers_towards_engines_are_the_proxys_own() -> None:
    sent = {
        "Authorization": "Bearer abc",
        "X-Request-Id": "mine",
        "X-data-parallel-rank": "3",
        "Cookie": "a=b",
        "x-prefiller-host-port": "evil:1",
    }
    async with one_and_one() as (client, prefill, decode):
        answer = await client.post("/v1/completions", {"prompt": PROMPT}, headers=sent)

        ids = set()
        for engine in (prefill, decode):
            headers = {name.lower(): value for name, value in engine.requests()[0].headers.items()}
            ids.add(headers.pop("x-request-id"))
            assert headers.pop("authorization") == "Bearer abc"
            assert headers.keys() <= {
                "host", "content-type", "content-length", "accept", "accept-encoding", "user-agent",
            }  # fmt: skip
        transfer_id = prefill.requests()[0].json["kv_transfer_params"]["transfer_id"]
        assert ids == {f"{answer.headers['X-Request-Id']}-1", f"{answer.headers['X-Request-Id']}-2"}
        assert "mine" not in str(ids)
        assert transfer_id not in str(answer.headers)


@pytest.mark.parametrize("stream", [False, True])
async def test_clients_never_see_kv_parameters(stream: bool) -> None:
    async with one_and_one() as (client, _, _):
        for answer in (await client.complete(stream=stream), await client.chat(stream=stream)):
            assert b"transfer" not in answer.raw
            assert b"secret-host" not in answer.raw


async def test_server_timing_adds_up_to_the_time_to_the_first_event() -> None:
    async with one_and_one() as (client, prefill, _):
        prefill.prefill_s = 0.05
        started_s = asyncio.get_running_loop().time()
        answer = await client.complete(max_tokens=1)
        took_ms = (asyncio.get_running_loop().time() - started_s) * 1000

        stages = dict(stage.split(";dur=") for stage in answer.headers["Server-Timing"].split(", "))
        assert list(stages) == ["admit", "prefill_queue", "prefill_run", "prefill_http", "handover"]
        assert float(stages["prefill_run"]) == pytest.approx(50, abs=1)
        assert sum(map(float, stages.values())) <= took_ms + 1

        local = await client.complete(n=2)
        assert [stage.split(";")[0] for stage in local.headers["Server-Timing"].split(", ")] == ["admit", "local"]


async def test_headers_wait_for_decodes_first_event() -> None:
    async with one_and_one() as (client, _, decode):
        decode.faults.hang = True
        request = client.http.post(f"{client.url}/v1/completions", json={"prompt": PROMPT, "stream": True})
        opening = asyncio.ensure_future(request.__aenter__())
        await until("decode has the request", lambda: decode.requests())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(opening), 0.2)

        await decode.start()  # the hanging exchange breaks; before the first event that is a status, not a broken 200
        answer = await opening
        assert answer.status in (502, 503)
        answer.close()


SHAPES: dict[str, dict[str, Any]] = {
    "several_choices": {"n": 2},
    "best_of": {"best_of": 2},
    "prompt_embeds": {"prompt_embeds": "AAAA"},
    "prompt_form": {"prompt": ["", 1]},
    "several_prompts": {"prompt": [PROMPT, "another"]},
    "echo": {"echo": True},
    "prompt_logprobs": {"prompt_logprobs": 0},
    "prompt_text": {"return_prompt_text": True},
    "routed_experts": {"routed_experts_prompt_start": 1},
    "beam_search": {"use_beam_search": True},
    "suffix": {"suffix": "end"},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 5},
    "multimodal": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
}


@pytest.mark.parametrize("reason", SHAPES)
async def test_a_shape_that_cannot_be_split_runs_locally_and_is_counted(reason: str) -> None:
    fields = SHAPES[reason]
    is_chat = reason in ("prompt_text", "multimodal")
    async with one_and_one() as (client, prefill, decode):
        if is_chat:
            answer = await client.post("/v1/chat/completions", {"messages": CHAT, **fields})
        else:
            answer = await client.post("/v1/completions", {"prompt": PROMPT, **fields})

        assert answer.route == ("local", reason)
        assert not prefill.requests()
        received = decode.requests()[0].json
        assert "kv_transfer_params" not in received
        assert received.items() >= {name: value for name, value in fields.items() if name != "return_prompt"}.items()
        api = "chat" if is_chat else "completions"
        labels = {"api": api, "route": "local", "reason": reason}
        await until("it is counted", lambda: client.total("requests_total", **labels) == 1)


async def test_a_certainly_short_prompt_runs_locally() -> None:
    async with one_and_one(min_split_tokens=30) as (client, _, _):
        assert (await client.complete("x" * 29)).route == ("local", "short_prompt")
        assert (await client.complete("x" * 30)).route == ("split", None)
        assert (await client.complete([1] * 29)).route == ("local", "short_prompt")


async def test_a_prefill_that_holds_nothing_still_gives_the_token_ids() -> None:
    async with one_and_one() as (client, prefill, decode):
        prefill.faults.no_handoff = True
        completion, chat = await client.complete(), await client.chat()

        assert completion.route == chat.route == ("local", "nothing_held")
        assert completion.text == reference(PROMPT, 8)
        assert chat.text == reference({"messages": CHAT}, 8)
        first, second = (item.json for item in decode.requests())
        assert first["prompt"] == token_ids_of(PROMPT)
        assert "kv_transfer_params" not in first
        assert second["kv_transfer_params"].keys() == {"prompt_token_ids"}
        assert not prefill.counts.releases


async def test_a_refused_prompt_gets_decodes_own_answer() -> None:
    async with one_and_one() as (client, prefill, _):
        answer = await client.complete(model="nobody")

        assert (answer.status, answer.route) == (404, ("local", "prefill_rejected"))
        assert answer.json["error"]["message"] == "The model `nobody` does not exist."
        assert not prefill.counts.releases


async def test_what_only_decode_refuses_reaches_the_client_and_frees_prefill() -> None:
    async with one_and_one() as (client, prefill, decode):
        answer = await client.complete(temperature=-1)

        assert answer.status == 400
        assert answer.json["error"]["message"] == "temperature must be non-negative"
        await all_idle(prefill, decode)
        await until("the release is counted", lambda: client.total("releases_total", result="released") == 1)


async def test_without_prefill_instances_everything_runs_locally() -> None:
    async with FakeEngine("decode") as decode, proxy(decode) as client:
        answer = await client.complete()

        assert (answer.route, answer.text) == (("local", "no_prefill"), reference(PROMPT, 8))
        ready = await client.get("/ready")
        assert (ready.status, ready.json["splitting"]) == (200, False)


async def test_a_misfit_is_never_used_for_splitting(caplog: pytest.LogCaptureFixture) -> None:
    other = {**FINGERPRINT, "kv_cache_dtype": "fp8", "only_here": "x"}
    async with (
        FakeEngine("prefill", fingerprint=other) as prefill,
        FakeEngine("decode") as decode,
        proxy(prefill, decode) as client,
    ):
        for _ in range(3):
            assert (await client.complete()).route == ("local", "incompatible")
        assert client.total("incompatible_pairs") == 1
        assert not prefill.requests()
    assert [record.message for record in caplog.records if "pair.incompatible" in record.message] == [
        f"pair.incompatible prefill={prefill.url} decode={decode.url} why=the engines do not fit: kv_cache_dtype is "
        "'fp8' here and 'float32' at the peer; start both with the same kv_cache_dtype"
    ]


async def test_only_factors_that_both_sides_name_are_compared() -> None:
    more = {**FINGERPRINT, "only_here": "x"}
    async with (
        FakeEngine("prefill", fingerprint=more) as prefill,
        FakeEngine("decode") as decode,
        proxy(prefill, decode) as client,
    ):
        assert (await client.complete()).route == ("split", None)


async def test_the_matching_pair_is_chosen_among_misfits() -> None:
    odd = {**FINGERPRINT, "block_size": "32"}
    async with (
        FakeEngine("prefill", fingerprint=odd) as odd_prefill,
        FakeEngine("prefill") as prefill,
        FakeEngine("decode", fingerprint={**FINGERPRINT, "block_size": "64"}) as odd_decode,
        FakeEngine("decode") as decode,
        proxy(odd_prefill, prefill, odd_decode, decode) as client,
    ):
        answers = [await client.complete() for _ in range(4)]

        assert [answer.route for answer in answers] == [("split", None)] * 4
        assert (prefill.counts.prefills, decode.counts.pulls) == (4, 4)


async def test_an_engine_of_the_wrong_role_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        FakeEngine("decode") as decode,
        FakeEngine("decode") as stranger,
        proxy(decode, prefill=(stranger.url,)) as client,
    ):
        assert (await client.complete()).route == ("local", "no_prefill")
        assert client.total("instances_up", role="prefill", instance="0") == 0
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "refused: its role is 'decode', listed as prefill" in errors[0]


async def test_requests_spread_over_instances() -> None:
    async with (
        FakeEngine("prefill", prefill_s=0.05) as p1,
        FakeEngine("prefill", prefill_s=0.05) as p2,
        FakeEngine("decode") as d1,
        FakeEngine("decode") as d2,
        proxy(p1, p2, d1, d2) as client,
    ):
        answers = await asyncio.gather(*(client.complete() for _ in range(8)))

        assert {answer.text for answer in answers} == {reference(PROMPT, 8)}
        assert (p1.counts.prefills, p2.counts.prefills) == (4, 4)
        assert (d1.counts.pulls, d2.counts.pulls) == (4, 4)
        await until("nothing is outstanding", lambda: not any(i.num_tokens for i in client.services.pool.all))


async def test_more_than_a_hundred_at_once() -> None:
    async with one_and_one() as (client, prefill, decode):
        prefill.prefill_s = 0.2
        answers = await asyncio.gather(*(client.complete(f"{i}: {PROMPT}") for i in range(150)))

        assert [answer.text for answer in answers] == [reference(f"{i}: {PROMPT}", 8) for i in range(150)]
        await all_idle(prefill, decode)


async def test_models_health_ready_and_metrics() -> None:
    async with one_and_one() as (client, _, _):
        await client.complete()

        assert (await client.get("/health")).json == {"status": "ok"}
        assert (await client.get("/v1/models")).json["data"][0]["id"] == "fake-model"
        assert (await client.get("/ready")).json == {
            "ready": True,
            "splitting": True,
            "up": {"prefill": 1, "decode": 1},
            "configured": {"prefill": 1, "decode": 1},
        }
        page = (await client.get("/metrics")).raw.decode()
        for name in METRICS:
            assert f"# HELP {name}" in page or f"# HELP {name.removesuffix('_total')}" in page
        assert "127.0.0.1" not in page


def test_every_shape_reason_is_tried() -> None:
    later = {"short_prompt", "no_prefill", "incompatible", "prefill_failed", "prefill_rejected", "nothing_held"}
    assert SHAPES.keys() | later | {"decode_failed", "no_decode"} == LOCAL_REASONS.keys()


async def test_a_stream_arrives_event_by_event() -> None:
    async with one_and_one() as (client, _, decode):
        decode.token_s = 0.02
        body = {"prompt": PROMPT, "max_tokens": 5, "stream": True}
        async with client.http.post(f"{client.url}/v1/completions", json=body) as answer:
            assert isinstance(answer, aiohttp.ClientResponse)
            first = json.loads((await answer.content.readuntil(b"\n\n"))[6:])
            assert first["choices"][0]["text"] == reference(PROMPT, 1)
            assert decode.counts.tokens < 5
            await answer.read()
