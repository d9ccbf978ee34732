"""Greedy answers of the split deployment equal the undivided engine's, token for token, in float32."""

from __future__ import annotations

import pytest

from tests.e2e import cases
from tests.e2e.client import Case, Verdict, compare
from tests.e2e.conftest import Deployment
from tests.e2e.engines import MAX_MODEL_LEN


async def judge(deployment: Deployment, asked: list[Case], *, at_once: int = 4) -> Verdict:
    verdict = await compare(deployment.proxy.url, deployment.undivided.url, asked, at_once=at_once)
    print(f"{len(asked)} requests: {verdict}")
    assert verdict.different == []
    assert len(verdict.ties) <= max(1, len(asked) // 20)
    deployment.assert_alive()
    return verdict


async def test_prompt_lengths_around_block_boundaries(deployment: Deployment) -> None:
    await judge(deployment, cases.length_cases([1, 2, *cases.boundaries([1, 2, 3, 5, 9, 16])], seed=1))


@pytest.mark.heavy
async def test_the_longest_prompts(deployment: Deployment) -> None:
    await judge(deployment, cases.length_cases([1500, 2000], seed=2))


async def test_chats(deployment: Deployment) -> None:
    await judge(deployment, cases.chat_cases(12, seed=100))


async def test_request_shapes(deployment: Deployment) -> None:
    await judge(deployment, cases.shape_cases(seed=200))


@pytest.mark.heavy
async def test_shapes_that_cannot_be_split_are_served_locally_with_the_same_answer(deployment: Deployment) -> None:
    await judge(deployment, cases.local_cases(seed=300), at_once=1)


@pytest.mark.heavy
async def test_a_shared_prefix_sent_twice(deployment: Deployment) -> None:
    prefix = cases.prompt_of(100, 400)
    asked = [
        Case(name=f"shared {index}", body={"prompt": [*prefix, *cases.prompt_of(20, 401 + index)], "max_tokens": 6})
        for index in (0, 1, 1, 2)
    ]
    received = "vllm_disagg_kv_tokens_received_total"
    before = deployment.decode.metrics(received)[received]

    await judge(deployment, asked, at_once=1)

    # 120 tokens at first; then 96 of them (3 blocks) are cached on decode; the third is the second again
    assert deployment.decode.metrics(received)[received] - before == 120 + 24 + 24 + 24


@pytest.mark.heavy
async def test_every_block_boundary(deployment: Deployment) -> None:
    blocks = range(1, 2000 // 32 + 1)
    lengths = [length for length in cases.boundaries(list(blocks)) if length <= 2000]

    await judge(deployment, cases.length_cases(lengths, seed=5000, max_tokens=4))


@pytest.mark.heavy
async def test_many_lengths_chats_and_shapes(deployment: Deployment) -> None:
    lengths = [*range(1, 200, 7), MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 2]

    await judge(deployment, cases.length_cases(lengths, seed=9000) + cases.chat_cases(30, seed=9500))
    await judge(deployment, cases.shape_cases(seed=9900, repeat=3))
