"""One HTTP exchange with one engine. Whatever goes wrong on it leaves as `LegFailed`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Literal, Self

import aiohttp

from vllm_disagg.config import ProxySettings
from vllm_disagg.errors import InstanceError
from vllm_disagg.proxy.instances import Instance

Cause = Literal[
    "connect", "down", "overloaded", "timeout", "disconnect", "server_error", "error_event", "bad_answer"
]  # fmt: skip

MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024
"""An answer that is read as a whole may be this large; a million token ids are eight megabytes."""


class LegFailed(InstanceError):
    """An engine did not serve its part of a request.

    Args:
        cause: its label in the metrics.
    """

    def __init__(self, cause: Cause) -> None:
        self.cause: Cause = cause
        super().__init__(cause)

    @property
    def sent(self) -> bool:
        """Whether the engine may have seen the request. A handoff that may have been seen is not used again."""
        return self.cause != "connect"


def open_session(settings: ProxySettings) -> aiohttp.ClientSession:
    """The client for all engines. Deadlines are set by each exchange; the number of connections is bounded by
    `max_requests`, so the pool itself has no limit that could make one request wait for another."""
    connector = aiohttp.TCPConnector(
        limit=0,
        keepalive_timeout=2.0,  # uvicorn closes idle connections after 5: never write on one that is being closed
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity"},
    )


class Upstream:
    """One exchange. Leaving the `async with` before the answer has ended closes the connection, whereupon vLLM aborts.

    Deadlines are times of the running loop's clock.
    """

    def __init__(self, http: aiohttp.ClientSession, instance: Instance) -> None:
        self._http, self._instance = http, instance
        self._num_downs = instance.num_downs
        self._answer: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._answer is not None:
            self._answer.close()  # a connection whose answer was read to its end has gone back to the pool already

    @property
    def status(self) -> int:
        """The HTTP status of the answer."""
        assert self._answer is not None
        return self._answer.status

    def header(self, name: str) -> str | None:
        """One header of the answer."""
        assert self._answer is not None
        return self._answer.headers.get(name)

    async def open(
        self, method: str, path: str, *, deadline_s: float, headers: Mapping[str, str], body: bytes | None = None
    ) -> None:
        """Send the request and wait for the answer's headers.

        Raises:
            LegFailed: no answer, or one with 3xx, 429 or 5xx.
        """
        async with _Watched(self._instance, deadline_s, self._num_downs):
            self._answer = await self._http.request(
                method, self._instance.url + path, data=body, headers=headers, allow_redirects=False
            )
        self._instance.strikes = 0
        if self.status in (429, 503):
            raise LegFailed("overloaded")
        if self.status >= 500:
            raise LegFailed("server_error")
        if not 200 <= self.status < 300 and self.status < 400:
            raise LegFailed("bad_answer")

    async def read_some(self, *, deadline_s: float) -> bytes:
        """The next bytes of the answer; empty at its end."""
        assert self._answer is not None
        async with _Watched(self._instance, deadline_s, self._num_downs):
            data = await self._answer.content.readany()
        self._instance.strikes = 0
        return data

    async def read_all(self, *, deadline_s: float) -> bytes:
        """The whole answer."""
        parts, size = list[bytes](), 0
        while part := await self.read_some(deadline_s=deadline_s):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise LegFailed("bad_answer")
        return b"".join(parts)


class _Watched:
    """A wait for an engine that ends at its deadline, or as soon as the engine is declared down."""

    __slots__ = ("_clock", "_instance", "_num_downs")

    def __init__(self, instance: Instance, deadline_s: float, num_downs: int) -> None:
        self._instance, self._num_downs = instance, num_downs
        self._clock = asyncio.timeout_at(deadline_s)

    async def __aenter__(self) -> None:
        if self._instance.num_downs != self._num_downs:
            raise LegFailed("down")
        await self._clock.__aenter__()
        self._instance.clocks.add(self._clock)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._instance.clocks.discard(self._clock)
        try:
            await self._clock.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise LegFailed("timeout" if self._instance.num_downs == self._num_downs else "down") from late
        if isinstance(error, Exception) and (cause := _cause_of(error)) is not None:
            raise LegFailed(cause) from error


def _cause_of(error: Exception) -> Cause | None:
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return "connect"
    if isinstance(error, OSError | aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError):
        return "disconnect"
    if isinstance(error, aiohttp.ClientError):
        return "bad_answer"
    return None
