"""The first request of a pair finds its engines connected, since the proxy has introduced them.

Prints what the hand-over of that request takes with and without.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp

from tests.e2e.engines import EmulatedEngine, ForkHost, emulated_engine, proxy
from tests.e2e.legs import case_of, fetch, hold
from vllm_disagg.core.keys import create_key_file

REPEATS = 1
MET, READ = "handshake.done", "transfer.done"


def started(stack: ExitStack, host: ForkHost, folder: Path, name: str, role: str) -> EmulatedEngine:
    engine = emulated_engine(name, host=host, folder=folder, key_file=folder / "key", role=role)
    stack.callback(engine.kill)
    engine.start()
    engine.wait_until_ready()
    return engine


def events(engine: EmulatedEngine) -> list[str]:
    """In the order of its log."""
    words = [word for line in engine.log.read_text().splitlines() for word in line.split()]
    return [word for word in words if word in (MET, READ)]


async def seconds_of_hand_overs(prefill: EmulatedEngine, decode: EmulatedEngine, first: int) -> list[float]:
    """Of two requests, one after the other: from the handoff to the end of an answer of a few tokens."""
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        for index in range(first, first + 2):
            held = await hold(http, prefill, case_of(index, 120))
            begun_s = time.monotonic()
            answer = await fetch(http, decode, held)
            found.append(time.monotonic() - begun_s)
            assert answer.token_ids
    return found


async def met(engine: EmulatedEngine) -> None:
    deadline_s = time.monotonic() + 30
    while MET not in events(engine):
        assert time.monotonic() < deadline_s, "the engines were not introduced"
        await asyncio.sleep(0.02)  # bounded polling of another process's log


async def test_engines_meet_before_their_first_request(host: ForkHost, tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    times: dict[str, list[list[float]]] = {"introduced": [], "not introduced": []}
    with ExitStack() as stack:
        prefill = started(stack, host, tmp_path, "prefill", "prefill")
        for number in range(2 * REPEATS):
            how = "introduced" if number % 2 == 0 else "not introduced"
            with ExitStack() as pair:
                decode = started(pair, host, tmp_path, f"decode-{number}", "decode")
                if how == "introduced":
                    front = proxy(prefill=[prefill], decode=[decode], folder=tmp_path)
                    pair.callback(front.kill)
                    front.start()
                    await met(decode)
                    assert events(decode) == [MET]
                times[how].append(await seconds_of_hand_overs(prefill, decode, 40_000 + 10 * number))
                assert events(decode) == [MET, READ, READ]
    for how, pairs in times.items():
        first, second = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{how}: first request {first:.0f} ms, second {second:.0f} ms from handoff to the answer's end")
