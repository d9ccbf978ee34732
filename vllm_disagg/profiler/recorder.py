"""Executors that note each step's work and time. vLLM chooses one by `--distributed-executor-backend` and this path:

    VLLM_DISAGG_STEPS=steps.jsonl vllm serve MODEL --no-async-scheduling \
        --distributed-executor-backend vllm_disagg.profiler.recorder.RecordingExecutor
"""

from __future__ import annotations

import os
import time
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_disagg.errors import ConfigError
from vllm_disagg.profiler.steps import STEPS_ENV, RecordedStep

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput


class StepRecording(Executor):
    """Mixin in front of any executor: appends to the file that `VLLM_DISAGG_STEPS` names.

    A step counts from the call of `execute_model` to the return of `sample_tokens`: all that EngineCore waits for.

    Raises:
        ConfigError: the file is not named, or the engine launches a step before the last one is over, so that the time
            of one is not its own.
    """

    def _init_executor(self) -> None:
        if self.vllm_config.max_concurrent_batches > 1:
            raise ConfigError("steps can only be recorded one at a time: add --no-async-scheduling, and no pipeline")
        self._steps = _open_log()
        super()._init_executor()

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Note what the step computes and when it begins."""
        self._in_flight = (time.monotonic(), scheduler_output)
        return super().execute_model(scheduler_output, non_block=non_block)

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """Note when it ends. EngineCore blocks here where it works on one step at a time."""
        result = super().sample_tokens(grammar_output, non_block=non_block)
        at_s, step = self._in_flight
        step_s = time.monotonic() - at_s
        self._steps.write(RecordedStep(at_s=at_s, step_s=step_s, requests=requests_of(step)).line())
        return result


class RecordingExecutor(StepRecording, MultiprocExecutor):
    """vLLM's usual executor, with a log of its steps."""


def requests_of(step: SchedulerOutput) -> tuple[tuple[int, int], ...]:
    """`(computed, new)` of each request in a step, in the scheduler's order."""
    computed = {request.req_id: request.num_computed_tokens for request in step.scheduled_new_reqs}
    cached = step.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return tuple((computed[request_id], new) for request_id, new in step.num_scheduled_tokens.items())


def _open_log() -> TextIOWrapper:
    path = os.environ.get(STEPS_ENV)
    if not path:
        raise ConfigError(f"{STEPS_ENV} must name the file to which this engine's steps are appended")
    return Path(path).open("a", buffering=1, encoding="utf-8")
