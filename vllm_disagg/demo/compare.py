"""One chat, twice: split through the proxy, and undivided on the decode engine alone; and what became of its KV."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from vllm_disagg.errors import InstanceError

_METRICS_WAIT_S = 5.0
_SECONDS, _TOKENS = "vllm_disagg_kv_transfer_seconds_sum", "vllm_disagg_kv_tokens_received_total"

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one engine, or two, made of a chat.

    Attributes:
        token_ids: the generated tokens.
        num_prompt_tokens: the length of the prompt.
        stages_ms: the proxy's account of the time to the first event, from its `Server-Timing` header.
    """

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    stages_ms: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A split answer beside the undivided one, and the KV that crossed for it."""

    split: Answer
    undivided: Answer
    num_kv_tokens: int
    kv_transfer_s: float

    @property
    def equal(self) -> bool:
        """Whether both are the same, token for token, and not empty."""
        return bool(self.split.token_ids) and self.split.token_ids == self.undivided.token_ids

    @property
    def crossed(self) -> bool:
        """Whether the KV of the whole prompt came from the prefill engine. A salt of its own keeps caches out of it."""
        return self.num_kv_tokens >= self.split.num_prompt_tokens > 0


async def compare(
    http: aiohttp.ClientSession,
    *,
    proxy_url: str,
    decode_url: str,
    request: dict[str, Any],
    on_text: Callable[[str], None],
) -> Comparison:
    """Send one chat through the proxy, then straight to the decode engine, as one greedy request each.

    The second one has a salt of its own, so that nothing the first one left in the prefix cache can answer it.

    Raises:
        InstanceError: an answer was an error.
    """
    before = await _kv_counters(http, decode_url)
    split = await stream_chat(http, proxy_url, request, on_text)
    after = await _kv_counters_after(http, decode_url, before)
    salted = {**request, "cache_salt": secrets.token_hex(16)}
    undivided = await stream_chat(http, decode_url, salted, lambda text: None)
    return Comparison(
        split=split,
        undivided=undivided,
        num_kv_tokens=round(after[_TOKENS] - before[_TOKENS]),
        kv_transfer_s=after[_SECONDS] - before[_SECONDS],
    )


async def stream_chat(
    http: aiohttp.ClientSession, url: str, request: dict[str, Any], on_text: Callable[[str], None]
) -> Answer:
    """Stream one chat and collect its token ids.

    Raises:
        InstanceError: the answer is an error, or breaks off.
    """
    body = {**request, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    token_ids: list[int] = []
    num_prompt_tokens = 0
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise InstanceError(f"{url} answered {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            event = _event(line)
            if event is None:
                continue
            if "error" in event:
                raise InstanceError(f"{url} broke off: {event['error']}")
            if usage := event.get("usage"):
                num_prompt_tokens = usage["prompt_tokens"]
            for choice in event["choices"]:
                token_ids.extend(choice.get("token_ids") or ())
                on_text(choice["delta"].get("content") or "")
        stages_ms = parse_server_timing(response.headers.get("Server-Timing", ""))
    return Answer(token_ids=tuple(token_ids), num_prompt_tokens=num_prompt_tokens, stages_ms=stages_ms)


def parse_server_timing(header: str) -> dict[str, float]:
    """Stage to milliseconds, in the header's order."""
    found = re.findall(r"([\w-]+)\s*;\s*dur=([0-9.]+)", header)
    return {name: float(duration) for name, duration in found}


def parse_counters(page: str, names: Sequence[str]) -> dict[str, float]:
    """The sum over all labels of each named sample on a Prometheus page; 0 for one that is not there."""
    totals = dict.fromkeys(names, 0.0)
    for line in page.splitlines():
        name, _, rest = line.partition("{") if "{" in line else line.partition(" ")
        if name in totals and rest:
            totals[name] += float(rest.rpartition(" ")[2])
    return totals


def _event(line: bytes) -> dict[str, Any] | None:
    text = line.strip()
    if not text.startswith(b"data:") or text == b"data: [DONE]":
        return None
    return msgspec.json.decode(text[len(b"data:") :], type=dict[str, Any])


async def _kv_counters(http: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with http.get(f"{url}/metrics") as response:
        return parse_counters(await response.text(), (_SECONDS, _TOKENS))


async def _kv_counters_after(http: aiohttp.ClientSession, url: str, before: dict[str, float]) -> dict[str, float]:
    """The counters once they have moved; the engine publishes them a moment after the answer."""
    deadline_s = asyncio.get_running_loop().time() + _METRICS_WAIT_S
    while (now := await _kv_counters(http, url))[_TOKENS] == before[_TOKENS]:
        if asyncio.get_running_loop().time() >= deadline_s:
            break
        await asyncio.sleep(0.2)
    return now
