"""What both roles' schedulers owe the connector and the engine, whatever a request carries."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm_disagg.connector import DisaggConnector
from vllm_disagg.connector.decode_side import ReceiveReport
from vllm_disagg.connector.reserve import GrowthOutlook
from vllm_disagg.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Base
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request
else:
    _Base = object

logger = logging.getLogger(__name__)


class SafetyMixin(_Base):
    """Over `vllm.v1.core.sched.scheduler.Scheduler`. Arguments are passed through untouched, `super()` always runs."""

    connector: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.connector, DisaggConnector):
            raise ConfigError("the schedulers of vllm_disagg need its connector: start the engine with --kv-role")
        if not self.recompute_kv_load_failures:
            raise ConfigError("kv_load_failure_policy must be recompute: a failed KV transfer is computed again here")
        self.num_unknown_transfers = 0
        self.num_steps_under_way = 0
        """Steps that were scheduled and have not ended: more than one where they are scheduled ahead."""

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Malformed KV parameters cost their request the split; in stock vLLM some of them end the engine."""
        params = request.kv_transfer_params
        if params is not None and not isinstance(params, dict):
            logger.warning("request.bad_kv_params request=%s type=%s", request.request_id, type(params).__name__)
            request.kv_transfer_params = None
        super().add_request(request, *args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step: first what has arrived or was given back since the last one, then the plan."""
        self._apply(self.connector.begin_step(num_running=len(self.running), outlook=self._growth_outlook()))
        with self._planned():
            output = super().schedule(*args, **kwargs)
        self.num_steps_under_way += 1
        self._after(output)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """A step is over."""
        self.num_steps_under_way -= 1
        return super().update_from_output(scheduler_output, *args, **kwargs)

    @property
    def only_awaits_kv(self) -> bool:
        """Whether a step could do nothing yet: there are requests, and each waits until its KV has come, parked or not,
        or has ended while it was parked. The connector wakes the engine when there is something to do."""
        from vllm.v1.request import RequestStatus

        if self.running or self.finished_req_ids or self.finished_recving_kv_req_ids or not self.requests:
            return False
        if self.connector.has_pending_push_work():
            return False
        return all(
            request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            or RequestStatus.is_finished(request.status)
            or (request.status == RequestStatus.WAITING and self.connector.awaits_early(request))
            for request in self.requests.values()
        )

    def _growth_outlook(self) -> GrowthOutlook:
        """What requests are expected to grow by; nothing, where nobody expects anything."""
        return GrowthOutlook()

    def _planned(self) -> AbstractContextManager[None]:
        """Around vLLM's own scheduling of a step."""
        return nullcontext()

    def _after(self, output: Any) -> None:
        """The step is on its way."""

    def _apply(self, reports: list[ReceiveReport]) -> None:
        if not reports:
            return
        from vllm.v1.outputs import KVConnectorOutput

        failed = {report.request_id for report in reports if not report.ok}
        if failed:
            self._handle_failed_recving(failed)
        self._update_from_kv_xfer_finished(
            KVConnectorOutput(finished_recving={report.request_id for report in reports})
        )

    def _update_from_kv_xfer_finished(self, kv_connector_output: KVConnectorOutput, *args: Any, **kwargs: Any) -> None:
        """An id that vLLM does not know, or not in a state to receive, is dropped; stock vLLM would end the engine."""
        kv_connector_output.finished_sending = self._known(kv_connector_output.finished_sending, finished_only=True)
        kv_connector_output.finished_recving = self._known(kv_connector_output.finished_recving, finished_only=False)
        super()._update_from_kv_xfer_finished(kv_connector_output, *args, **kwargs)

    def _known(self, request_ids: set[str] | None, *, finished_only: bool) -> set[str] | None:
        from vllm.v1.request import RequestStatus

        known: set[str] = set()
        for request_id in request_ids or ():
            request = self.requests.get(request_id)
            finished = request is not None and RequestStatus.is_finished(request.status)
            parked = request is not None and request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            if finished or (parked and not finished_only):
                known.add(request_id)
            else:
                self.num_unknown_transfers += 1
                logger.error("transfer.unknown_request request=%s: dropped", request_id)
        return known or None
