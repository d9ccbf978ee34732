"""The scheduler of a prefill instance."""

from __future__ import annotations

from vllm_disagg.scheduler.safety import SafetyMixin


class PrefillMixin(SafetyMixin):
    """Gives held blocks back to the pool before each step (`SafetyMixin.schedule`). Orders as vLLM does."""
