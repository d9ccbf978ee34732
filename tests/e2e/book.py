"""Requests whose right answers are known, because an undivided engine was asked beforehand.

It ends before the engines under test start: it would take memory and cores from them, and what happens to them might
happen to it too.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass

import aiohttp

from tests.e2e import cases
from tests.e2e.client import Case, Reference, refer
from tests.e2e.engines import Server
from tests.e2e.legs import case_of

FIRST_PROMPT = 100_000
AT_ONCE = 8

Known = tuple[Case, Reference]


@dataclass
class Book:
    """Each request is used once, so that nothing of it is in any cache."""

    known: deque[Known]
    vocabulary: range
    """What the model's prompts are made of."""

    def take(self, count: int) -> list[Known]:
        """The next requests."""
        return [self.known.popleft() for _ in range(count)]


async def learn(undivided: Server, count: int, *, seed: int, vocabulary: range = cases.VOCABULARY) -> Book:
    """Start an undivided engine, ask it for the right answers, and end it."""
    rng, gate = random.Random(seed), asyncio.Semaphore(AT_ONCE)
    asked = [case_of(FIRST_PROMPT + index, rng.randrange(33, 180), vocabulary) for index in range(count)]

    async def one(http: aiohttp.ClientSession, case: Case) -> Known:
        async with gate:
            return case, await refer(http, undivided.url, case)

    try:
        undivided.start()
        await asyncio.to_thread(undivided.wait_until_ready)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
            return Book(deque(await asyncio.gather(*(one(http, case) for case in asked))), vocabulary)
    finally:
        undivided.kill()
