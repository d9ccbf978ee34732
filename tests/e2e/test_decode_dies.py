"""The only decode instance is killed: the prefill instance serves whole requests until it is back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from tests.e2e import cases
from tests.e2e.client import Answer, Case
from tests.e2e.conftest import Deployment
from tests.e2e.test_prefill_dies import answers, splits_again


def requests(seed: int) -> list[Case]:
    plain = [
        Case(name=f"{index}", body={"prompt": cases.prompt_of(60 + 170 * index, seed + index), "max_tokens": 12})
        for index in range(6)
    ]
    chat = {"messages": [{"role": "user", "content": f"Tell me of number {seed}."}], "max_tokens": 12}
    return [*plain[:3], *(replace(case, stream=True) for case in plain[3:]), Case(name="chat", body=chat)]


async def until_stood_in(deployment: Deployment) -> Answer:
    deadline_s = time.monotonic() + 20
    case = Case(name="probe", body={"prompt": "Who is there?", "max_tokens": 3})
    while True:
        try:
            (answer,) = await answers(deployment.proxy.url, [case])
        except AssertionError:  # it met the dead engine before the proxy knew
            assert time.monotonic() < deadline_s, "nobody stands in"
            await asyncio.sleep(0.1)  # bounded polling through the proxy
        else:
            return answer


@pytest.mark.heavy
async def test_a_prefill_instance_stands_in_for_all_decode_instances(deployment: Deployment) -> None:
    asked = requests(30_000)
    expected = await answers(deployment.undivided.url, asked)

    deployment.decode.kill()
    first = await until_stood_in(deployment)
    got = await answers(deployment.proxy.url, asked)

    for answer in (first, *got):
        assert (answer.headers["x-disagg-route"], answer.headers["x-disagg-reason"]) == ("local", "no_decode")
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    held = deployment.prefill.metrics("vllm_disagg_kv_held_requests")
    assert sum(held.values()) == 0  # whole requests leave nothing behind

    deployment.decode.start()
    deployment.decode.wait_until_ready()
    await splits_again(deployment, within_s=10)
