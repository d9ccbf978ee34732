"""How long one engine step takes on a device, from what the step computes.

The model is the one DistServe fits (appendix A of the paper, with the released code's batch term): linear in the new
tokens, in the prompts' attention area, in the context that decoding requests read, and in their number; with regimes
where the data ask for them. The emulated accelerator, the simulator and the planner all read it here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one step computes, summed over its requests. A request with one new token counts as decoding, also one
    that recomputes its prompt's last token: it costs the same.

    Args:
        prefill_tokens: new tokens of the requests with more than one.
        prefill_area: for each of them (computed + new)^2 - computed^2, the attention's share of a causal prompt;
            the squared length where a whole prompt is computed at once.
        num_prefills: how many they are.
        num_decodes: requests with one new token.
        decode_context: tokens these read, their new ones included.
    """

    prefill_tokens: int = 0
    prefill_area: int = 0
    num_prefills: int = 0
    num_decodes: int = 0
    decode_context: int = 0


def work_of(requests: Iterable[tuple[int, int]]) -> StepWork:
    """Sum a step up.

    Args:
        requests: `(computed, new)` of each request in the step: tokens already in the KV cache, tokens to compute.
    """
    tokens = area = prefills = decodes = context = 0
    for computed, new in requests:
        if new > 1:
            tokens += new
            area += new * (new + 2 * computed)
            prefills += 1
        elif new == 1:
            decodes += 1
            context += computed + 1
    return StepWork(
        prefill_tokens=tokens,
        prefill_area=area,
        num_prefills=prefills,
        num_decodes=decodes,
        decode_context=context,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Coefficients, in seconds, that hold up to a size of the step.

    Args:
        up_to: largest size they hold for: decoding requests in a decode regime, new tokens in the others.
        constant_s: per step.
        per_token_s: per new token of a prompt; in a mixed step a decoding request's token counts as well.
        per_area_s: per unit of `StepWork.prefill_area`.
        per_prefill_s: per prompt.
        per_decode_s: per decoding request.
        per_context_s: per token of context that decoding requests read.
    """

    up_to: float = math.inf
    constant_s: float = 0.0
    per_token_s: float = 0.0
    per_area_s: float = 0.0
    per_prefill_s: float = 0.0
    per_decode_s: float = 0.0
    per_context_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Step times of one model with one parallelism on one kind of device, pipeline degree 1.

    Args:
        prefill: regimes of steps that compute only prompts, by rising `up_to`, the last without an end.
        decode: regimes of steps in which each request has one new token, likewise.
        mixed: regimes of steps with both. Empty: a mixed step costs a prefill step with one more token for each
            decoding request, and what these read of their context. The weights are read once for all of them.
    """

    prefill: tuple[Regime, ...]
    decode: tuple[Regime, ...]
    mixed: tuple[Regime, ...] = ()

    def step_s(self, work: StepWork) -> float:
        """Seconds the device computes this step; 0 for an empty one, never negative."""
        if work.num_prefills == 0:
            return max(0.0, self._decode_s(work)) if work.num_decodes else 0.0
        if work.num_decodes == 0:
            return max(0.0, _sum(_at(self.prefill, work.prefill_tokens), work, work.prefill_tokens))
        tokens = work.prefill_tokens + work.num_decodes
        if self.mixed:
            return max(0.0, _sum(_at(self.mixed, tokens), work, work.prefill_tokens))
        context_s = _at(self.decode, work.num_decodes).per_context_s * work.decode_context
        return max(0.0, _sum(_at(self.prefill, tokens), work, tokens) + context_s)

    def prompt_s(self, tokens: int) -> float:
        """`step_s` of a step that computes one whole prompt and nothing else; at hand where many are compared."""
        if tokens <= 1:
            return self.step_s(StepWork(num_decodes=tokens, decode_context=tokens))
        return self.step_s(StepWork(num_prefills=1, prefill_tokens=tokens, prefill_area=tokens * tokens))

    def _decode_s(self, work: StepWork) -> float:
        return _sum(_at(self.decode, work.num_decodes), work, 0)


def _at(regimes: tuple[Regime, ...], size: int) -> Regime:
    for regime in regimes:
        if size <= regime.up_to:
            return regime
    raise AssertionError("the last regime has no end")


def _sum(regime: Regime, work: StepWork, tokens: int) -> float:
    return (
        regime.constant_s
        + regime.per_token_s * tokens
        + regime.per_area_s * work.prefill_area
        + regime.per_prefill_s * work.num_prefills
        + regime.per_decode_s * work.num_decodes
        + regime.per_context_s * work.decode_context
    )
