"""What all requests of one app share."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from vllm_disagg.config import ProxySettings
from vllm_disagg.core.types import TransferId
from vllm_disagg.proxy.instances import Instance, Pool
from vllm_disagg.proxy.metrics import ProxyMetrics
from vllm_disagg.proxy.upstream import LegFailed, Upstream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """KV that a prefill instance keeps, or will keep, for a request of ours."""

    prefill: Instance
    transfer_id: TransferId


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The app's settings, engines, client and metrics, and the task group that outlives every request."""

    settings: ProxySettings
    pool: Pool
    http: aiohttp.ClientSession
    metrics: ProxyMetrics
    tasks: asyncio.TaskGroup

    def release(self, hold: Hold, headers: Mapping[str, str]) -> None:
        """Tell a prefill instance that nobody will fetch this KV. Goes on when the request that asked is cancelled."""
        self.tasks.create_task(self._release(hold, headers))

    async def _release(self, hold: Hold, headers: Mapping[str, str]) -> None:
        result = "failed"
        body = json.dumps({"transfer_id": hold.transfer_id}).encode()
        deadline_s = asyncio.get_running_loop().time() + self.settings.connect_timeout_s
        try:
            async with Upstream(self.http, hold.prefill) as leg:
                await leg.open("POST", "/disagg/release", deadline_s=deadline_s, headers=headers, body=body)
                answer = json.loads(await leg.read_all(deadline_s=deadline_s))
            if leg.status == 200 and isinstance(answer, dict):
                result = "released" if answer.get("released") else "not_held"
        except (LegFailed, ValueError) as error:  # the lease ends it
            logger.warning("release.failed prefill=%s cause=%s", hold.prefill.url, error)
        self.metrics.release(result)
