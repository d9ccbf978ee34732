"""The only decode instance is killed: the prefill instance serves whole requests until it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp

from tests.e2e import cases
from tests.e2e.client import Answer, Case, ask
from tests.e2e.conftest import emulated_pair
from tests.e2e.engines import ForkHost


def requests() -> list[Case]:
    plain = [
        Case(name=f"{index}", body={"prompt": cases.prompt_of(60 + 170 * index, 30_000 + index), "max_tokens": 12})
        for index in range(6)
    ]
    chat = {"messages": [{"role": "user", "content": "Tell me of capitals."}], "max_tokens": 12}
    return [*plain[:3], *(replace(case, stream=True) for case in plain[3:]), Case(name="chat", body=chat)]


async def answers(url: str, asked: Sequence[Case]) -> list[Answer]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        return list(await asyncio.gather(*(ask(http, url, case) for case in asked)))


async def until_routed(url: str, route: str, *, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    case = Case(name="probe", body={"prompt": "Who is there?", "max_tokens": 3})
    while True:
        try:
            (answer,) = await answers(url, [case])
        except AssertionError:  # it met the dead engine before the proxy knew
            pass
        else:
            if answer.headers["x-disagg-route"] == route:
                return
        assert time.monotonic() < deadline_s, f"no request was {route}"
        await asyncio.sleep(0.1)  # bounded polling through the proxy


async def test_a_prefill_instance_stands_in_for_all_decode_instances(host: ForkHost, tmp_path: Path) -> None:
    with emulated_pair(tmp_path, host) as pair:
        url, asked = pair.proxy.url, requests()
        split = await answers(url, asked)
        assert {answer.headers["x-disagg-route"] for answer in split} == {"split"}

        pair.decode.kill()
        await until_routed(url, "local", within_s=20)
        alone = await answers(url, asked)
        for answer in alone:
            assert (answer.headers["x-disagg-route"], answer.headers["x-disagg-reason"]) == ("local", "no_decode")
        assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in split]
        assert sum(pair.prefill.metrics("vllm_disagg_kv_held_requests").values()) == 0  # they leave nothing behind

        pair.decode.start()
        pair.decode.wait_until_ready()
        await until_routed(url, "split", within_s=10)
