"""Calls a KV connector's worker half in the order in which vLLM's model runners call it.

`v1` is `KVConnectorModelRunnerMixin._get_kv_connector_output`, `v2` is `ActiveKVConnector` of the newer runner: there
loads begin, and results are collected, only after the step's tokens have been sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_disagg.emulation.settings import HookOrder

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput


class ConnectorHooks:
    """One worker's connector over the steps of an engine.

    Args:
        connector: its worker half.
        vllm_config: of this worker.
        caches: layer name to KV cache, in layer order.
        order: whose order.
    """

    def __init__(
        self,
        connector: KVConnectorBase_V1,
        vllm_config: VllmConfig,
        caches: Mapping[str, torch.Tensor],
        order: HookOrder,
    ) -> None:
        self._connector, self._config, self._caches, self.order = connector, vllm_config, dict(caches), order
        self._to_load: dict[str, Any] | None = None

    def before_forward(self, step: SchedulerOutput) -> None:
        """First thing in a step, also in an empty one."""
        assert step.kv_connector_metadata is not None
        self._connector.handle_preemptions(step.kv_connector_metadata)
        self._connector.bind_connector_metadata(step.kv_connector_metadata)
        has_forward = self.order == "v2" and step.total_num_scheduled_tokens > 0
        self._to_load = _load_arguments(step) if has_forward else {}
        if step.has_sync_kv_loads:
            self._start_load()

    def around_layers(self) -> None:
        """Once for each layer, as its attention is computed."""
        for name, cache in self._caches.items():
            self._connector.wait_for_layer_load(name)
            self._connector.save_kv_layer(name, cache, None)

    def forward_done(self) -> None:
        """After the last layer, also where there was none."""
        if self.order == "v2":
            self._connector.finish_forward()

    def after(self, step: SchedulerOutput) -> KVConnectorOutput:
        """Last thing in a step: begin its loads, and collect what has ended."""
        from vllm.v1.outputs import KVConnectorOutput

        if self._to_load is not None:
            self._start_load()
        connector = self._connector
        connector.wait_for_save()
        results = connector.get_transfer_results(step.finished_req_ids)
        output = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            invalid_block_ids=connector.get_block_ids_with_load_errors(),
            kv_connector_stats=connector.get_kv_connector_stats(),
            kv_cache_events=connector.get_kv_connector_kv_cache_events(),
            kv_connector_worker_meta=connector.build_connector_worker_meta(),
        )
        connector.clear_connector_metadata()
        return output

    def _start_load(self) -> None:
        from vllm.forward_context import get_forward_context, set_forward_context

        arguments, self._to_load = self._to_load or {}, None
        with set_forward_context(None, self._config):
            self._connector.start_load_kv(get_forward_context(), **arguments)


def _load_arguments(step: SchedulerOutput) -> dict[str, Any]:
    """What the newer runner tells of its batch."""
    import torch

    return {
        "scheduler_output": step,
        "request_state_indices": torch.arange(len(step.num_scheduled_tokens)),
        "request_ids": list(step.num_scheduled_tokens),
        "num_tokens": step.total_num_scheduled_tokens,
    }
