"""Makes an engine do what a cell says, through its API, and notes when each token came back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from vllm_disagg.core.scheduling.pace import QUANTUM
from vllm_disagg.errors import InstanceError
from vllm_disagg.profiler.cells import (
    LONGEST_GROWTH,
    SETTLING_STEPS,
    STEPS_PER_RUNG,
    Cell,
    Limits,
    Pace,
    Prompts,
    Streams,
)

FILL_PARAMS: Final = {"vllm_disagg_fill": True}
"""`kv_transfer_params` of a request whose KV counts as computed (`profiler/fill.py`)."""

BLOCKER_S: Final = 0.15
"""About how long the prompt before a batch of prompts takes, so that the batch waits for it and starts as one."""

_PATIENCE_S: Final = 120.0
"""Longest wait for a token."""

_TOKEN_IDS: Final = (10, 250)
"""Every vocabulary has these; random ones of them make prompts that no prefix cache knows."""


class EngineTrouble(InstanceError):
    """The engine that is being measured refused a request, broke off, or stopped answering."""


class _Choice(msgspec.Struct):
    index: int = 0
    token_ids: list[int] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


@dataclass(slots=True)
class Stream:
    """The tokens of one prompt as they come: when, and how many at once. Times are of the monotonic clock."""

    num_prompt_tokens: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """So far."""
        return sum(number for _, number in self.arrivals)


@dataclass(frozen=True, slots=True)
class Batch:
    """What was seen of prompts that waited for another one: its token's time, and theirs."""

    blocker_s: float
    prompts: tuple[Stream, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A time in which exactly these streams decoded, beside prompts."""

    begin_s: float
    end_s: float
    streams: tuple[Stream, ...]
    prompts: tuple[Stream, ...]


@dataclass(slots=True)
class Seen:
    """Everything a client saw of one cell."""

    batches: list[Batch] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)


class EngineClient:
    """Sends requests to one engine.

    Args:
        url: of its API, without a path.
        model: the name it serves.
        http: open for as long as this is used.
    """

    def __init__(self, url: str, model: str, http: aiohttp.ClientSession) -> None:
        self._url, self._model, self._http = url, model, http

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        fill: bool = False,
        streams: Sequence[Stream] = (),
        told: Callable[[], None] = lambda: None,
        only_the_end: bool = False,
    ) -> list[Stream]:
        """Have the same number of tokens generated for each of some prompts, in one request.

        Args:
            prompts: token ids.
            num_tokens: of each answer.
            fill: let their KV count as computed.
            streams: filled as tokens come; new ones where none are given.
            told: called for each arrival.
            only_the_end: let each answer come as a whole, which costs the API server much less.

        Raises:
            EngineTrouble: it did not do so.
        """
        found = list(streams) or [Stream(len(prompt)) for prompt in prompts]
        body = {
            "model": self._model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": num_tokens,
            "min_tokens": num_tokens, "ignore_eos": True, "temperature": 0.0, "return_token_ids": True,
            "stream": not only_the_end,
            **({"kv_transfer_params": FILL_PARAMS} if fill else {}),
        }  # fmt: skip
        try:
            async with self._http.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise EngineTrouble(
                        f"{self._url} answers {response.status} to a request of the profiler: "
                        f"{(await response.text())[:300]}"
                    )
                await (self._read_whole if only_the_end else self._read)(response, found, told)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise EngineTrouble(f"{self._url} broke off: {type(error).__name__} {error}") from error
        if short := [stream for stream in found if stream.num_tokens != num_tokens]:
            raise EngineTrouble(f"{self._url} ended an answer after {short[0].num_tokens} of {num_tokens} tokens")
        return found

    async def _read(self, response: aiohttp.ClientResponse, streams: list[Stream], told: Callable[[], None]) -> None:
        async for line in response.content:
            now_s = time.monotonic()
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = msgspec.json.decode(line[6:], type=_Event)
            if event.error is not None:
                raise EngineTrouble(f"{self._url}: {event.error}")
            for choice in event.choices:
                if choice.token_ids:
                    streams[choice.index].arrivals.append((now_s, len(choice.token_ids)))
            told()

    async def _read_whole(
        self, response: aiohttp.ClientResponse, streams: list[Stream], told: Callable[[], None]
    ) -> None:
        answer = msgspec.json.decode(await response.read(), type=_Event)
        for choice in answer.choices:
            streams[choice.index].arrivals.append((time.monotonic(), len(choice.token_ids or ())))
        told()

    async def fence(self) -> None:
        """Wait until the engine has noticed that earlier clients left: what is sent later is done later."""
        for _ in range(2):
            await self.generate([[_TOKEN_IDS[0]] * 2], 2)


@contextlib.asynccontextmanager
async def connected(url: str, model: str) -> AsyncIterator[EngineClient]:
    """A client whose connections are closed at the end."""
    # Servers close connections that were idle for 5 s, and a request that meets that fails.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    timeout = aiohttp.ClientTimeout(total=None, connect=_PATIENCE_S, sock_read=_PATIENCE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as http:
        yield EngineClient(url, model, http)


async def measure_pace(client: EngineClient, *, longest: int, rng: random.Random) -> Pace:
    """About how fast an engine is. The first requests of its life, which are slower, do not count."""
    num_prompt, num_output = max(2, min(512, longest)), 12
    for _ in range(2):
        await client.generate([_prompt(rng, num_prompt)], 2)
    begun_s = time.monotonic()
    [stream] = await client.generate([_prompt(rng, num_prompt)], num_output)
    first_s, last_s = stream.arrivals[0][0], stream.arrivals[-1][0]
    return Pace(
        token_s=max(1e-7, (first_s - begun_s) / num_prompt), step_s=max(1e-5, (last_s - first_s) / (num_output - 1))
    )


async def run_cell(client: EngineClient, cell: Cell, *, pace: Pace, limits: Limits, rng: random.Random) -> Seen:
    """Make the engine do a cell.

    Args:
        client: of the engine.
        cell: what to do.
        pace: about how fast it is.
        limits: what it can hold. Where it writes its steps down nobody watches tokens come, which spares it all that
            its API server does for them.
        rng: for token ids.

    Raises:
        EngineTrouble: the engine did not do it.
    """
    if isinstance(cell, Prompts):
        return Seen(batches=[await _batch(client, cell, pace, rng) for _ in range(cell.repeats)])
    if limits.sees_steps:
        await _Ladder(client, cell, limits, rng).run()
        return Seen()
    return Seen(windows=await _Group(client, cell, rng).run())


async def _batch(client: EngineClient, cell: Prompts, pace: Pace, rng: random.Random) -> Batch:
    """One prompt, and while it is computed all the others, which therefore start together."""
    length = max(QUANTUM, min(512, round(BLOCKER_S / pace.token_s)))
    blocker = asyncio.create_task(client.generate([_prompt(rng, length)], 1))
    try:
        await asyncio.sleep(min(BLOCKER_S, length * pace.token_s) / 3)
        prompts = await client.generate([_prompt(rng, number) for number in cell.lengths], 1)
        [first] = await blocker
    finally:
        blocker.cancel()
    return Batch(first.arrivals[0][0], tuple(prompts))


class _Ladder:
    """A cell of streams that nobody watches: each is as long as its rungs, and the first one tells where they are."""

    def __init__(self, client: EngineClient, cell: Streams, limits: Limits, rng: random.Random) -> None:
        self._client, self._cell, self._fills_kv, self._rng = client, cell, limits.fills_kv, rng
        self._ends = list(itertools.accumulate(rung.num_steps for rung in cell.rungs))
        # The leader starts last. What the others generate while contexts are computed comes on top.
        self._early = 0 if limits.fills_kv else math.ceil(sum(cell.contexts) / limits.step_tokens)
        self._leader, self._news = Stream(cell.contexts[0]), asyncio.Event()

    async def run(self) -> None:
        """All rungs, to the end of the last stream."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for index, end in reversed(list(enumerate(self._lengths()))):
                    if index > 0:
                        tasks.create_task(self._follow(index, min(LONGEST_GROWTH, end + self._early)))
                leader = tasks.create_task(self._lead())
                await self._beside(leader)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _lengths(self) -> list[int]:
        """Tokens of each stream."""
        numbers = [rung.num_streams for rung in self._cell.rungs]
        return [
            next(end for number, end in zip(reversed(numbers), reversed(self._ends), strict=True) if index < number)
            for index in range(numbers[0])
        ]

    async def _lead(self) -> None:
        await self._client.generate(
            [self._prompt(0)], self._ends[-1], fill=self._fills_kv, streams=[self._leader], told=self._news.set
        )

    async def _follow(self, index: int, num_tokens: int) -> None:
        await self._client.generate([self._prompt(index)], num_tokens, fill=self._fills_kv, only_the_end=True)

    async def _beside(self, leader: asyncio.Task[None]) -> None:
        """The prompts of each rung, when it has been measured without them."""
        begins = [0, *self._ends[:-1]]
        for rung, begin in zip(self._cell.rungs, begins, strict=True):
            for lengths in rung.prompts:
                await self._until(begin + SETTLING_STEPS + STEPS_PER_RUNG, leader)
                await self._client.generate([_prompt(self._rng, length) for length in lengths], 1, only_the_end=True)

    async def _until(self, number: int, leader: asyncio.Task[None]) -> None:
        """Wait for so many tokens of the first stream."""
        while self._leader.num_tokens < number and not leader.done():
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), _PATIENCE_S)
            except TimeoutError:
                raise EngineTrouble(f"the engine has generated nothing for {_PATIENCE_S:.0f} s") from None

    def _prompt(self, index: int) -> list[int]:
        return _prompt(self._rng, self._cell.contexts[index])


