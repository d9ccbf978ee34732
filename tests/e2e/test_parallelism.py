"""Prefill and decode of different tensor and pipeline parallelism answer as one undivided engine does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.client import Answer, Case, ask
from tests.e2e.engines import ForkHost, Server, core, emulated_engine, engine, fork_host, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.demo.model import tiny_llama_path

NUM_PROMPTS = 30
RECEIVED = "vllm_disagg_kv_tokens_received_total"
FAILURES = "vllm_disagg_kv_failures_total"

WARM = Case(name="warm", body={"prompt": [7] * 40, "max_tokens": 2}, route=None)

TOO_FEW_CORES = frozenset({"pull_timeout", "peer_silent", "lease_expired", "transport", "handshake_timeout"})

Degrees = tuple[int, int]
"""Tensor-parallel and pipeline degree."""

StartEngine = Callable[[str, str | None, Degrees], Server]
"""Name, role and degrees."""


def name_of(degrees: object) -> str:
    return "tp{}pp{}".format(*degrees) if isinstance(degrees, tuple) else str(degrees)


def prompts() -> list[Case]:
    """Lengths around the ends of blocks and others, every third of them streaming."""
    rng = random.Random(4)
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 128, 500, *(rng.randrange(3, 400) for _ in range(NUM_PROMPTS - 10))]
    return [
        Case(
            name=f"{number}: {length} tokens",
            body={"prompt": [rng.randrange(5, 250) for _ in range(length)], "max_tokens": 8, "ignore_eos": True},
            stream=number % 3 == 2,
        )
        for number, length in enumerate(lengths)
    ]


async def answers(url: str, asked: Sequence[Case], *, at_once: int) -> list[Answer]:
    gate = asyncio.Semaphore(at_once)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:

        async def one(case: Case) -> Answer:
            async with gate:
                return await ask(http, url, case)

        return await asyncio.gather(*map(one, asked))


async def judge(
    start: StartEngine,
    folder: Path,
    prefill: Degrees,
    decode: Degrees,
    expected: Sequence[Answer],
    *,
    at_once: int = 4,
    fetched: float = 1.0,
    allowed: Collection[str] = (),
) -> None:
    """Start a pair and compare its answers, token by token. At least this share of the prompts' tokens must have been
    fetched, and others computed on decode for these causes only."""
    asked = prompts()
    with ExitStack() as stack:
        pair = [start("prefill", "prefill", prefill), start("decode", "decode", decode)]
        for server in pair:
            stack.callback(server.kill)
            server.start()
        for server in pair:
            server.wait_until_ready()
            await answers(server.url, [WARM], at_once=1)  # the first step of a new real engine takes 5 s
        front = proxy(prefill=pair[:1], decode=pair[1:], folder=folder)
        stack.callback(front.kill)
        front.start()
        front.wait_until_ready("/ready")

        got = await answers(front.url, asked, at_once=at_once)
        metrics = pair[1].metrics("vllm_disagg_kv")

        assert [(answer.token_ids, answer.text) for answer in got] == [
            (answer.token_ids, answer.text) for answer in expected
        ]
        assert {answer.headers["x-disagg-route"] for answer in got} == {"split"}
        failures = {name: value for name, value in metrics.items() if name.startswith(FAILURES) and value}
        lengths = [len(case.body["prompt"]) for case in asked]
        print(f"{name_of(prefill)} to {name_of(decode)}: {metrics[RECEIVED]:.0f} of {sum(lengths)} tokens, {failures}")
        assert metrics[RECEIVED] >= fetched * sum(length for length in lengths if length > 1)
        assert {name[len(FAILURES) + 1 : -1] for name in failures} <= set(allowed)
        for server in pair:
            server.assert_alive()


# Emulated engines, whose tokens depend on every byte of KV.


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkHost]:
    started = fork_host(tmp_path_factory.mktemp("host"))
    started.start()
    started.wait_until_ready()
    yield started
    started.kill()


@pytest.fixture(scope="module")
def expected(host: ForkHost, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    folder = tmp_path_factory.mktemp("undivided")
    flags = ["--emulate-layer-groups", "4"]
    undivided = emulated_engine("undivided", host=host, folder=folder, key_file=folder / "key", role=None, flags=flags)
    return answers_of(undivided)


def answers_of(undivided: Server) -> list[Answer]:
    """Start an undivided engine, ask it everything, and end it."""
    undivided.start()
    try:
        undivided.wait_until_ready()
        return asyncio.run(answers(undivided.url, prompts(), at_once=4))
    finally:
        undivided.kill()


UNEQUAL = [
    ((2, 1), (1, 1)),
    ((1, 1), (2, 1)),
    ((4, 1), (2, 1)),
    ((1, 2), (1, 1)),
    ((1, 1), (1, 2)),
    ((2, 2), (1, 1)),
    ((1, 4), (2, 2)),
]


@pytest.mark.parametrize(
    ("transport", "prefill", "decode"),
    [
        *(("nixl", *pair) for pair in UNEQUAL),
        *(("nccl", *pair) for pair in [((1, 1), (1, 1)), *UNEQUAL[:2], UNEQUAL[5]]),
    ],
    ids=name_of,
)
async def test_emulated_engines(
    host: ForkHost, expected: list[Answer], tmp_path: Path, transport: str, prefill: Degrees, decode: Degrees
) -> None:
    create_key_file(tmp_path / "key")

    def start(name: str, role: str | None, degrees: Degrees) -> Server:
        flags = ["--tensor-parallel-size", str(degrees[0]), "--pipeline-parallel-size", str(degrees[1])]
        flags += ["--emulate-layer-groups", "4", "--kv-transport", transport]
        return emulated_engine(name, host=host, folder=tmp_path, key_file=tmp_path / "key", role=role, flags=flags)

    await judge(start, tmp_path, prefill, decode, expected)


# Real ones. vLLM 0.32 starts with two pipeline stages on CPU, but dies at the first request.


def real_engine(
    name: str, role: str | None, degrees: Degrees, *, folder: Path, first_core: int = 0, transport: str = "nixl"
) -> Server:
    tp, _ = degrees
    flags = ["--tensor-parallel-size", str(tp)] if tp > 1 else []
    if role is not None:
        # More ranks than cores: a thread may have to wait long for its turn.
        flags += ["--kv-transport", transport, "--kv-pull-timeout-s", "20"]
    model = tiny_llama_path(num_layers=4, num_kv_heads=4)
    server = engine(name, model=model, index=0, folder=folder, key_file=folder / "key", role=role, flags=flags)
    cores = "|".join(str(core(first_core + rank)) for rank in range(tp))
    return replace(server, env={**server.env, "VLLM_CPU_OMP_THREADS_BIND": cores})


@pytest.fixture(scope="module")
def real_expected(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    return answers_of(real_engine("undivided", None, (1, 1), folder=tmp_path_factory.mktemp("real")))


@pytest.mark.full
@pytest.mark.parametrize("transport", ["nixl", "nccl"])
@pytest.mark.parametrize(("prefill", "decode"), [((2, 1), (1, 1)), ((1, 1), (2, 1))], ids=name_of)
async def test_real_engines(
    real_expected: list[Answer], tmp_path: Path, transport: str, prefill: Degrees, decode: Degrees
) -> None:
    create_key_file(tmp_path / "key")

    def start(name: str, role: str | None, degrees: Degrees) -> Server:
        first = 2 if role == "decode" else 0
        return real_engine(name, role, degrees, folder=tmp_path, first_core=first, transport=transport)

    # One after the other: engines of two ranks keep both of their cores busy whenever they step.
    # Where there are more ranks than cores, vLLM's spinning processes starve our threads now and then for many seconds.
    await judge(start, tmp_path, prefill, decode, real_expected, at_once=1, fetched=0.6, allowed=TOO_FEW_CORES)
