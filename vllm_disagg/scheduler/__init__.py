"""Schedulers of the two roles, as `--scheduler-cls` names them.

Each name is a factory: GPUs schedule asynchronously by default and CPUs never do, and vLLM has a base class for each.
"""

from __future__ import annotations

from typing import Any


def prefill_scheduler(**kwargs: Any) -> Any:
    """Build the scheduler of a prefill instance; vLLM calls this with `Scheduler`'s keyword arguments."""
    from vllm_disagg.scheduler.build import build
    from vllm_disagg.scheduler.prefill import PrefillMixin

    return build(PrefillMixin, kwargs)


def decode_scheduler(**kwargs: Any) -> Any:
    """Build the scheduler of a decode instance; vLLM calls this with `Scheduler`'s keyword arguments."""
    from vllm_disagg.scheduler.build import build
    from vllm_disagg.scheduler.decode import DecodeMixin

    return build(DecodeMixin, kwargs)
