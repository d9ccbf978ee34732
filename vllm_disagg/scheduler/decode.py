"""The scheduler of a decode instance."""

from __future__ import annotations

from vllm_disagg.scheduler.safety import SafetyMixin


class DecodeMixin(SafetyMixin):
    """Learns before each step which parked requests have their KV (`SafetyMixin.schedule`). Orders as vLLM does."""
