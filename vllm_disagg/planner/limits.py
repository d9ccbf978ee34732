"""What keeps a placement from more goodput, told from a run slightly beyond it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vllm_disagg.core.slo import SLO
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.workload import Floats

Limit = Literal[
    "prefill queue", "prefill time", "KV transfer", "decode queue", "decode steps", "KV memory", "too long", "nothing"
]
"""Where the requests that missed a target lost their time. `prefill time`: the prompt alone takes too long. `decode
queue`: KV waited for room on the decode instance. `decode steps`: TPOT, by the steps themselves. `KV memory`: TPOT, by
requests that lost their blocks and were computed again. `too long`: no instance can hold them."""

_OF_PHASE: dict[str, Limit] = {
    "prefill_queue": "prefill queue",
    "prefill_run": "prefill time",
    "kv_transfer": "KV transfer",
    "decode_queue": "decode queue",
    "first_decode_step": "decode steps",
}

_EARLY = ("kv_transfer", "decode_queue")
"""Phases that count in TPOT where prefill sends the first token."""


def limit_of(outcome: Outcome, slo: SLO, *, skip: float = 0.1) -> tuple[Limit, float]:
    """The phase that cost the most of those requests that missed a target, and the share of the misses it stands for.

    Args:
        outcome: a run at a rate above the goodput.
        slo: the targets.
        skip: share of the requests to leave out at either end.
    """
    window = outcome.window(skip)
    missed = ~outcome.met(slo)[window]
    if not missed.any():
        return "nothing", 0.0
    refused = outcome.refused[window]
    late = ~(outcome.ttft_s[window] <= slo.ttft_s) & ~refused
    slow = missed & ~late & ~refused
    counts: dict[Limit, int] = {"too long": int(refused.sum())}
    phases = {name: np.nan_to_num(values[window]) for name, values in outcome.phases().items()}
    if late.any():
        before = {name: values[late] for name, values in phases.items()}
        _add(counts, before)
    if slow.any():
        again = outcome.num_preemptions[window][slow] > 0
        counts["KV memory"] = counts.get("KV memory", 0) + int(again.sum())
        steady = slow.copy()
        steady[np.flatnonzero(slow)[again]] = False
        excess = (outcome.tpot_s[window] - slo.tpot_s) * (outcome.output_tokens[window] - 1)
        waited = {name: phases[name][steady] for name in _EARLY}
        first_early = outcome.first_token_s[window][steady] <= outcome.prefill_end_s[window][steady]
        by_waiting = first_early & (sum(waited.values()) >= excess[steady])
        _add(counts, {name: values[by_waiting] for name, values in waited.items()})
        counts["decode steps"] = counts.get("decode steps", 0) + int((~by_waiting).sum())
    limit = max(counts, key=lambda name: counts[name])
    return limit, counts[limit] / int(missed.sum())


def _add(counts: dict[Limit, int], phases: dict[str, Floats]) -> None:
    """Count each request for its longest phase."""
    names = list(phases)
    longest = np.argmax(np.array([phases[name] for name in names]), axis=0)
    for index, name in enumerate(names):
        limit = _OF_PHASE[name]
        counts[limit] = counts.get(limit, 0) + int((longest == index).sum())
