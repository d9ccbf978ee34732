"""Makes an engine do what a cell says, through its API, and notes when each token came back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec

from vllm_disagg.core.scheduling.pace import QUANTUM
from vllm_disagg.errors import InstanceError
from vllm_disagg.profiler.cells import LONGEST_GROWTH, SETTLING_STEPS, STEPS_PER_RUNG, Cell, Pace, Prompts, Streams

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
    ) -> list[Stream]:
        """Have the same number of tokens generated for each of some prompts, in one request.

        Args:
            prompts: token ids.
            num_tokens: of each answer.
            fill: let their KV count as computed.
            streams: filled as tokens come; new ones where none are given.
            told: called for each arrival.

        Raises:
            EngineTrouble: it did not do so.
        """
        found = list(streams) or [Stream(len(prompt)) for prompt in prompts]
        body = {
            "model": self._model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": num_tokens,
            "min_tokens": num_tokens, "ignore_eos": True, "temperature": 0.0, "stream": True, "return_token_ids": True,
            **({"kv_transfer_params": FILL_PARAMS} if fill else {}),
        }  # fmt: skip
        try:
            async with self._http.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise EngineTrouble(
                        f"{self._url} answers {response.status} to a request of the profiler: "
                        f"{(await response.text())[:300]}"
                    )
                await self._read(response, found, told)
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


async def run_cell(client: EngineClient, cell: Cell, *, pace: Pace, fills_kv: bool, rng: random.Random) -> Seen:
    """Make the engine do a cell.

    Args:
        client: of the engine.
        cell: what to do.
        pace: about how fast it is.
        fills_kv: the engine can take contexts of streams as computed.
        rng: for token ids.

    Raises:
        EngineTrouble: the engine did not do it.
    """
    if isinstance(cell, Prompts):
        return Seen(batches=[await _batch(client, cell, pace, rng) for _ in range(cell.repeats)])
    return Seen(windows=await _Group(client, cell, fills_kv, rng).run())


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


class _Group:
    """A cell of streams while it is measured."""

    def __init__(self, client: EngineClient, cell: Streams, fills_kv: bool, rng: random.Random) -> None:
        self._client, self._cell, self._fills_kv, self._rng = client, cell, fills_kv, rng
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
                        fill=self._fills_kv, streams=[stream], told=self._news.set,
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
