"""`DisaggConnector`, as vLLM loads it: one class, built once in the engine's core and once in every worker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_disagg.config import EngineSettings
from vllm_disagg.connector import calm, support
from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.control_server import PrefillControl
from vllm_disagg.connector.decode_side import DecodeSide, Outlook, ReceiveReport
from vllm_disagg.connector.door import Door
from vllm_disagg.connector.engine_fingerprint import engine_fingerprint
from vllm_disagg.connector.holds import Holds
from vllm_disagg.connector.introductions import Introductions
from vllm_disagg.connector.messages import RankInfo
from vllm_disagg.connector.metadata import StepMetadata, WorkerMetadata
from vllm_disagg.connector.pair_probe import PairProbe
from vllm_disagg.connector.prefill_side import PrefillSide
from vllm_disagg.connector.probe_orders import ProbeOrders
from vllm_disagg.connector.reserve import GrowthOutlook, Reserve
from vllm_disagg.connector.secure import curve_keys
from vllm_disagg.connector.stats import TransferPromMetrics, TransferStats
from vllm_disagg.connector.worker_side import TransportWrapper, WorkerSide
from vllm_disagg.core.keys import load_key
from vllm_disagg.core.types import EngineId
from vllm_disagg.errors import ConfigError
from vllm_disagg.transport.layout import describe_heads

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_NO_GROWTH = GrowthOutlook()


class DisaggConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands finished prompts' KV from prefill to decode engines. Asynchronous pull by decode.

    The scheduler half is a `PrefillSide` or a `DecodeSide` with its control thread; the worker half is a `WorkerSide`.
    Failures never pass through vLLM's worker output: the scheduler half alone reports, to our scheduler, which calls
    `begin_step` before each step.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        support.log_with_vllm()
        transfer = vllm_config.kv_transfer_config
        self.settings = EngineSettings.from_extra_config(transfer.kv_connector_extra_config)
        self._engine_id = EngineId(transfer.engine_id)
        self._key = load_key(self.settings.key_file)
        self._wake: Callable[[], None] | None = None
        self._pool: BlockPool | None = None
        self._prefill: PrefillSide | None = None
        self._decode: DecodeSide | None = None
        self._control: PrefillControl | DecodeControl | None = None
        self._door: Door | None = None
        self._worker: WorkerSide | None = None
        self.scheduler_stats = TransferStats()
        support.check_supported(vllm_config, kv_cache_config)
        if support.steps_are_synchronous():
            calm.install()
        if role == KVConnectorRole.WORKER:
            self._worker = WorkerSide(
                settings=self.settings,
                engine_id=self._engine_id,
                key=self._key,
                groups=tuple(tuple(group.layer_names) for group in kv_cache_config.kv_cache_groups),
                heads=tuple(
                    support.heads_of_rank(vllm_config, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups
                ),
                num_blocks=kv_cache_config.num_blocks,
            )

    # Worker half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM calls this once, when the KV cache exists."""
        assert self._worker is not None
        support.prepare_cpu()
        pp_rank, tp_rank = support.worker_rank(self._vllm_config)
        self._worker.register(
            kv_caches, pp_rank=pp_rank, tp_rank=tp_rank, isa=support.instruction_set(self._vllm_config)
        )

    def wrap_transport(self, wrap: TransportWrapper) -> None:
        """Put something between the worker and its transport, such as a modelled link. Before `register_kv_caches`."""
        assert self._worker is not None
        self._worker.wrap_transport(wrap)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """vLLM carries this to the engine's core, once."""
        assert self._worker is not None
        return self._worker.metadata

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Start of a step. On CPU every earlier step has ended here, so reads may start before the forward pass that
        would otherwise delay them; with a device stream in flight they wait for `start_load_kv`."""
        super().bind_connector_metadata(connector_metadata)
        if support.steps_are_synchronous():
            self._begin_reads(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """After the forward pass was launched: asynchronous loads begin."""
        if not support.steps_are_synchronous():
            self._begin_reads(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only when all its KV has arrived."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: decode reads straight from the KV cache."""

    def wait_for_save(self) -> None:
        """Nothing was saved."""

    def _begin_reads(self, metadata: KVConnectorMetadata) -> None:
        assert self._worker is not None
        self._worker.begin_reads(metadata)

    # Scheduler half.

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """The pool whose blocks are held for decode, or kept out of use while a given-up read dies down."""
        self._pool = gpu_block_pool

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """All workers are ready: open the control channel."""
        workers = {rank: item for rank, item in metadata.items() if isinstance(item, WorkerMetadata)}
        if not workers:
            raise ConfigError("no worker has registered its KV cache: this model has none to transfer")
        heads = describe_heads(item.layout for item in workers.values())
        first = next(iter(workers.values()))
        fingerprint = engine_fingerprint(self._vllm_config, isa=first.isa, heads=heads, transport=first.transport)
        if self.settings.role == "prefill":
            self._open_prefill(fingerprint, workers)
        else:
            self._open_decode(fingerprint, workers)

    def _open_prefill(self, fingerprint: dict[str, str], workers: dict[tuple[int, int], WorkerMetadata]) -> None:
        address = f"tcp://{self.settings.control_host}:{self.settings.control_port}"
        holds = Holds(lease_s=self.settings.lease_s, cap_s=self.settings.hold_cap_s, on_freed=self._wake_engine)
        control = PrefillControl(
            engine_id=self._engine_id,
            address=address,
            keys=curve_keys(self._key),
            fingerprint=fingerprint,
            ranks=[
                RankInfo(
                    pp_rank=pp_rank, tp_rank=tp_rank, descriptor=item.descriptor, layout=item.layout, probe=item.probe
                )
                for (pp_rank, tp_rank), item in workers.items()
            ],
            worker_links=[item.link for item in workers.values()],
            holds=holds,
        )
        self._prefill = PrefillSide(
            engine_id=self._engine_id,
            control_address=address,
            lease_s=self.settings.lease_s,
            key=self._key,
            block_size=self._vllm_config.cache_config.block_size,
            holds=holds,
            verify=self.settings.verify,
        )
        self._prefill.on_granted = control.granted
        if self._pool is not None:
            self._prefill.bind_block_pool(self._pool)
        control.start()
        self._control = control
        logger.info("role.ready role=prefill engine=%s control=%s", self._engine_id, address)

    def _open_decode(self, fingerprint: dict[str, str], workers: dict[tuple[int, int], WorkerMetadata]) -> None:
        control = DecodeControl(
            keys=curve_keys(self._key),
            fingerprint=fingerprint,
            worker_links=[item.link for item in workers.values()],
            tp_ranks=[tp_rank for _, tp_rank in workers],
            pull_timeout_s=self.settings.pull_timeout_s,
            on_report=self._wake_engine,
        )
        self._decode = DecodeSide(
            control=control,
            key=self._key,
            block_size=self._vllm_config.cache_config.block_size,
            num_groups=len(self._kv_cache_config.kv_cache_groups),
            overdue_s=2 * self.settings.pull_timeout_s + support.OVERDUE_GRACE_S,
            reserve=Reserve(age=self._vllm_config.max_concurrent_batches - 1) if self.settings.early_reads else None,
        )
        if self._pool is not None:
            self._decode.bind_block_pool(self._pool)
        control.start()
        self._control = control
        self._door = self._open_door(control, fingerprint)
        logger.info("role.ready role=decode engine=%s", self._engine_id)

    def _open_door(self, control: DecodeControl, fingerprint: dict[str, str]) -> Door:
        keys = curve_keys(self._key)
        introductions = Introductions(
            engine_id=self._engine_id, key=self._key, tally=control.tally, introduce=control.introduce
        )
        orders = ProbeOrders(
            engine_id=self._engine_id,
            key=self._key,
            make_probe=lambda order: PairProbe(keys=keys, fingerprint=fingerprint, control=control, order=order),
        )
        door = Door(engine_id=self._engine_id, keys=keys, introduce=introductions.take, probe=orders.obey)
        door.start()
        return door

    def on_wake(self, wake: Callable[[], None]) -> None:
        """Our scheduler tells how to wake an engine that sleeps; without it the engine polls while we wait."""
        self._wake = wake

    def begin_step(self, *, num_running: int = 0, outlook: GrowthOutlook = _NO_GROWTH) -> list[ReceiveReport]:
        """Our scheduler calls this before each step: give back what is held no more, and tell what has arrived.

        Args:
            num_running: requests that this step goes on with.
            outlook: what they, and those to come, are expected to grow by.
        """
        if self._prefill is not None:
            self._prefill.give_back()
        if self._decode is None:
            return []
        reports = self._decode.take_reports()
        self._decode.before_step(num_running=num_running, outlook=outlook)
        return reports

    def on_arrival(self, request: Request) -> None:
        """A request has come in, and waits for the running step to end. On vLLM's input thread."""
        if self._decode is not None:
            self._decode.on_arrival(request)

    def on_idle_arrival(self, request: Request) -> None:
        """See `DecodeSide.on_idle_arrival`."""
        if self._decode is not None:
            self._decode.on_idle_arrival(request)

    def awaits_early(self, request: Request) -> bool:
        """See `DecodeSide.awaits_early`."""
        return self._decode is not None and self._decode.awaits_early(request)

    def lend(self, request: Request, num_local_tokens: int) -> bool:
        """See `DecodeSide.lend`."""
        return self._decode is not None and self._decode.lend(request, num_local_tokens)

    def lent(self, request: Request, block_ids: tuple[list[int], ...] | None) -> bool:
        """See `DecodeSide.lent`."""
        assert self._decode is not None
        return self._decode.lent(request, block_ids)

    def on_new_request(self, request: Request) -> None:
        """A request has come in."""
        side = self._prefill or self._decode
        if side is not None:
            side.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of its prompt can be fetched; see `DecodeSide.match`."""
        return self._decode.match(request, num_computed_tokens) if self._decode is not None else (0, False)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """All groups are fetched."""
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has its blocks."""
        if self._decode is not None:
            self._decode.on_allocated(request, blocks, num_external_tokens)
        elif self._prefill is not None:
            self._prefill.on_scheduled(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What this step carries to the workers."""
        if self._decode is None:
            return StepMetadata()
        preempted = scheduler_output.preempted_req_ids or ()
        self._decode.on_scheduled(scheduler_output.num_scheduled_tokens.keys(), preempted)
        return StepMetadata(reads=self._decode.take_reads())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """For one KV cache group; vLLM calls the variant for all groups."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended. vLLM may always free it: held blocks carry a reference of ours."""
        if self._prefill is not None:
            return False, self._prefill.on_finished(request, block_ids)
        if self._decode is not None:
            self._decode.on_finished(request)
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether the engine must step although no request wants it to: something waits for `begin_step`. Where we
        cannot wake the engine, it also polls while something will."""
        side = self._prefill or self._decode
        if side is None:
            return False
        return side.has_work or (self._wake is None and side.num_outstanding > 0)

    @property
    def num_outstanding(self) -> int:
        """Transfers this engine still follows or holds blocks for; 0 at rest."""
        side = self._prefill or self._decode
        return 0 if side is None else side.num_followed

    def outlook(self, request: Request) -> Outlook:
        """See `DecodeSide.outlook`."""
        return "local" if self._decode is None else self._decode.outlook(request)

    @property
    def num_held_blocks(self) -> int:
        """KV blocks that prefill keeps for decode."""
        return 0 if self._prefill is None else self._prefill.num_held_blocks

    def num_early_blocks(self, request: Request) -> int:
        """See `DecodeSide.num_early_blocks`."""
        return 0 if self._decode is None else self._decode.num_early_blocks(request)

    @property
    def num_kept_blocks(self) -> int:
        """See `DecodeSide.num_kept_blocks`."""
        return 0 if self._decode is None else self._decode.num_kept_blocks

    def reset_cache(self) -> bool | None:
        """The KV cache is being reset, for new weights perhaps: nothing that is held may be read any more."""
        if self._prefill is not None:
            self._prefill.reset()
        return None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The scheduler half tells all; workers tell nothing."""
        side = self._prefill or self._decode
        if side is None:
            return None
        stats = TransferStats()
        side.add_stats(stats)
        stats.aggregate(self.scheduler_stats)
        self.scheduler_stats.reset()
        if self._control is not None:
            stats.add(self._control.tally)
        return stats

    def shutdown(self) -> None:
        """The engine or the worker ends."""
        if self._door is not None:
            self._door.stop()
        if self._control is not None:
            self._control.stop()
        if self._worker is not None:
            self._worker.shutdown()

    def _wake_engine(self) -> None:
        if self._wake is not None:
            self._wake()

    # vLLM 0.33 asks these too.

    def unregister_kv_caches(self) -> None:
        """Sleep mode is refused below."""

    def restore_kv_caches(self) -> None:
        """Sleep mode is refused below."""

    @classmethod
    def supports_sleep_mode(cls, *args: Any, **kwargs: Any) -> bool:
        """A sleeping engine would give away memory that peers may read."""
        return False

    # Asked without an instance.

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Whole blocks of a layer in one piece, where the backend has a choice."""
        if vllm_config.model_config is None or vllm_config.model_config.use_mla:
            return None
        return "LBHNC"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Rebuild our statistics in the API server."""
        return TransferStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Register our metrics beside vLLM's."""
        return TransferPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
