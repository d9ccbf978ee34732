"""Introducing prefill instances to decode instances ahead of their first request.

The proxy only carries what the engines have signed: it has no key, and can name no address that an engine would connect
to. See `core/introduction.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import aiohttp

from vllm_disagg.config import ProxySettings
from vllm_disagg.core.introduction import INTRODUCE_PATH
from vllm_disagg.proxy.instances import Instance, Pool
from vllm_disagg.proxy.metrics import ProxyMetrics

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
_MAX_ANSWER_BYTES: Final = 64 * 1024

_Pair = tuple[int, int]
_Appearances = tuple[int, int]


class Introducer:
    """Introduces every pair that fits, once each time one of the two has appeared. A pair that cannot be introduced
    meets at its first request.

    Args:
        settings: of the proxy.
        pool: its instances.
        http: its client.
        metrics: where outcomes are counted.
    """

    def __init__(self, settings: ProxySettings, pool: Pool, http: aiohttp.ClientSession, metrics: ProxyMetrics) -> None:
        self._interval_s = settings.probe_interval_s
        self._timeout = aiohttp.ClientTimeout(total=settings.connect_timeout_s)
        self._pool, self._http, self._metrics = pool, http, metrics
        self._done: dict[_Pair, _Appearances] = {}
        self._under_way: set[_Pair] = set()
        self._pauses: dict[_Pair, tuple[float, float]] = {}
        """How long a pair's last pause was, and until when."""

    async def watch(self) -> None:
        """Introduce until cancelled; all pairs at once, at most one try of each."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for prefill, decode in list(self._due()):
                    self._under_way.add((prefill.index, decode.index))
                    tasks.create_task(self._introduce(prefill, decode))
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._pool.appeared.wait(), self._interval_s)
                self._pool.appeared.clear()

    def _due(self) -> Iterator[tuple[Instance, Instance]]:
        now_s = asyncio.get_running_loop().time()
        for prefill in self._pool.prefill:
            for decode in self._pool.decode:
                pair = prefill.index, decode.index
                if not (prefill.up and decode.up and self._pool.fits(*pair)) or pair in self._under_way:
                    continue
                if self._done.get(pair) != _appearances(prefill, decode) and now_s >= self._pauses.get(pair, (0, 0))[1]:
                    yield prefill, decode

    async def _introduce(self, prefill: Instance, decode: Instance) -> None:
        """One try. Whatever goes wrong with it, the pair meets at its first request, or here next time."""
        pair, appearances = (prefill.index, decode.index), _appearances(prefill, decode)
        try:
            result = await self._carry(prefill, decode)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            result = "failed"
            logger.info("introduction.failed prefill=%s decode=%s error=%r", prefill.url, decode.url, error)
        except Exception:
            result = "failed"
            logger.exception("introduction.failed prefill=%s decode=%s", prefill.url, decode.url)
        finally:
            self._under_way.discard(pair)
        self._metrics.introduction(result)
        if result in ("taken", "unsupported"):
            self._done[pair] = appearances
            self._pauses.pop(pair, None)
        else:
            pause_s = min(_LONGEST_PAUSE_S, 2 * self._pauses.get(pair, (_FIRST_PAUSE_S / 2, 0))[0])
            self._pauses[pair] = pause_s, asyncio.get_running_loop().time() + pause_s

    async def _carry(self, prefill: Instance, decode: Instance) -> str:
        status, body = await self._ask("GET", decode)
        if status == 200:
            status, body = await self._ask("POST", prefill, {"challenge": _text(body, "challenge")})
        if status == 200:
            status, body = await self._ask("POST", decode, {"introduction": _text(body, "introduction")})
        if status == 200:
            return "taken"
        logger.warning("introduction.refused prefill=%s decode=%s status=%d", prefill.url, decode.url, status)
        return "unsupported" if status in (404, 405) else "refused"

    async def _ask(self, method: str, instance: Instance, body: dict[str, str] | None = None) -> tuple[int, Any]:
        async with self._http.request(
            method, instance.url + INTRODUCE_PATH, json=body, timeout=self._timeout, allow_redirects=False
        ) as answer:
            raw = b""
            async for chunk in answer.content.iter_any():
                raw += chunk
                if len(raw) > _MAX_ANSWER_BYTES:
                    raise ValueError(f"{INTRODUCE_PATH} answers more than {_MAX_ANSWER_BYTES} bytes")
            return answer.status, json.loads(raw) if answer.status == 200 else None


def _appearances(prefill: Instance, decode: Instance) -> _Appearances:
    return prefill.num_ups, decode.num_ups


def _text(body: Any, name: str) -> str:
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{INTRODUCE_PATH} does not answer with {name!r}")
    return value
