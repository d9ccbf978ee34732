"""A proxy's two legs by hand, so that a test can do to a handoff, and between the legs, what a proxy never would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import aiohttp

from tests.e2e import cases
from tests.e2e.client import Answer, Case, Reference, Verdict, ask, note
from tests.e2e.engines import Server
from vllm_disagg.core.types import TransferId, new_transfer_id
from vllm_disagg.proxy.bodies import decode_body, prefill_body
from vllm_disagg.proxy.prefilled import read_prefill_answer

MAX_TOKENS = 6
FAILURES = "vllm_disagg_kv_failures_total"
RECEIVED = "vllm_disagg_kv_transfer_seconds_count"


@dataclass(frozen=True, kw_only=True)
class Held:
    """A prompt that prefill has computed and keeps for whoever has the handoff."""

    case: Case
    transfer_id: TransferId
    handoff: str

    def stolen_by(self, other: Held) -> Held:
        """The other's request with our handoff."""
        return replace(other, transfer_id=self.transfer_id, handoff=self.handoff)


def case_of(index: int, length: int, vocabulary: range = cases.VOCABULARY) -> Case:
    """A prompt of its own, so that nothing of it is in any cache."""
    return Case(
        name=f"{index}: {length} tokens",
        body={"prompt": cases.prompt_of(length, index, vocabulary), "max_tokens": MAX_TOKENS, "ignore_eos": True},
        route=None,
    )


async def hold(http: aiohttp.ClientSession, prefill: Server, case: Case) -> Held:
    """The first leg."""
    transfer_id = new_transfer_id()
    body = {**prefill_body("completions", case.body, transfer_id), "model": "model"}
    async with http.post(prefill.url + case.path, json=body) as response:
        assert response.status == 200, await response.text()
        prefilled = read_prefill_answer("completions", await response.read())
    assert prefilled.handoff is not None
    return Held(case=case, transfer_id=transfer_id, handoff=prefilled.handoff)


async def fetch(http: aiohttp.ClientSession, decode: Server, held: Held) -> Answer:
    """The second leg."""
    body = decode_body("completions", held.case.body, transfer_id=held.transfer_id, handoff=held.handoff)
    return await ask(http, decode.url, replace(held.case, body=body))


def causes(decode: Server) -> dict[str, float]:
    """Failed transfers by cause, and those that were received."""
    found = decode.metrics("vllm_disagg_kv_")
    counts = {name[len(FAILURES) + 1 : -1]: value for name, value in found.items() if name.startswith(FAILURES)}
    return {**counts, "received": found.get(RECEIVED, 0.0)}


@dataclass
class Tally:
    """What became of a scenario's requests."""

    name: str
    asked: int = 0
    hung: int = 0
    slowest_s: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)
    counted: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        counted = ", ".join(f"{cause} {number:.0f}" for cause, number in sorted(self.counted.items()) if number)
        return (
            f"{self.name}: {self.asked} requests, {self.verdict.equal} right, {len(self.verdict.ties)} ties, "
            f"{len(self.verdict.different)} wrong, {self.hung} hung, slowest {self.slowest_s:.1f} s; {counted}"
        )


async def fetch_all(
    http: aiohttp.ClientSession,
    decode: Server,
    helds: Sequence[Held],
    expected: Sequence[Reference],
    tally: Tally,
    *,
    within_s: float,
    spread_s: Sequence[float] = (),
) -> None:
    """The second leg of many at once, each compared with what an undivided engine has said.

    Args:
        http: carries all requests.
        decode: the engine to ask.
        helds: what to ask.
        expected: the right answers.
        tally: where to note the outcomes.
        within_s: a request without an answer by then is hung.
        spread_s: how long each waits before it starts.
    """

    async def one(held: Held, right: Reference, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        begun_s = time.monotonic()
        tally.asked += 1
        try:
            answer = await asyncio.wait_for(fetch(http, decode, held), within_s)
        except TimeoutError:
            tally.hung += 1
            return
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - begun_s)
        note(held.case, answer, right, tally.verdict)

    waits = list(spread_s) or [0.0] * len(helds)
    await asyncio.gather(*(one(*item) for item in zip(helds, expected, waits, strict=True)))
