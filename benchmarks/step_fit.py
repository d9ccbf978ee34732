"""From recorded steps to a latency model: relative least squares with coefficients that are not negative."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from scipy.optimize import nnls

from vllm_disagg.core.latency import LatencyModel, Regime, StepWork, work_of
from vllm_disagg.profiler.steps import RecordedStep

Phase = Literal["prefill", "decode", "mixed"]
Sample = tuple[StepWork, float]

_TERMS: Final[Mapping[Phase, tuple[str, ...]]] = {
    "prefill": ("constant_s", "per_token_s", "per_area_s", "per_prefill_s"),
    "decode": ("constant_s", "per_decode_s", "per_context_s"),
    "mixed": ("constant_s", "per_token_s", "per_area_s", "per_prefill_s", "per_decode_s", "per_context_s"),
}
_VALUES: Final[Mapping[str, Callable[[StepWork], float]]] = {
    "constant_s": lambda work: 1.0,
    "per_token_s": lambda work: work.prefill_tokens,
    "per_area_s": lambda work: work.prefill_area,
    "per_prefill_s": lambda work: work.num_prefills,
    "per_decode_s": lambda work: work.num_decodes,
    "per_context_s": lambda work: work.decode_context,
}
LIMITS: Final[Mapping[Phase, tuple[float, ...]]] = {
    "prefill": (64, math.inf),
    "decode": (1, 4, 16, math.inf),
    "mixed": (128, math.inf),
}
"""Largest size of each regime: decoding requests, or new tokens."""

OUTLIER: Final = 2.0
"""A step that took so many times longer than its neighbours in the fit met another load of the machine."""


def samples_of(steps: Sequence[RecordedStep]) -> dict[Phase, list[Sample]]:
    """The steps by what they computed."""
    found: dict[Phase, list[Sample]] = {"prefill": [], "decode": [], "mixed": []}
    for step in steps:
        work = work_of(step.requests)
        phase: Phase = "decode" if not work.num_prefills else "mixed" if work.num_decodes else "prefill"
        found[phase].append((work, step.step_s))
    return found


def fit(steps: Sequence[RecordedStep]) -> LatencyModel:
    """The latency model of some steps.

    Raises:
        ValueError: a regime has fewer samples than coefficients.
    """
    samples = samples_of(steps)
    return LatencyModel(**{phase: _regimes(phase, samples[phase]) for phase in LIMITS})  # type: ignore[arg-type]


def residuals(model: LatencyModel, steps: Sequence[RecordedStep]) -> dict[str, dict[str, float]]:
    """How steps differ from a model: number, ratio of the sums, and the spread of the logarithm of each ratio, of which
    a tenth at either end is not looked at."""
    found = {}
    for phase, samples in samples_of(steps).items():
        if samples:
            measured = np.array([step_s for _, step_s in samples])
            modelled = np.array([model.step_s(work) for work, _ in samples])
            found[phase] = {
                "num_steps": len(samples),
                "sum_ratio": float(measured.sum() / modelled.sum()),
                "log_spread": _spread(np.log(measured / modelled)),
            }
    return found


def jitter(model: LatencyModel, steps: Sequence[RecordedStep]) -> float:
    """The spread from each step to the next, as `--emulate-jitter` takes it. A machine that is slower for a while does
    not count: jitter is drawn anew for each step."""
    logarithms = np.array([math.log(step.step_s / model.step_s(work_of(step.requests))) for step in steps])
    return _spread(np.diff(logarithms)) / math.sqrt(2)


def _spread(logarithms: np.ndarray[Any, Any]) -> float:
    """The standard deviation of a normal distribution with the same tenth and ninetieth percentile."""
    low, high = np.percentile(logarithms, (10, 90))
    return float((high - low) / (2 * 1.2816))


def _regimes(phase: Phase, samples: Sequence[Sample]) -> tuple[Regime, ...]:
    regimes, above = [], 0.0
    for limit in LIMITS[phase]:
        inside = [sample for sample in samples if above < _size(phase, sample[0]) <= limit]
        regimes.append(Regime(up_to=limit, **_coefficients(phase, inside)))
        above = limit
    return tuple(regimes)


def _size(phase: Phase, work: StepWork) -> int:
    return work.num_decodes if phase == "decode" else work.prefill_tokens + work.num_decodes


def _coefficients(phase: Phase, samples: Sequence[Sample]) -> dict[str, float]:
    terms = _TERMS[phase]
    if len(samples) < 2 * len(terms):
        raise ValueError(f"{len(samples)} {phase} steps are too few for {len(terms)} coefficients: measure more")
    matrix = np.array([[_VALUES[term](work) for term in terms] for work, _ in samples], float)
    measured = np.array([step_s for _, step_s in samples])
    kept = np.full(len(samples), True)
    for _ in range(3):
        found = _relative_least_squares(matrix[kept], measured[kept])
        kept = measured < OUTLIER * (matrix @ found)
    return dict(zip(terms, map(float, found), strict=True))


def _relative_least_squares(matrix: np.ndarray[Any, Any], measured: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Weighted by the modelled times: weights by the measured ones would favour the steps that happened to be fast."""
    scale = np.where(matrix.max(axis=0) > 0, matrix.max(axis=0), 1.0)
    modelled = measured
    for _ in range(20):
        found, _residual = nnls(matrix / scale / modelled[:, None], measured / modelled)
        modelled = np.maximum(matrix / scale @ found, 1e-6)
    result: np.ndarray[Any, Any] = found / scale
    return result
