"""An emulated engine that notes its steps, to compare them with the real one's."""

from __future__ import annotations

from vllm_disagg.emulation.executor import EmulatedExecutor
from vllm_disagg.profiler.recorder import StepRecording


class RecordingEmulatedExecutor(StepRecording, EmulatedExecutor):
    """Chosen by `--emulate PROFILE --distributed-executor-backend` and this path."""