class _Group:
    """A cell of streams whose every token is watched."""

    def __init__(self, client: EngineClient, cell: Streams, rng: random.Random) -> None:
        self._client, self._cell, self._rng = client, cell, rng
        self._streams = [Stream(context) for context in cell.contexts]
        self._tasks: list[asyncio.Task[Any]] = []
        self._news = asyncio.Event()

    async def run(self) -> list[Window]:
        """All rungs, one after the other, or until a stream has come to its end."""
        try:
            self._tasks = [
                asyncio.create_task(
                    self._client.generate(
                        [_prompt(self._rng, stream.num_prompt_tokens)], LONGEST_GROWTH,
                        streams=[stream], told=self._news.set,
                    )
                )
                for stream in self._streams
            ]  # fmt: skip
            for task in self._tasks:
                task.add_done_callback(lambda _: self._news.set())
            windows = []
            await self._until(self._streams, 1)
            for rung in self._cell.rungs:
                await self._leave(rung.num_streams)
                active = self._streams[: rung.num_streams]
                if not await self._grow(active, SETTLING_STEPS):
                    break
                begin_s, prompts, going_on = time.monotonic(), list[Stream](), await self._grow(active, STEPS_PER_RUNG)
                for lengths in rung.prompts if going_on else ():
                    prompts += await self._client.generate([_prompt(self._rng, number) for number in lengths], 1)
                    going_on = going_on and await self._grow(active, 1)
                windows.append(Window(begin_s, time.monotonic(), tuple(active), tuple(prompts)))
                if not going_on:
                    break
            return windows
        finally:
            await self._leave(0)
            await self._client.fence()

    async def _grow(self, active: Sequence[Stream], number: int) -> bool:
        """Wait for so many more tokens of each; false when one of them has ended before."""
        return await self._until(active, number + max(stream.num_tokens for stream in active))

    async def _until(self, active: Sequence[Stream], number: int) -> bool:
        if number > LONGEST_GROWTH:
            return False
        while any(stream.num_tokens < number for stream in active):
            self._raise_what_failed()
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), _PATIENCE_S)
            except TimeoutError:
                raise EngineTrouble(f"the engine has generated nothing for {_PATIENCE_S:.0f} s") from None
        return True

    def _raise_what_failed(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _leave(self, number: int) -> None:
        """Let all streams but the first ones go."""
        leaving, self._tasks = self._tasks[number:], self._tasks[:number]
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)


def _prompt(rng: random.Random, length: int) -> list[int]:
    return rng.choices(range(*_TOKEN_IDS), k=length)
