"""Two ranks on each side: every rank fetches its own part, and the proof waits for both."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from tests.e2e import cases
from tests.e2e.client import Answer, Case, ask
from tests.e2e.engines import Server, core, engine, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.demo.model import tiny_llama_path

VOCABULARY = 250
RECEIVED = "vllm_disagg_kv_tokens_received_total"


def two_rank_engine(name: str, folder: Path, *, first_core: int, role: str | None) -> Server:
    flags = ["--tensor-parallel-size", "2"]
    server = engine(
        name, model=tiny_llama_path(), index=0, folder=folder, key_file=folder / "key", role=role, flags=flags
    )
    return replace(
        server, env={**server.env, "VLLM_CPU_OMP_THREADS_BIND": f"{core(first_core)}|{core(first_core + 1)}"}
    )


async def answers(url: str, asked: list[Case]) -> list[Answer]:
    """One after the other: engines of two ranks keep both of their cores busy whenever they step."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        return [await ask(http, url, case) for case in asked]


@pytest.mark.full
async def test_answers_are_equal_and_both_ranks_have_read(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    lengths = [5, 31, 32, 33, 100, 300]
    prompts = [[token % VOCABULARY for token in cases.prompt_of(length, 60 + length)] for length in lengths]
    asked = [Case(name=str(len(ids)), body={"prompt": ids, "max_tokens": 8, "ignore_eos": True}) for ids in prompts]
    warm = [Case(name="warm", body={"prompt": [7] * 40, "max_tokens": 2})]  # the first step of a new engine takes 5 s

    with ExitStack() as stack:
        undivided = two_rank_engine("undivided", tmp_path, first_core=0, role=None)
        stack.callback(undivided.kill)
        undivided.start()
        undivided.wait_until_ready()
        expected = await answers(undivided.url, asked)

    with ExitStack() as stack:
        prefill = two_rank_engine("prefill", tmp_path, first_core=0, role="prefill")
        decode = two_rank_engine("decode", tmp_path, first_core=2, role="decode")
        for server in (prefill, decode):
            stack.callback(server.kill)
            server.start()
        for server in (prefill, decode):
            server.wait_until_ready()
            await answers(server.url, warm)
        front = proxy(prefill=[prefill], decode=[decode], folder=tmp_path)
        stack.callback(front.kill)
        front.start()
        front.wait_until_ready("/ready")
        got = await answers(front.url, asked)
        received = decode.metrics(RECEIVED)[RECEIVED]

    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert received == sum(lengths)
