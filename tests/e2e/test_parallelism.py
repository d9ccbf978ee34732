"""Prefill and decode of different tensor and pipeline parallelism answer as one undivided engine does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import aiohttp
import pytest

from tests.e2e.client import Answer, Case, Reference, Verdict, ask, note, refer
from tests.e2e.engines import ForkHost, Server, emulated_engine, engine, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.demo.model import tiny_llama_path

NUM_PROMPTS = 30
RECEIVED = "vllm_disagg_kv_tokens_received_total"
FAILURES = "vllm_disagg_kv_failures_total"

WARM = Case(name="warm", body={"prompt": [7] * 40, "max_tokens": 2}, route=None)

T = TypeVar("T")

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


async def at_most(
    count: int, asked: Sequence[Case], ask_one: Callable[[aiohttp.ClientSession, Case], Awaitable[T]]
) -> list[T]:
    """Ask for all, so many at once."""
    gate = asyncio.Semaphore(count)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as http:

        async def one(case: Case) -> T:
            async with gate:
                return await ask_one(http, case)

        return await asyncio.gather(*map(one, asked))


async def answers(url: str, asked: Sequence[Case], *, at_once: int) -> list[Answer]:
    return await at_most(at_once, asked, lambda http, case: ask(http, url, case))


def references(undivided: Server) -> list[Reference]:
    """Start an undivided engine, ask it everything, and end it."""
    undivided.start()
    try:
        undivided.wait_until_ready()
        return asyncio.run(at_most(4, prompts(), lambda http, case: refer(http, undivided.url, case)))
    finally:
        undivided.kill()


async def judge(
    start: StartEngine,
    folder: Path,
    prefill: Degrees,
    decode: Degrees,
    expected: Sequence[Reference],
    *,
    at_once: int = 4,
    allowed: Collection[str] = (),
) -> None:
    """Start a pair and compare its answers, token by token. Each prompt must have been fetched, unless it was computed
    on decode for one of the allowed causes."""
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
        for server in pair:
            server.assert_alive()

    verdict = Verdict()
    for case, ours, reference in zip(asked, got, expected, strict=True):
        note(case, ours, reference, verdict)
    failures = {name[len(FAILURES) + 1 : -1]: value for name, value in metrics.items() if name.startswith(FAILURES)}
    failures = {cause: value for cause, value in failures.items() if value}
    lengths = [len(case.body["prompt"]) for case in asked]
    print(
        f"{name_of(prefill)} to {name_of(decode)}: {verdict}; "
        f"{metrics[RECEIVED]:.0f} of {sum(lengths)} tokens fetched, {failures}",
        flush=True,
    )
    assert (verdict.equal, verdict.different) == (NUM_PROMPTS, [])
    assert {answer.headers["x-disagg-route"] for answer in got} == {"split"}
    assert failures.keys() <= set(allowed)
    if not failures:
        assert metrics[RECEIVED] >= sum(length for length in lengths if length > 1)


# Emulated engines, whose tokens depend on every byte of KV.


@pytest.fixture(scope="module")
def expected(host: ForkHost, tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    folder = tmp_path_factory.mktemp("undivided")
    flags = ["--emulate-layer-groups", "4"]
    return references(
        emulated_engine("undivided", host=host, folder=folder, key_file=folder / "key", role=None, flags=flags)
    )


UNEQUAL = [
    ((2, 1), (1, 1)),
    ((1, 1), (2, 1)),
    ((4, 1), (2, 1)),
    ((1, 2), (1, 1)),
    ((1, 1), (1, 2)),
    ((2, 2), (1, 1)),
    ((1, 4), (2, 2)),
]

EMULATED = [
    *(("nixl", *pair) for pair in UNEQUAL),
    *(("nccl", *pair) for pair in [((1, 1), (1, 1)), *UNEQUAL[:2], UNEQUAL[5]]),
]

CONTAINED = [("nixl", (1, 2), (1, 1)), ("nixl", (1, 1), (1, 2)), ("nccl", (2, 1), (1, 1))]
"""What others of these do as well, and more: fetch from several stages, by several stages, from two ranks over gloo."""


@pytest.mark.parametrize(
    ("transport", "prefill", "decode"),
    [pytest.param(*case, marks=pytest.mark.full if case in CONTAINED else ()) for case in EMULATED],
    ids=name_of,
)
async def test_emulated_engines(
    host: ForkHost, expected: list[Reference], tmp_path: Path, transport: str, prefill: Degrees, decode: Degrees
) -> None:
    create_key_file(tmp_path / "key")

    def start(name: str, role: str | None, degrees: Degrees) -> Server:
        flags = ["--tensor-parallel-size", str(degrees[0]), "--pipeline-parallel-size", str(degrees[1])]
        flags += ["--emulate-layer-groups", "4", "--kv-transport", transport]
        return emulated_engine(name, host=host, folder=tmp_path, key_file=tmp_path / "key", role=role, flags=flags)

    await judge(start, tmp_path, prefill, decode, expected)


# Real ones.

PIPELINE_FLAGS = ("--no-enforce-eager", "--compilation-config", '{"mode": 2, "backend": "eager"}')
"""vLLM 0.32 on CPU makes the buffer between two stages in its warm-up run, which it leaves out of engines that compile
nothing and of `VLLM_CPU_CI_ENV`: then the second stage dies at the first request, of an assertion in
`GPUModelRunner.sync_and_gather_intermediate_tensors`. With this the model is traced, not compiled, and is warmed up."""


def real_engine(name: str, role: str | None, degrees: Degrees, *, folder: Path, transport: str = "nixl") -> Server:
    """One that shares the cores with others, since there may be more ranks than cores: bound to none of them, so that a
    rank never waits for the core of another engine while the next one is idle."""
    tp, pp = degrees
    flags = ["--tensor-parallel-size", str(tp), "--kv-cache-memory-bytes", str(100_000_000)]
    if pp > 1:
        flags += ["--pipeline-parallel-size", str(pp), *PIPELINE_FLAGS]
    if role is not None:
        flags += ["--kv-transport", transport]
    model = tiny_llama_path(num_layers=4, num_kv_heads=4)
    server = engine(name, model=model, index=0, folder=folder, key_file=folder / "key", role=role, flags=flags)
    env = {**server.env, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return replace(server, env={**env, "VLLM_CPU_CI_ENV": "0"} if pp > 1 else env)


@pytest.fixture(scope="module")
def real_expected(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    """What undivided engines say. Two ranks add up in another order than one: had that ever changed a token, answers of
    unequal engines could not be told right from wrong by it."""
    one, two = (
        references(real_engine("undivided", None, (tp, 1), folder=tmp_path_factory.mktemp(f"tp{tp}"))) for tp in (1, 2)
    )
    margin = min(min(reference.margins) for reference in (*one, *two))
    shift = max(abs(a - b) for x, y in zip(one, two, strict=True) for a, b in zip(x.margins, y.margins, strict=True))
    print(f"smallest margin between two tokens {margin:.4f}, changed by two ranks at most by {shift:.6f}", flush=True)
    assert [reference.answer.token_ids for reference in one] == [reference.answer.token_ids for reference in two]
    return one


@pytest.mark.full
@pytest.mark.parametrize("transport", ["nixl", "nccl"])
@pytest.mark.parametrize(("prefill", "decode"), [*UNEQUAL[:2], *UNEQUAL[3:5]], ids=name_of)
async def test_real_engines(
    real_expected: list[Reference], tmp_path: Path, transport: str, prefill: Degrees, decode: Degrees
) -> None:
    create_key_file(tmp_path / "key")

    def start(name: str, role: str | None, degrees: Degrees) -> Server:
        return real_engine(name, role, degrees, folder=tmp_path, transport=transport)

    # One after the other: engines of two ranks keep both of their cores busy whenever they step.
    await judge(start, tmp_path, prefill, decode, real_expected, at_once=1)
