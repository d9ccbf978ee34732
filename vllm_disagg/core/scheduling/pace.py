"""How much a step may compute: L_m where only prompts are computed, a budget beside streams that must keep pace."""

from __future__ import annotations

from vllm_disagg.core.latency import LatencyModel, StepWork, work_of

L_M_SHARE = 0.88
"""Share of a device's most tokens per second that it reaches with L_m tokens; about 500 tokens for OPT-13B on an A100,
where DistServe says 512."""

QUANTUM = 16
"""Budgets are multiples of this many tokens."""


def critical_length(latency: LatencyModel, share: float = L_M_SHARE, *, longest: int) -> int:
    """L_m: the shortest prompt with which a device computes `share` of its most tokens per second (DistServe's section
    3.1: beyond it, batching prompts brings little). Between 16 and `longest`, in steps of 16."""
    lengths = range(QUANTUM, max(longest, QUANTUM) + 1, QUANTUM)
    rates = [length / max(latency.step_s(work_of([(0, length)])), 1e-12) for length in lengths]
    wanted = share * max(rates)
    return next(length for length, rate in zip(lengths, rates, strict=True) if rate >= wanted)


def prompt_tokens_beside(
    latency: LatencyModel,
    *,
    num_decodes: int,
    decode_context: int,
    target_s: float,
    computed: int = 0,
    floor: int,
    ceiling: int,
) -> int:
    """New prompt tokens that a step may have beside decoding requests without taking longer than `target_s`.

    The idea of Sarathi-Serve's token budget (OSDI 2024, section 4.3), but with the step's own decoding requests and
    their context in place of a budget that was profiled once.

    Args:
        latency: step times of this engine.
        num_decodes: decoding requests of the step.
        decode_context: tokens these read.
        target_s: how long the step may take: the smallest TPOT target among its streams.
        computed: KV tokens that the prompt has already; its attention reads them too.
        floor: what is computed in any case, so that prompts always get on.
        ceiling: what a step can hold.

    Returns:
        A multiple of 16 between `floor` and `ceiling`, or one of these. Without decoding requests, `ceiling`.
    """
    if num_decodes <= 0:
        return ceiling

    def fits(tokens: int) -> bool:
        work = StepWork(
            prefill_tokens=tokens,
            prefill_area=tokens * (tokens + 2 * computed),
            num_prefills=1,
            num_decodes=num_decodes,
            decode_context=decode_context,
        )
        return latency.step_s(work) <= target_s

    if ceiling <= floor or fits(ceiling):
        return ceiling
    low, high = 0, ceiling // QUANTUM  # `low` fits or is 0, what is above `high` does not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * QUANTUM) else (low, middle - 1)
    return max(floor, low * QUANTUM)
