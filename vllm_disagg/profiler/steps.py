"""The log that a recording engine writes; its format is `vllm_disagg/core/steps.py`, which schedulers write too."""

from __future__ import annotations

from typing import Final

from vllm_disagg.core.steps import RecordedStep, cycles_s, read_steps

__all__ = ["STEPS_ENV", "RecordedStep", "cycles_s", "read_steps"]

STEPS_ENV: Final = "VLLM_DISAGG_STEPS"
"""Environment variable that names the file to which a recording engine appends its steps."""
