"""All that the connector's two halves share: what a step carries to the workers, and what workers tell at start."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from vllm_disagg.connector.messages import BeginRead
from vllm_disagg.transport.base import Region
from vllm_disagg.transport.layout import RankLayout


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """The reads that begin with this step, whose blocks this step's scheduling has allocated."""

    reads: tuple[BeginRead, ...] = ()


@dataclass(frozen=True)
class WorkerMetadata(KVConnectorHandshakeMetadata):
    """One worker's memory and the endpoint of its link; collected once by the engine's core.

    `descriptor` is a secret: it lets its holder read the KV cache.
    """

    descriptor: bytes
    layout: RankLayout
    link: str
    isa: str
    transport: str
    probe: Region | None = None

    def __repr__(self) -> str:
        return f"WorkerMetadata(link={self.link!r})"
