"""One rank of an emulated engine: its KV cache, its part of the stamps, and its connector. No weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from vllm_disagg.core.link import LINKS
from vllm_disagg.core.profile import Profile
from vllm_disagg.emulation.faults import Faults
from vllm_disagg.emulation.hooks import ConnectorHooks
from vllm_disagg.emulation.link import EmulatedLink, Ledger, OwnLedger, SharedLedger
from vllm_disagg.emulation.requests import Scheduled
from vllm_disagg.emulation.settings import EmulationSettings
from vllm_disagg.emulation.shape import CELL_BYTES, CacheShape
from vllm_disagg.emulation.stamps import Stamper, Words

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from vllm_disagg.transport.base import Transport

logger = logging.getLogger(__name__)

LAYER_NAME = "emulated.layers.{}.attn"


class EmulatedWorker(WorkerBase):
    """Answers what vLLM's executor asks of a worker. All ranks of an engine live in its EngineCore process.

    Args:
        vllm_config: of this rank.
        rank: in the engine: pipeline stage times tensor-parallel size plus tensor-parallel rank.
        settings: of the emulation.
        profile: of the device.
        shape: of the whole model's KV cache.
        seed: of the model's stamps.
        faults: to inject into transfers.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        rank: int,
        *,
        settings: EmulationSettings,
        profile: Profile,
        shape: CacheShape,
        seed: int,
        faults: Faults,
    ) -> None:
        super().__init__(vllm_config, local_rank=rank, rank=rank, distributed_init_method="", is_driver_worker=True)
        self._settings, self._profile, self._shape, self._faults = settings, profile, shape, faults
        self._tp = self.parallel_config.tensor_parallel_size
        self._pp = self.parallel_config.pipeline_parallel_size
        self.pp_rank, self.tp_rank = divmod(rank, self._tp)
        self._groups = shape.groups_of(self.pp_rank, self._pp)
        self._heads = shape.heads_of(self.tp_rank, self._tp)
        self._stamper = Stamper(seed, groups=self._groups, heads=self._heads, block_size=shape.block_size)
        self.device = torch.device("cpu")
        self.caches: dict[str, torch.Tensor] = {}
        self._cells: list[Words] = []
        self._connector: Any = None
        self.hooks: ConnectorHooks | None = None

    # What vLLM asks at start.

    def init_device(self) -> None:
        """There is no device."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """There are no weights."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """One layer for each layer group of this rank."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        spec = FullAttentionSpec(
            block_size=self._shape.block_size,
            num_kv_heads=len(self._heads),
            head_size=CELL_BYTES // 2,
            dtype=torch.uint8,
        )
        return {LAYER_NAME.format(group): spec for group in self._groups}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Each layer's blocks one after the other, heads outside tokens."""
        return ["LBHNC"]

    def determine_available_memory(self) -> int:
        """Bytes of emulated KV that stand for the tokens whose KV fits the modelled device."""
        asked = self.cache_config.kv_cache_memory_bytes
        if asked:
            tokens = asked * self._tp * self._pp // self._profile.model.kv_bytes_per_token
        else:
            tokens = self._profile.kv_capacity_tokens(self._tp, self._pp)
        block_bytes = CELL_BYTES * len(self._heads) * self._shape.block_size * len(self._groups)
        return int(tokens // self._shape.block_size * block_bytes)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache and hand it to the connector."""
        from vllm.v1.attention.backends.utils import record_kv_cache_layout

        num_blocks = kv_cache_config.num_blocks
        self.cache_config.num_gpu_blocks = num_blocks
        if kv_cache_config.kv_cache_layout is not None:
            record_kv_cache_layout(self.cache_config, kv_cache_config.kv_cache_layout)
        shape = (num_blocks, len(self._heads), self._shape.block_size)
        for group in self._groups:
            cells = np.zeros(shape, np.uint64)  # pages that nobody touches cost nothing
            self._cells.append(cells)
            self.caches[LAYER_NAME.format(group)] = torch.from_numpy(cells.view(np.uint8).reshape(*shape, CELL_BYTES))
        self._connect(kv_cache_config)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Nothing to compile."""
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def update_max_model_len(self, max_model_len: int) -> None:
        """vLLM has found that fewer tokens fit."""
        self.model_config.max_model_len = max_model_len

    def get_kv_connector_handshake_metadata(self) -> dict[tuple[int, int], Any] | None:
        """What the connector's scheduler half must know of this rank."""
        metadata = None if self._connector is None else self._connector.get_handshake_metadata()
        return None if metadata is None else {(self.pp_rank, self.tp_rank): metadata}

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Text generation only."""
        return ("generate",)

    # What a step does.

    def write(self, part: Scheduled, digests: Words) -> None:
        """Leave the stamps of a request's new tokens in its blocks.

        Args:
            part: the request and how many tokens it computes.
            digests: of these tokens.
        """
        positions = np.arange(part.state.num_computed, part.end)
        blocks = np.asarray(part.state.block_ids)[positions // self._shape.block_size]
        slots = positions % self._shape.block_size
        for cells, stamps in zip(self._cells, self._stamper.stamps(digests), strict=True):
            cells[blocks, :, slots] = stamps.T

    @property
    def share(self) -> tuple[range, range]:
        """Layer groups and heads of this rank. With more ranks than heads, several have the same."""
        return self._groups, self._heads

    def read(self, blocks: NDArray[np.int64], lengths: NDArray[np.int64]) -> Words:
        """Sum up blocks as they are now."""
        return self._stamper.read(self._cells, blocks, lengths)

    def synchronize_device(self) -> None:
        """Nothing is under way between two steps."""

    def shutdown(self) -> None:
        """End the connector's threads and give the memory back."""
        if self._connector is not None:
            self._connector.shutdown()

    def _connect(self, kv_cache_config: KVCacheConfig) -> None:
        transfer = self.vllm_config.kv_transfer_config
        if transfer is None or not transfer.is_kv_transfer_instance:
            return
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

        self._connector = KVConnectorFactory.create_connector(
            config=self.vllm_config, role=KVConnectorRole.WORKER, kv_cache_config=kv_cache_config
        )
        if hasattr(self._connector, "wrap_transport"):
            self._connector.wrap_transport(self._linked)
        self._connector.register_kv_caches(self.caches)
        self.hooks = ConnectorHooks(self._connector, self.vllm_config, self.caches, self._settings.emulate_hook_order)

    def _linked(self, transport: Transport) -> Transport:
        """The transport behind a modelled link."""
        name = self._settings.emulate_link
        ledger_file = self._settings.emulate_link_ledger
        ledger: Ledger = SharedLedger(Path(ledger_file)) if ledger_file else OwnLedger()
        return EmulatedLink(
            transport,
            link=None if name == "none" else LINKS[name],
            scale=self._profile.model.kv_bytes_per_token / self._shape.bytes_per_token,
            dilation=self._settings.dilation,
            own_name=f"{self.vllm_config.kv_transfer_config.engine_id}/pp{self.pp_rank}tp{self.tp_rank}",
            ledger=ledger,
            faults=self._faults,
        )


def read_blocks(workers: Sequence[EmulatedWorker], block_size: int, parts: Sequence[Scheduled]) -> list[Words]:
    """Sums of every block of some requests, over all ranks, as the blocks are now.

    Of ranks with the same share the first counts; another one adds nothing as long as it holds the same.
    """
    blocks, lengths, ends = [], [], []
    for part in parts:
        count = -(-part.end // block_size)
        blocks.append(np.asarray(part.state.block_ids[:count], np.int64))
        lengths.append(np.minimum(part.end - np.arange(count) * block_size, block_size))
        ends.append(count)
    if not parts:
        return []
    all_blocks, all_lengths = np.concatenate(blocks), np.concatenate(lengths)
    total, firsts = np.zeros(len(all_blocks), np.uint64), dict[tuple[range, range], Words]()
    for number, worker in enumerate(workers):
        sums = worker.read(all_blocks, all_lengths)
        first = firsts.setdefault(worker.share, sums)
        total += sums if first is sums else (sums - first) * np.uint64(2 * number + 1)
    return np.split(total, np.cumsum(ends)[:-1])
