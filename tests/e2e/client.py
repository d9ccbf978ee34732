"""An OpenAI client that returns token ids, streaming or not, and compares two servers' answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIE = 1e-3
"""Two log-probabilities this close count as equal: which of their tokens is taken says nothing about the KV."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request, greedy."""

    name: str
    body: dict[str, Any]
    stream: bool = False
    route: str | None = "split"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"

    @property
    def payload(self) -> dict[str, Any]:
        return {"model": "model", "temperature": 0, "return_token_ids": True, "stream": self.stream, **self.body}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client sees of a finished request."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    headers: dict[str, str] = field(default_factory=dict)
    logprob_tokens: tuple[str, ...] = ()


async def ask(http: aiohttp.ClientSession, url: str, case: Case) -> Answer:
    """Send a request and read its whole answer."""
    async with http.post(url + case.path, json=case.payload) as response:
        headers = {name.lower(): value for name, value in response.headers.items()}
        if response.status != 200:
            raise AssertionError(f"{case.name}: {response.status} {await response.text()}")
        if not case.stream:
            return _whole(await response.json(), headers)
        events = [line async for line in response.content if line.startswith(b"data: ")]
    return _streamed(events, headers)


def _whole(reply: dict[str, Any], headers: dict[str, str]) -> Answer:
    choice = reply["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Answer(
        token_ids=tuple(choice["token_ids"] or ()),
        text=text or "",
        finish_reason=choice["finish_reason"],
        headers=headers,
        logprob_tokens=tuple(_logprob_tokens(choice)),
    )


def _streamed(events: Sequence[bytes], headers: dict[str, str]) -> Answer:
    assert events[-1].strip() == b"data: [DONE]", events[-1]
    token_ids: list[int] = []
    text, finish_reason, logprob_tokens = "", None, []
    for event in events[:-1]:
        reply = json.loads(event[len(b"data: ") :])
        assert "error" not in reply, reply
        for choice in reply["choices"]:
            token_ids += choice.get("token_ids") or []
            text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            finish_reason = choice["finish_reason"] or finish_reason
            logprob_tokens += _logprob_tokens(choice)
    return Answer(
        token_ids=tuple(token_ids),
        text=text,
        finish_reason=finish_reason,
        headers=headers,
        logprob_tokens=tuple(logprob_tokens),
    )


def _logprob_tokens(choice: dict[str, Any]) -> list[str]:
    logprobs = choice.get("logprobs") or {}
    if "content" in logprobs:
        return [item["token"] for item in logprobs["content"] or ()]
    return list(logprobs.get("tokens") or ())


@dataclass
class Verdict:
    """How many answers were equal; a tie of the undivided engine's own is no difference, but it is counted."""

    equal: int = 0
    ties: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.equal} equal, {len(self.ties)} ties {self.ties}, {len(self.different)} different"


async def compare(split: str, undivided: str, cases: Sequence[Case], *, at_once: int = 4) -> Verdict:
    """Ask both servers every case, some at once, and compare token by token."""
    verdict, gate = Verdict(), asyncio.Semaphore(at_once)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as http:

        async def one(case: Case) -> None:
            async with gate:
                ours, theirs = await asyncio.gather(ask(http, split, case), ask(http, undivided, case))
                if case.route is not None:
                    seen = (ours.headers.get("x-disagg-route"), ours.headers.get("x-disagg-reason"))
                    assert seen[0] == case.route, f"{case.name} went {seen}"
                assert ours.token_ids or ours.text == "", f"{case.name}: no token ids"
                await judge(http, undivided, case, ours, theirs, verdict)

        async with asyncio.TaskGroup() as tasks:
            for case in cases:
                tasks.create_task(one(case))
    return verdict


async def judge(
    http: aiohttp.ClientSession, undivided: str, case: Case, ours: Answer, theirs: Answer, verdict: Verdict
) -> None:
    """Note whether our answer is the undivided engine's."""
    same = (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
    if same and ours.logprob_tokens == theirs.logprob_tokens:
        verdict.equal += 1
        return
    position = next((i for i, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False)) if a != b), None)
    if position is not None and await _is_tie(http, undivided, case, position):
        verdict.ties.append(f"{case.name}@{position}")
        return
    verdict.different.append(f"{case.name}@{position}: {ours} != {theirs}")


async def _is_tie(http: aiohttp.ClientSession, undivided: str, case: Case, position: int) -> bool:
    """Whether the undivided engine's own two best tokens at that position are equally likely."""
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if "messages" in case.body else {"logprobs": 2}
    async with http.post(undivided + case.path, json={**case.payload, "stream": False, **wanted}) as response:
        logprobs = (await response.json())["choices"][0]["logprobs"]
    if "content" in logprobs:
        best = [item["logprob"] for item in logprobs["content"][position]["top_logprobs"]]
    else:
        best = list(logprobs["top_logprobs"][position].values())
    first, second = sorted(best, reverse=True)[:2]
    return bool(first - second <= TIE)
