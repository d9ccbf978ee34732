"""An open-loop load: seeded Poisson arrivals, and a client that notes when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np

TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One arrival. `at_s` is counted from the start of the load.

    Attributes:
        num_output_tokens: how long the answer has to be, or with `may_end` at most.
        may_end: the model may end the answer itself.
        extra: more fields of the body.
    """

    at_s: float
    prompt: tuple[int, ...]
    num_output_tokens: int
    may_end: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": "model", "prompt": list(self.prompt), "max_tokens": self.num_output_tokens,
            "ignore_eos": not self.may_end, "temperature": 0, "stream": True, "return_token_ids": True, **self.extra,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Times:
    """What a client saw of one request; every time is counted from its planned arrival.

    Attributes:
        token_times_s: one for each token; tokens of one event came together.
        error: why it has not all its tokens; empty if it has.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    sent_late_s: float
    token_times_s: tuple[float, ...] = ()
    route: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.token_times_s[-1] - self.token_times_s[0]) / (len(self.token_times_s) - 1)

    @property
    def gaps_s(self) -> list[float]:
        """From each token to the next."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


@dataclass(frozen=True, kw_only=True)
class LoadShape:
    """What requests look like: lengths are uniform between the bounds, both included."""

    prompt_tokens: tuple[int, int] = (64, 512)
    output_tokens: tuple[int, int] = (16, 32)
    token_ids: tuple[int, int] = (1000, 40000)


def poisson(shape: LoadShape, *, rate_per_s: float, seconds: float, seed: Sequence[int]) -> list[Request]:
    """The arrivals of a Poisson process in `seconds`, at least one. Prompts are random tokens, so that no two of them
    begin alike and no prefix cache helps."""
    random = np.random.default_rng(list(seed))
    requests: list[Request] = []
    at_s = 0.0
    while at_s < seconds or not requests:
        num_prompt = int(random.integers(*shape.prompt_tokens, endpoint=True))
        requests.append(
            Request(
                at_s=at_s,
                prompt=tuple(random.integers(*shape.token_ids, num_prompt).tolist()),
                num_output_tokens=int(random.integers(*shape.output_tokens, endpoint=True)),
            )
        )
        at_s += float(random.exponential(1 / rate_per_s))
    return requests


async def drive(urls: Sequence[str], requests: Sequence[Request], *, timeout_s: float = TIMEOUT_S) -> list[Times]:
    """Send each request when it is due, to the servers in turn, and wait for all of them."""
    # Servers close connections that were idle for 5 s, and a request that meets that fails.
    connector, timeout = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0), aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        start_s = time.perf_counter() + 0.1
        urls_in_turn = [urls[index % len(urls)] for index in range(len(requests))]
        return list(
            await asyncio.gather(
                *(_one(http, url, request, start_s) for url, request in zip(urls_in_turn, requests, strict=True))
            )
        )


@dataclass(slots=True)
class _Seen:
    token_times_s: list[float] = field(default_factory=list)
    route: str = ""
    error: str = ""


async def _one(http: aiohttp.ClientSession, url: str, request: Request, start_s: float) -> Times:
    due_s = start_s + request.at_s
    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
    sent_late_s = time.perf_counter() - due_s
    seen = _Seen()
    try:
        await _stream(http, url, request, due_s, seen)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    wanted = 1 if request.may_end else request.num_output_tokens
    if not seen.error and not wanted <= len(seen.token_times_s) <= request.num_output_tokens:
        seen.error = f"{len(seen.token_times_s)} of {request.num_output_tokens} tokens"
    return Times(
        num_prompt_tokens=len(request.prompt),
        num_output_tokens=request.num_output_tokens,
        sent_late_s=sent_late_s,
        token_times_s=tuple(seen.token_times_s),
        route=seen.route,
        error=seen.error,
    )


async def _stream(http: aiohttp.ClientSession, url: str, request: Request, due_s: float, seen: _Seen) -> None:
    async with http.post(url + "/v1/completions", json=request.body) as response:
        seen.route = response.headers.get("X-Disagg-Route", "")
        if response.status != 200:
            seen.error = f"status {response.status}: {(await response.text())[:200]}"
            return
        async for line in response.content:
            now_s = time.perf_counter() - due_s
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                seen.error = f"error event: {event['error']}"
                return
            for choice in event["choices"]:
                seen.token_times_s += [now_s] * len(choice.get("token_ids") or ())
