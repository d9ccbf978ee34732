"""What the connector needs of vLLM's platform and model, and what it refuses, by name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm_disagg.errors import ConfigError
from vllm_disagg.transport.base import CANCEL_BOUND_S

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

logger = logging.getLogger(__name__)

UNSUPPORTED_EXECUTORS = ("ray", "external_launcher")
"""Their workers may run on other hosts than the engine's core, which speaks to them over loopback."""

OVERDUE_GRACE_S = CANCEL_BOUND_S + 3.0
"""Beyond twice the pull timeout, how long a parked request may stay unsettled before the scheduler half fails it."""


def log_with_vllm() -> None:
    """Send our log lines where this process's vLLM sends its own, which configures its own logger only."""
    ours, theirs = logging.getLogger("vllm_disagg"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False


def check_supported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse at start what would be wrong at run time.

    Raises:
        ConfigError: names the flag or the property of the model.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        raise ConfigError("--kv-role does not support --data-parallel-size above 1: start one instance per replica")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError("--kv-role does not support context parallelism: its KV cache is cut along the tokens")
    if parallel.nnodes > 1 or parallel.distributed_executor_backend in UNSUPPORTED_EXECUTORS:
        raise ConfigError("--kv-role needs all workers of an instance on one host, under the mp executor")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec).__name__ not in ("FullAttentionSpec", "MLAAttentionSpec"):
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups})) or "none"
        raise ConfigError(
            f"--kv-role supports models whose layers all keep full attention KV ({FullAttentionSpec.__name__} or "
            f"MLAAttentionSpec in one group); this one has {len(groups)} group(s) of {kinds}"
        )


def steps_are_synchronous() -> bool:
    """Whether every earlier step's writes to the KV cache have ended when a step begins. So on CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def prepare_cpu() -> None:
    """Ask the kernel for AMX before the first forward pass, where the CPU has it.

    vLLM's attention kernel uses AMX with bfloat16 but leaves asking to the libraries that a prompt runs through. The
    first forward pass of a decode instance may be a single token, whose prompt came from elsewhere, and would end the
    worker with an illegal instruction.
    """
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        logger.warning("cpu.no_amx: the kernel refused AMX; bfloat16 may not run here, float32 does")


def worker_rank(vllm_config: VllmConfig) -> tuple[int, int]:
    """This worker's `(pp_rank, tp_rank)`, as vLLM keys handshake metadata. Each worker notes its rank in its own copy
    of the configuration (`WorkerBase.__init__`), tensor-parallel ranks of a stage next to each other."""
    parallel = vllm_config.parallel_config
    pp_rank, tp_rank = divmod(parallel.rank, parallel.tensor_parallel_size)
    return pp_rank, tp_rank


def heads_of_rank(vllm_config: VllmConfig, spec: KVCacheSpec) -> range:
    """Which of the model's KV heads this worker holds.

    vLLM shares them among the tensor-parallel ranks. Where there are more ranks than heads, as with MLA's only one,
    ranks next to each other hold the same. An emulated model may have fewer heads than its configuration says.
    """
    size = vllm_config.parallel_config.tensor_parallel_size
    _, tp_rank = worker_rank(vllm_config)
    model = vllm_config.model_config
    num_shares = min(size, 1 if model.use_mla else model.get_total_num_kv_heads())
    first = tp_rank * num_shares // size * spec.num_kv_heads
    return range(first, first + spec.num_kv_heads)


def instruction_set(vllm_config: VllmConfig) -> str:
    """What packs the inside of a block: on CPU the attention kernel's instruction set, elsewhere the platform."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return str(current_platform.device_type)
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return str(_get_attn_isa(model.dtype, cache.block_size, model.get_head_size(), str(cache.cache_dtype)))
