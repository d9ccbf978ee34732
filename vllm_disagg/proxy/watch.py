"""Watching the engines: health probes, who they say they are, and their return."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import aiohttp

from vllm_disagg.config import ProxySettings
from vllm_disagg.core.fingerprint import Fingerprint
from vllm_disagg.proxy.instances import Instance, Pool

logger = logging.getLogger(__name__)

MAX_STRIKES: Final = 3
"""Probes in a row that may time out before an engine is declared down. A busy engine answers late; a refused
connection or an error status needs no second look."""

_MAX_STATUS_BYTES: Final = 1024 * 1024


class Watcher:
    """Probes every instance on its own rhythm, for as long as `watch` runs."""

    def __init__(self, settings: ProxySettings, pool: Pool, http: aiohttp.ClientSession) -> None:
        self._interval_s = settings.probe_interval_s
        self._timeout = aiohttp.ClientTimeout(total=settings.probe_timeout_s)
        self._pool, self._http = pool, http

    async def watch(self, instance: Instance) -> None:
        """Probe one instance until cancelled, after a first `look`. A probe that goes wrong is a finding, no error."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(instance.nudged.wait(), self._interval_s)
            instance.nudged.clear()
            try:
                await self.look(instance)
            except Exception:  # one watch that ends would end them all, and the proxy with them
                logger.exception("probe.failed role=%s url=%s", instance.role, instance.url)

    async def look(self, instance: Instance) -> None:
        """Probe one instance once and draw the conclusions."""
        try:
            status, _ = await self._get(instance, "/health")
            if status != 200:
                return self._pool.declare_down(instance, f"health answers {status}")
            instance.strikes = 0
            if not instance.up:
                await self._identify(instance)
        except TimeoutError:
            instance.strikes += 1
            if instance.strikes >= MAX_STRIKES:
                self._pool.declare_down(instance, "health does not answer")
            elif not instance.up:
                self._pool.note(instance, "not up: health does not answer", level=logging.WARNING)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._pool.declare_down(instance, f"probe fails: {type(error).__name__}")
        return None

    async def _identify(self, instance: Instance) -> None:
        """Read once who has (re)appeared here, and let it in if it belongs here.

        Raises:
            ValueError: its status cannot be read; the next probe asks again.
        """
        code, raw = await self._get(instance, "/disagg/status")
        if code == 404 and instance.role == "decode":
            self._pool.bring_up(instance, None)
            return self._pool.note(
                instance, "up, without /disagg/status: serves locally only; start it with --kv-role decode",
                level=logging.WARNING,
            )  # fmt: skip
        if code != 200:
            raise ValueError(f"/disagg/status answers {code}")
        status = _object(json.loads(raw))
        if (role := status.get("role")) != instance.role:
            return self._pool.note(
                instance, f"refused: its role is {role!r}, listed as {instance.role}; start it with "
                f"--kv-role {instance.role} or list it under --{role}", level=logging.ERROR,
            )  # fmt: skip
        self._pool.bring_up(instance, _fingerprint(status.get("fingerprint")))
        return self._pool.note(instance, "up")

    async def _get(self, instance: Instance, path: str) -> tuple[int, bytes]:
        async with self._http.get(instance.url + path, timeout=self._timeout, allow_redirects=False) as answer:
            raw = b""
            async for chunk in answer.content.iter_any():
                raw += chunk
                if len(raw) > _MAX_STATUS_BYTES:
                    raise ValueError(f"{path} answers more than {_MAX_STATUS_BYTES} bytes")
            return answer.status, raw


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("/disagg/status is not an object")
    return value


def _fingerprint(value: Any) -> Fingerprint | None:
    if value is None:
        return None
    return {str(name): str(factor) for name, factor in _object(value).items()}
