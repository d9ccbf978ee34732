"""Step times; see `core/latency.py`."""

from __future__ import annotations

import math

from vllm_disagg.sim.kernel.compiled import inner_in_loops
from vllm_disagg.sim.kernel.state import (
    CONSTANT,
    OF_DECODE,
    OF_MIXED,
    OF_PREFILL,
    PER_AREA,
    PER_CONTEXT,
    PER_DECODE,
    PER_PREFILL,
    PER_TOKEN,
    UP_TO,
    ZERO,
)  # fmt: skip


@inner_in_loops
def regime_of(model, kind, size):
    k = 0
    while size > model[kind, k, UP_TO]:
        k += 1
    return k


@inner_in_loops
def add_up(model, kind, k, tokens, area, prefills, decodes, context):
    return (
        model[kind, k, CONSTANT]
        + model[kind, k, PER_TOKEN] * tokens
        + model[kind, k, PER_AREA] * area
        + model[kind, k, PER_PREFILL] * prefills
        + model[kind, k, PER_DECODE] * decodes
        + model[kind, k, PER_CONTEXT] * context
    )


@inner_in_loops
def step_s(model, tokens, area, prefills, decodes, context):
    if prefills == 0:
        k = regime_of(model, OF_DECODE, decodes)
        return max(0.0, add_up(model, OF_DECODE, k, ZERO, area, prefills, decodes, context))
    if decodes == 0:
        k = regime_of(model, OF_PREFILL, tokens)
        return max(0.0, add_up(model, OF_PREFILL, k, tokens, area, prefills, decodes, context))
    every = tokens + decodes
    if not math.isnan(model[OF_MIXED, 0, UP_TO]):
        k = regime_of(model, OF_MIXED, every)
        return max(0.0, add_up(model, OF_MIXED, k, tokens, area, prefills, decodes, context))
    context_s = model[OF_DECODE, regime_of(model, OF_DECODE, decodes), PER_CONTEXT] * context
    k = regime_of(model, OF_PREFILL, every)
    return max(0.0, add_up(model, OF_PREFILL, k, every, area, prefills, decodes, context) + context_s)
