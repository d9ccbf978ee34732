"""The executor of an emulated engine: vLLM chooses it by `--distributed-executor-backend`, `--emulate` sets that."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.serial_utils import run_method

from vllm_disagg.connector.support import log_with_vllm
from vllm_disagg.core.latency import work_of
from vllm_disagg.emulation import outputs
from vllm_disagg.emulation.clock import DeviceClock, sharpen_sleep, wait_until
from vllm_disagg.emulation.faults import Faults
from vllm_disagg.emulation.hooks import ConnectorHooks
from vllm_disagg.emulation.punctuality import Punctuality
from vllm_disagg.emulation.requests import RequestTable, Scheduled
from vllm_disagg.emulation.sampler import Choice
from vllm_disagg.emulation.settings import EmulationSettings, label_of
from vllm_disagg.emulation.shape import CacheShape, emulated_heads
from vllm_disagg.emulation.stamps import combine, seed_of
from vllm_disagg.emulation.vocabulary import vocabulary_of
from vllm_disagg.emulation.worker import EmulatedWorker, read_blocks
from vllm_disagg.errors import ConfigError
from vllm_disagg.profiles import load_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


class LazyFuture(Future[Any]):
    """The result of a step on the device, finished by whoever asks for it: EngineCore, as it waits for a real one."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        super().__init__()
        self._finish = finish

    def result(self, timeout: float | None = None) -> Any:
        """Wait until the device is done."""
        if not super().done():
            try:
                self.set_result(self._finish())
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


class _Step:
    """One step between its launch and its output."""

    __slots__ = ("deadline_s", "digests", "kv_outputs", "parts", "step")

    def __init__(self, step: SchedulerOutput, parts: list[Scheduled]) -> None:
        self.step, self.parts = step, parts
        self.digests: dict[str, int] = {}
        self.deadline_s = 0.0
        self.kv_outputs: list[KVConnectorOutput] = []


