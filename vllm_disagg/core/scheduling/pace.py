"""How much a step may compute: L_m where only prompts are computed, a budget beside streams that must keep pace."""

from __future__ import annotations

from typing import Protocol, TypeVar

from vllm_disagg.core.latency import LatencyModel, StepWork

Model = TypeVar("Model", contravariant=True)


class StepTime(Protocol[Model]):
    """Seconds of a step."""

    def __call__(self, model: Model, tokens: int, area: int, prefills: int, decodes: int, context: int, /) -> float:
        """See `StepWork`."""


class Budget(Protocol[Model]):
    """See `budget_rule`."""

    def __call__(
        self, model: Model, num_decodes: int, context: int, target_s: float, computed: int, floor: int, ceiling: int, /
    ) -> int:
        """See `prompt_tokens_beside`."""


FLOOR_TOKENS = 64
"""Prompt tokens that a step of a decode instance computes in any case, if some wait."""

L_M_SHARE = 0.88
"""Share of a device's most tokens per second that it reaches with L_m tokens; about 500 tokens for OPT-13B on an A100,
where DistServe says 512."""

QUANTUM = 16
"""Budgets are multiples of this many tokens."""


def critical_length(latency: LatencyModel, share: float = L_M_SHARE, *, longest: int) -> int:
    """L_m: the shortest prompt with which a device computes `share` of its most tokens per second (DistServe's section
    3.1: beyond it, batching prompts brings little). Between 16 and `longest`, in steps of 16."""
    lengths = range(QUANTUM, max(longest, QUANTUM) + 1, QUANTUM)
    rates = [length / max(latency.prompt_s(length), 1e-12) for length in lengths]
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
    return _beside(latency, num_decodes, decode_context, target_s, computed, floor, ceiling)


def budget_rule(step_s: StepTime[Model]) -> Budget[Model]:
    """The rule of `prompt_tokens_beside`, over any form of step times.

    Args:
        step_s: seconds of a step: of a model, and the fields of `StepWork` in their order.

    Returns:
        The rule, as a function of the model and, in this order: `num_decodes`, `decode_context`, `target_s`,
        `computed`, `floor`, `ceiling`.
    """

    def tokens_beside(
        model: Model, num_decodes: int, decode_context: int, target_s: float, computed: int, floor: int, ceiling: int
    ) -> int:
        if num_decodes <= 0 or ceiling <= floor:
            return ceiling
        area = ceiling * (ceiling + 2 * computed)
        if step_s(model, ceiling, area, 1, num_decodes, decode_context) <= target_s:
            return ceiling
        low, high = 0, ceiling // QUANTUM  # `low` fits or is 0, what is above `high` does not
        while low < high:
            middle = (low + high + 1) // 2
            tokens = middle * QUANTUM
            area = tokens * (tokens + 2 * computed)
            if step_s(model, tokens, area, 1, num_decodes, decode_context) <= target_s:
                low = middle
            else:
                high = middle - 1
        return max(floor, low * QUANTUM)

    return tokens_beside


def _step_s(
    latency: LatencyModel, tokens: int, area: int, num_prefills: int, num_decodes: int, decode_context: int
) -> float:
    return latency.step_s(
        StepWork(
            prefill_tokens=tokens,
            prefill_area=area,
            num_prefills=num_prefills,
            num_decodes=num_decodes,
            decode_context=decode_context,
        )
    )


_beside = budget_rule(_step_s)
