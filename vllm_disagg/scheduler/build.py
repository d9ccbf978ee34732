"""Puts a role's mixin on the vLLM scheduler that this engine needs."""

from __future__ import annotations

from typing import Any

from vllm_disagg.scheduler import arrivals, wakeup
from vllm_disagg.seams import check_seams


def build(mixin: type, kwargs: dict[str, Any]) -> Any:
    """Check vLLM's seams, then build `mixin` over its synchronous or asynchronous scheduler.

    Raises:
        VllmUnavailable: this vLLM's extension points have moved.
    """
    check_seams()
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    wakeup.install()
    arrivals.install()
    base = AsyncScheduler if kwargs["vllm_config"].scheduler_config.async_scheduling else Scheduler
    name = mixin.__name__.removesuffix("Mixin") + base.__name__.removesuffix("Scheduler") + "Scheduler"
    return type(name, (mixin, base), {"__module__": mixin.__module__})(**kwargs)
