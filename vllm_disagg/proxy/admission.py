"""What a request must pass before it becomes a call: room for it, and a body that is small, timely and JSON."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from starlette.requests import Request

from vllm_disagg.config import ProxySettings
from vllm_disagg.core.scheduling.hints import HEADERS, clean
from vllm_disagg.core.shapes import Api
from vllm_disagg.proxy.bodies import known, parse, without_hints
from vllm_disagg.proxy.flow import Call
from vllm_disagg.proxy.metrics import ProxyMetrics
from vllm_disagg.proxy.replies import ApiError

_FORWARDED: Final = ("authorization",)
"""The client's headers that reach an engine. vLLM checks `--api-key` with it."""


class Admission:
    """Counts the requests in progress and refuses more than `max_requests`."""

    def __init__(self, settings: ProxySettings, metrics: ProxyMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._in_progress = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Count one request for as long as it lasts.

        Raises:
            ApiError: 503, too many are in progress.
        """
        if self._in_progress >= self._settings.max_requests:
            raise ApiError(503, "the server is at its capacity", reason="at_capacity")
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    async def until_empty(self) -> None:
        """Wait until nothing is in progress. Called once, when the app stops and what still ran has been cancelled."""
        await self._empty.wait()

    async def read_call(self, api: Api, request: Request) -> Call:
        """Read a request.

        Raises:
            ApiError: it is not acceptable.
            starlette.requests.ClientDisconnect: the client left before its body had arrived.
        """
        arrived_s = asyncio.get_running_loop().time()
        _check_headers(request)
        raw = await self._read_body(request)
        body = parse(raw)
        fields = known(api, body)
        self._metrics.dropped_fields(len(body) - len(fields))
        hints, touched = clean({**_hints_in_headers(request), **(fields.get("vllm_xargs") or {})})
        for outcome in touched.values():
            self._metrics.hint(outcome)
        return Call(
            api=api,
            fields=without_hints(fields),
            hints=hints,
            headers=forwarded_headers(request),
            num_bytes=len(raw),
            request_id=secrets.token_hex(16),
            arrived_s=arrived_s,
        )

    async def _read_body(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        if (declared := request.headers.get("content-length", "")).isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise _too_large(limit)
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time", reason="slow_body") from error
        return bytes(body)

    def _change(self, by: int) -> None:
        self._in_progress += by
        if self._in_progress:
            self._empty.clear()
        else:
            self._empty.set()
        self._metrics.in_progress(self._in_progress)


def forwarded_headers(request: Request) -> Mapping[str, str]:
    """The client's headers that may reach an engine."""
    return {name: value for name in _FORWARDED if (value := request.headers.get(name)) is not None}


def _hints_in_headers(request: Request) -> dict[str, str]:
    return {key: value for name, key in HEADERS.items() if (value := request.headers.get(name)) is not None}


def log_label(request: Request) -> str:
    """The client's own name for its request, made harmless. It goes into the log and nowhere else."""
    return re.sub(r"[^A-Za-z0-9._-]", "", request.headers.get("x-request-id", ""))[:64] or "-"


def _check_headers(request: Request) -> None:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "the content type must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes", reason="too_large")
