"""Executors that note each step's work and time, and beside them what the engine is. vLLM chooses one by
`--distributed-executor-backend` and this path:

    VLLM_DISAGG_STEPS=steps.jsonl vllm serve MODEL --no-async-scheduling \
        --distributed-executor-backend vllm_disagg.profiler.recorder.RecordingExecutor
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import __version__ as vllm_version
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_disagg import __version__
from vllm_disagg.core.host import cpu_name, num_bound_cores
from vllm_disagg.core.profile import ModelShape
from vllm_disagg.core.steps import requests_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.up import weights_bytes
from vllm_disagg.profiler.facts import EngineFacts, write_facts
from vllm_disagg.profiler.steps import STEPS_ENV, RecordedStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


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

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Now that the KV cache has a size, all is known of the engine: write it down."""
        super().initialize_from_config(kv_cache_configs)
        log = log_path()
        try:
            write_facts(facts_of(self.vllm_config, kv_cache_configs[0], weight_bytes=self._weight_bytes()), log)
        except Exception:  # whatever vLLM cannot say of an unusual model: its steps are recorded all the same
            logger.warning("recorder.no_facts file=%s", log, exc_info=True)

    def _weight_bytes(self) -> int:
        """Of all ranks together. Where layers have packed their weights into a form of their own, as on CPU, these are
        no parameters any more, and the model's files say how large they are."""
        model = Path(self.vllm_config.model_config.model)
        held: int = sum(self.collective_rpc("apply_model", args=(bytes_of_weights,)))
        return max(held, weights_bytes(model if model.exists() else None))

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


def bytes_of_weights(model: Any) -> int:
    """Memory of a model's parameters; called in each worker."""
    return sum(item.numel() * item.element_size() for item in model.parameters())


def facts_of(config: VllmConfig, kv_cache: KVCacheConfig, *, weight_bytes: int) -> EngineFacts:
    """What an engine is, from vLLM's configuration."""
    model, parallel = config.model_config, config.parallel_config
    tp, block_size = parallel.tensor_parallel_size, config.cache_config.block_size
    device, memory = _device()
    return EngineFacts(
        model=ModelShape(
            name=_served_name(model),
            num_layers=model.get_total_num_hidden_layers(),
            num_heads=model.model_arch_config.total_num_attention_heads,
            num_kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            hidden_size=model.get_hidden_size(),
            weight_bytes=weight_bytes,
            kv_bytes_per_token=_kv_bytes_per_token(kv_cache)
            * (1 if model.use_mla else min(tp, model.get_total_num_kv_heads())),
            max_model_len=model.max_model_len,
        ),
        device=device,
        device_memory_bytes=memory,
        tp=tp,
        kv_capacity_tokens=(kv_cache.num_blocks - 1) * block_size,  # vLLM keeps one block for itself
        block_size=block_size,
        step_tokens=config.scheduler_config.max_num_batched_tokens,
        max_seqs=config.scheduler_config.max_num_seqs,
        dtype=str(model.dtype).removeprefix("torch."),
        versions={"vllm-disagg": __version__, "vllm": vllm_version, "torch": _version("torch")},
        fills_kv=_fills_kv(config),
    )


def log_path() -> Path:
    """Where the steps go.

    Raises:
        ConfigError: nobody has said so.
    """
    path = os.environ.get(STEPS_ENV)
    if not path:
        raise ConfigError(f"{STEPS_ENV} must name the file to which this engine's steps are appended")
    return Path(path)


def _open_log() -> TextIOWrapper:
    return log_path().open("a", buffering=1, encoding="utf-8")


def _served_name(model: Any) -> str:
    """The model's own name; of a folder its last part."""
    name = str(model.model)
    return Path(name).name if Path(name).exists() else name


def _kv_bytes_per_token(kv_cache: KVCacheConfig) -> int:
    """On one rank."""
    groups = kv_cache.kv_cache_groups
    return sum(
        len(group.layer_names) * group.kv_cache_spec.page_size_bytes // group.kv_cache_spec.block_size
        for group in groups
    )


def _device() -> tuple[str, int]:
    """Kind and memory of the device that the workers use."""
    from vllm.platforms import current_platform

    memory = int(current_platform.get_device_total_memory())
    if not current_platform.is_cpu():
        return str(current_platform.get_device_name()), memory
    cores = num_bound_cores(os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")) or len(os.sched_getaffinity(0))
    return f"{cpu_name()}, {cores} core{'s' * (cores != 1)}", memory


def _fills_kv(config: VllmConfig) -> bool:
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == "FillOnDemand"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
