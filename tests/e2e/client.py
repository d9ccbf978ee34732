"""An OpenAI client that returns token ids, streaming or not, and compares two servers' answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What an undivided engine says to a request, and by how much it preferred each token to the next best one.

    Attributes:
        answer: its answer.
        margins: for each token, the difference of the two highest log-probabilities.
    """

    answer: Answer
    margins: tuple[float, ...]


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


async def refer(http: aiohttp.ClientSession, undivided: str, case: Case) -> Reference:
    """Ask an undivided engine, without streaming, for its answer and how sure it is of it."""
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if "messages" in case.body else {"logprobs": 2}
    # Texts would not do: tokens that are parts of characters look the same.
    payload = {**case.payload, "stream": False, **wanted, "return_tokens_as_token_ids": True}
    async with http.post(undivided + case.path, json=payload) as response:
        headers = {name.lower(): value for name, value in response.headers.items()}
        if response.status != 200:
            raise AssertionError(f"{case.name}: {response.status} {await response.text()}")
        reply = await response.json()
    return Reference(
        answer=replace(_whole(reply, headers), logprob_tokens=()), margins=_margins(reply["choices"][0]["logprobs"])
    )


def _margins(logprobs: dict[str, Any]) -> tuple[float, ...]:
    if "content" in logprobs:
        best = [[other["logprob"] for other in item["top_logprobs"]] for item in logprobs["content"]]
    else:
        best = [list(others.values()) for others in logprobs["top_logprobs"]]
    return tuple(first - second for first, second, *_ in (sorted(item, reverse=True) for item in best))


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
    """Note whether our answer is the undivided engine's, which is asked again if it is not."""
    if same(ours, theirs):
        verdict.equal += 1
    else:
        note(case, ours, replace(await refer(http, undivided, case), answer=theirs), verdict)


def same(ours: Answer, theirs: Answer) -> bool:
    """Whether a client sees the same answer."""
    return replace(ours, headers={}) == replace(theirs, headers={})


def note(case: Case, ours: Answer, reference: Reference, verdict: Verdict) -> None:
    """Note an answer as equal, as different by a tie, or as different."""
    theirs = reference.answer
    if same(ours, theirs):
        verdict.equal += 1
        return
    position = next((i for i, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False)) if a != b), None)
    if position is not None and reference.margins[position] <= TIE:
        verdict.ties.append(f"{case.name}@{position}")
        return
    verdict.different.append(f"{case.name}@{position}: {ours} != {theirs}")
