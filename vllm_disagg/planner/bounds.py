"""The most that a placement can do, from its step times alone: what the search need not look at.

Queues, variance and the token budget only lower it. The bounds use mean lengths where the cost is linear in them, and
leave some slack where a share of the requests may miss its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_disagg.core.latency import StepWork, work_of
from vllm_disagg.core.slo import SLO
from vllm_disagg.sim.system import EngineSpec
from vllm_disagg.sim.workload import Ints, Workload

SLACK = 1.25
"""By how much a decode step may be longer than the TPOT target: the slowest tenth of the requests may miss it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the bounds need to know of a workload.

    Args:
        prompts: quantiles of the prompt lengths.
        mean_output: tokens.
        mean_context: of a decoding request, weighted by how long it decodes.
    """

    prompts: tuple[int, ...]
    mean_output: float
    mean_context: float


def load_of(workloads: Sequence[Workload]) -> Load:
    """Summarise workloads."""
    prompt: Ints = np.concatenate([workload.prompt_tokens for workload in workloads])
    output: Ints = np.concatenate([workload.output_tokens for workload in workloads])
    quantiles = np.quantile(prompt, (np.arange(64) + 0.5) / 64)
    return Load(
        prompts=tuple(max(1, int(length)) for length in quantiles),
        mean_output=float(output.mean()),
        mean_context=float(((prompt + output / 2) * output).sum() / output.sum()),
    )


def prefill_bound(engine: EngineSpec, load: Load) -> float:
    """Prompts per second that an instance can compute at most: batches are full, and the pipeline has no bubbles."""
    seconds = 0.0
    limit = engine.batch_tokens if engine.policy == "prefill" else engine.max_num_batched_tokens
    for length in load.prompts:
        together = max(1, limit // length)
        seconds += engine.latency.step_s(work_of([(0, length)] * together)) / together
    mean_s = seconds / len(load.prompts)
    return engine.pp / mean_s if mean_s > 0 else float("inf")


def decode_bound(engine: EngineSpec, load: Load, slo: SLO) -> float:
    """Requests per second that an instance can decode at most: the batch is as large as memory and TPOT allow."""
    most = min(engine.max_num_seqs, int(engine.kv_tokens / load.mean_context) + 1)
    best = 0.0
    for batch in sorted({*range(1, 9), *(int(1.15**power) for power in range(60)), most}):
        size = max(1, batch // engine.pp)
        if batch > most:
            break
        step_s = engine.latency.step_s(StepWork(num_decodes=size, decode_context=int(size * load.mean_context)))
        if step_s > slo.tpot_s * SLACK:
            continue
        best = max(best, size * engine.pp / step_s / load.mean_output if step_s > 0 else float("inf"))
    return best