class EmulatedExecutor(Executor):
    """Runs steps on an emulated device. Every rank is an `EmulatedWorker` in this process.

    A step is launched by `execute_model`, which writes and reads the KV, and is over when the result is asked for and
    the device's time has passed. Its token is sampled in `sample_tokens`, as in vLLM's model runners.

    Raises:
        ConfigError: the profile, the model and the parallelism do not fit each other.
    """

    supports_pp = True

    def _init_executor(self) -> None:
        sharpen_sleep()
        log_with_vllm()
        settings = EmulationSettings.from_config(self.vllm_config.additional_config)
        if settings is None:
            raise ConfigError("an emulated engine needs --emulate PROFILE")
        parallel, profile = self.parallel_config, load_profile(settings.emulate, model=settings.emulate_model or None)
        self._latency = profile.entry(parallel.tensor_parallel_size).latency
        self._vocabulary = vocabulary_of(self.model_config, settings.emulate_output_tokens)
        self._block_size = self.cache_config.block_size
        seed = seed_of(profile.model.name)
        self._requests = RequestTable(seed, self._vocabulary.size)
        self._faults = Faults.from_environment()
        self._clock = DeviceClock(
            num_stages=parallel.pipeline_parallel_size,
            dilation=settings.dilation,
            overhead_s=settings.emulate_overhead_ms / 1e3,
            jitter=settings.emulate_jitter,
            seed=settings.emulate_seed,
            hides_host=settings.emulate_host == "hidden",
        )
        shape = CacheShape(
            num_groups=settings.emulate_layer_groups,
            num_heads=emulated_heads(self.model_config.get_total_num_kv_heads()),
            block_size=self._block_size,
        )
        self._workers = [
            EmulatedWorker(
                _config_of_rank(self.vllm_config, rank),
                rank,
                settings=settings,
                profile=profile,
                shape=shape,
                seed=seed,
                faults=self._faults,
            )
            for rank in range(parallel.world_size)
        ]
        self._overlaps = self.vllm_config.max_concurrent_batches > 1
        self._collects_late = settings.emulate_hook_order == "v2"
        self._launched: _Step | None = None
        self._num_steps = 0
        self._punctuality = Punctuality() if settings.dilation else None
        logger.warning(
            "emulation.start %s: step times of %s (%s); no model is computed, answers mean nothing",
            label_of(settings), profile.device, profile.kind,
        )  # fmt: skip

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Give every rank its KV cache."""
        for worker, kv_cache_config in zip(self._workers, kv_cache_configs, strict=True):
            worker.initialize_from_config(kv_cache_config)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Call every rank, one after the other."""
        results = [run_method(worker, method, args, kwargs or {}) for worker in self._workers]
        if not non_block:
            return results
        future: Future[Any] = Future()
        future.set_result(results)
        return future

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Launch a step. Its result is None when `sample_tokens` is to follow, an output when nothing was computed."""
        now_s = time.monotonic()
        for hooks in self._hooks:
            hooks.before_forward(scheduler_output)
        launched = _Step(scheduler_output, self._requests.update(scheduler_output))
        if not scheduler_output.total_num_scheduled_tokens:
            for hooks in self._hooks:
                hooks.forward_done()
            launched.kv_outputs = [hooks.after(scheduler_output) for hooks in self._hooks]
            output = self._aggregated(EMPTY_MODEL_RUNNER_OUTPUT, launched)
            return _done(output) if non_block else output
        self._launched = launched
        self._num_steps += 1
        goes_on = bool(scheduler_output.scheduled_cached_reqs.req_ids)
        launched.deadline_s = self._clock.launch(self._seconds(launched), now_s, goes_on=goes_on)
        self._forward(launched)
        if self._overlaps and not self._collects_late:
            self._collect(launched)
        future = LazyFuture(lambda: self._wait(launched))
        return future if non_block else future.result()

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """Sample what the last step launched was due."""
        launched, self._launched = self._launched, None
        assert launched is not None, "sample_tokens follows execute_model"
        chosen = outputs.sample(launched.parts, launched.digests, self._vocabulary, grammar_output)
        if self._collects_late:
            self._collect(launched)
        output = self._aggregated(self._output(launched, chosen), launched)
        if not self._overlaps:
            return _done(output) if non_block else output

        def finish() -> ModelRunnerOutput:
            self._wait(launched)
            return output

        future = LazyFuture(finish)
        return future if non_block else future.result()

    def check_health(self) -> None:
        """As healthy as its process."""

    @property
    def _hooks(self) -> list[ConnectorHooks]:
        return [worker.hooks for worker in self._workers if worker.hooks is not None]

    def _seconds(self, launched: _Step) -> float:
        """How long the device takes, faults included."""
        if self._faults.crashes(self._num_steps):
            raise RuntimeError(f"emulated crash at step {self._num_steps}, as asked for")
        work = work_of((part.state.num_computed, part.new) for part in launched.parts)
        return self._latency.step_s(work) * self._faults.step_factor(self._num_steps) + self._faults.stall_s(
            self._num_steps
        )

    def _forward(self, launched: _Step) -> None:
        """Write the new tokens' KV and read that of every request that is due a token."""
        for part in launched.parts:
            state = part.state
            digests = state.prefix.digests(state.tokens, state.num_computed, part.end)
            for worker in self._workers:
                worker.write(part, digests)
        for hooks in self._hooks:
            hooks.around_layers()
            hooks.forward_done()
        due = [part for part in launched.parts if part.samples]
        sums = read_blocks(self._workers, self._block_size, due)
        launched.digests = {
            part.state.request_id: combine(of_blocks) for part, of_blocks in zip(due, sums, strict=True)
        }

    def _wait(self, launched: _Step) -> None:
        late_s = wait_until(launched.deadline_s)
        if self._punctuality is not None:
            self._punctuality.step(late_s)
        if not self._overlaps and not self._collects_late:
            self._collect(launched)

    def _collect(self, launched: _Step) -> None:
        launched.kv_outputs = [hooks.after(launched.step) for hooks in self._hooks]

    def _output(self, launched: _Step, chosen: dict[str, Choice]) -> ModelRunnerOutput:
        ids = [part.state.request_id for part in launched.parts]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[[chosen[request_id].token_id] if request_id in chosen else [] for request_id in ids],
            logprobs=outputs.logprobs_lists(launched.parts, chosen),
            prompt_logprobs_dict=outputs.take_prompt_logprobs(launched.parts, self._vocabulary),
        )

    def _aggregated(self, output: ModelRunnerOutput, launched: _Step) -> ModelRunnerOutput:
        """The output with what the connectors of all ranks said."""
        if not launched.kv_outputs:
            return output
        of_ranks = [copy.copy(output) for _ in launched.kv_outputs]
        for rank, kv_output in zip(of_ranks, launched.kv_outputs, strict=True):
            rank.kv_connector_output = kv_output
        if len(of_ranks) == 1 or self.kv_output_aggregator is None:
            return of_ranks[0]
        aggregated: ModelRunnerOutput = self.kv_output_aggregator.aggregate(of_ranks, output_rank=0)
        return aggregated


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _config_of_rank(config: VllmConfig, rank: int) -> VllmConfig:
    """vLLM's workers note their rank in the configuration, of which each usually has a copy of its own."""
    mine = copy.copy(config)
    mine.parallel_config = copy.copy(config.parallel_config)
    return mine
