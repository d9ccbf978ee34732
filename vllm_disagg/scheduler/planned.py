"""What both roles' schedulers share: before each step they decide which waiting requests vLLM gets to see, and in which
order; after it they put the others back. vLLM's own loop then does what it always does with what it sees.

So a plan can be wrong without harm: vLLM checks memory, slots and budgets itself. A plan that fails is logged and
counted, and that step goes as vLLM would have it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_disagg.config import EngineSettings
from vllm_disagg.core.scheduling.growth import quantile_of
from vllm_disagg.core.scheduling.hints import Hints, clean, hints_of
from vllm_disagg.core.steps import requests_of
from vllm_disagg.profiles import load_profile
from vllm_disagg.scheduler.measure import Measure, memory_file
from vllm_disagg.scheduler.safety import SafetyMixin

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

WAITING_SECONDS = "vllm_disagg_sched_waiting_seconds_total"
PLAN_FAILURES = "vllm_disagg_sched_plan_failures_total"
HINTS = "vllm_disagg_sched_hints_total"
BATCH_TOKENS = "vllm_disagg_sched_batch_tokens"


@dataclass(slots=True, kw_only=True)
class Facts:
    """What the scheduler keeps of a request beside vLLM's own state.

    Args:
        arrived_s: when this engine heard of it, monotonic.
        hints: what it was promised.
        first_s: when it had its first token.
        passes: steps that went past it while it was first in line and found no memory.
        quantile: of the lengths of past answers, the one that it is expected to reach.
    """

    arrived_s: float
    hints: Hints
    first_s: float | None = None
    passes: int = 0
    quantile: float = 0.5


class PlannedMixin(SafetyMixin):
    """Over vLLM's scheduler: plans, measures, and keeps what requests were promised."""

    waiting: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: EngineSettings = self.connector.settings
        self.facts: dict[str, Facts] = {}
        self._num_requests = 0
        self.measure = self._begin_measuring()
        self._waits: dict[str, float] = {}
        self._is_fcfs = self._has_plain_queues()
        self._plans = self.settings.scheduling == "phase" and self._can_plan()
        self._presses_back = self._plans or self.settings.back_pressure

    def _has_plain_queues(self) -> bool:
        from vllm.v1.core.sched.request_queue import FCFSRequestQueue

        return isinstance(self.waiting, FCFSRequestQueue) and isinstance(self.kv_holding_waiting, FCFSRequestQueue)

    def _can_plan(self) -> bool:
        if self._is_fcfs:
            return True
        logger.warning("plan.off: --scheduling-policy %s orders requests itself", self.policy.value)
        return False

    def _begin_measuring(self) -> Measure:
        settings, config = self.settings, self.vllm_config
        parallel, model = config.parallel_config, config.model_config
        profile = None
        if settings.profile is not None:
            profile = load_profile(settings.profile).entry(parallel.tensor_parallel_size).latency
        return Measure(
            profile=profile,
            longest=min(self.scheduler_config.max_num_batched_tokens, self.max_model_len),
            log=Path(settings.step_log) if settings.step_log is not None else None,
            memory=memory_file(
                model.model, str(model.dtype), model.quantization, parallel.tensor_parallel_size,
                parallel.pipeline_parallel_size, _device(), settings.role,
            ) if settings.scheduling == "phase" and not config.additional_config else None,
        )  # fmt: skip

    # What vLLM calls.

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Note what the request was promised."""
        super().add_request(request, *args, **kwargs)
        self.facts_of(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.facts.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """The step is over."""
        self.measure.done(scheduler_output, now_s=time.monotonic())
        return super().update_from_output(scheduler_output, *args, **kwargs)

    def shutdown(self) -> None:
        """The engine ends."""
        self.measure.close()
        super().shutdown()

    # The plan.

    def plan(self, line: Sequence[Request], now_s: float) -> Sequence[Request]:
        """The waiting requests that vLLM sees in this step, in the order in which it shall look at them.

        Args:
            line: all that wait without holding KV, in vLLM's order.
            now_s: monotonic.
        """
        raise NotImplementedError

    def _forget_plan(self) -> None:
        """Nothing of the last step's plan may be left, whether this one gets a plan or not."""

    def hold_back(self, now_s: float) -> bool:
        """Back-pressure, whoever plans: whether nobody may be admitted in this step. Called before `plan`."""
        return False

    @contextmanager
    def _planned(self) -> Iterator[None]:
        line = list(self.waiting)
        seen: Sequence[Request] | None = None
        holds_back = False
        self._forget_plan()
        if self._is_unpaused():
            try:
                now_s = time.monotonic()
                holds_back = self._presses_back and self.hold_back(now_s)
                if self._plans and not holds_back:
                    seen = self.plan(line, now_s)
            except Exception:  # vLLM's own order serves as well; nothing may end the engine's loop
                logger.exception("plan.failed: this step goes in vLLM's order")
                self._forget_plan()
                self.stats.count(PLAN_FAILURES)
        if holds_back:
            with self._without_waiting():
                yield
            return
        if seen is None:
            yield
            return
        self.waiting.clear()
        self.waiting.extend(seen)
        try:
            yield
        finally:
            self._put_back(line, seen)

    @contextmanager
    def _without_waiting(self) -> Iterator[None]:
        """vLLM sees nobody who waits. Whoever begins to wait meanwhile, since it gave way, goes first afterwards."""
        from vllm.v1.core.sched.request_queue import create_request_queue

        kept = self.waiting
        self.waiting = create_request_queue(self.policy)
        try:
            yield
        finally:
            new = list(self.waiting)
            self.waiting = kept
            for request in reversed(new):
                self.waiting.prepend_request(request)

    def _put_back(self, line: Sequence[Request], seen: Sequence[Request]) -> None:
        """Restore vLLM's order: what is new in the queue first, as vLLM has put it, then what is left of the line."""
        left = list(self.waiting)
        known = {id(request) for request in line}
        still = {id(request) for request in left} | (known - {id(request) for request in seen})
        self.waiting.clear()
        self.waiting.extend(request for request in left if id(request) not in known)
        self.waiting.extend(request for request in line if id(request) in still)

    def _after(self, output: Any) -> None:
        self.measure.scheduled(output, requests_of(output), now_s=time.monotonic())

    def waits_for(self, reasons: Sequence[str], now_s: float) -> None:
        """Count the time in which requests waited though a step was being made, by reason."""
        for reason, since_s in list(self._waits.items()):
            self.stats.count(WAITING_SECONDS, now_s - since_s, label=reason)
            del self._waits[reason]
        self._waits.update(dict.fromkeys(reasons, now_s))

    @property
    def stats(self) -> Any:
        """What the engine reports on `/metrics`."""
        return self.connector.scheduler_stats

    def _is_unpaused(self) -> bool:
        from vllm.v1.core.sched.interface import PauseState

        return bool(self.pause_state == PauseState.UNPAUSED)

    def _hints(self, request: Request) -> Hints:
        extra = getattr(request.sampling_params, "extra_args", None)
        values, touched = clean(extra) if isinstance(extra, dict) else ({}, {})
        for outcome in touched.values():
            self.stats.count(HINTS, label=outcome)
        return hints_of(
            values,
            ttft_s=self.settings.slo_ttft_s,
            tpot_s=self.settings.slo_tpot_s,
            priority=request.priority,
        )

    def facts_of(self, request: Request) -> Facts:
        """What is kept of a request; noted now where it is not yet."""
        found = self.facts.get(request.request_id)
        if found is None:
            self._num_requests += 1
            found = Facts(
                arrived_s=time.monotonic(), hints=self._hints(request), quantile=quantile_of(self._num_requests)
            )
            self.facts[request.request_id] = found
        return found


def _device() -> str:
    from vllm.platforms import current_platform

    try:
        return str(current_platform.get_device_name())
    except NotImplementedError:
        return str(current_platform.device_name)
