"""How recorded steps differ from a latency model; `vllm_disagg/planner/fit.py` makes one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_disagg.core.latency import LatencyModel, StepWork, work_of
from vllm_disagg.planner.fit import REGIONS, Point, Region, fit_latency, region_of
from vllm_disagg.profiler.machine import paces
from vllm_disagg.profiler.steps import RecordedStep

Sample = tuple[StepWork, float]

ROUNDS = 16
"""So often the machine's pace is taken out of a fit: each time a part of what is left is found."""


def fit(steps: Sequence[RecordedStep]) -> LatencyModel:
    """The latency model of some steps.

    Raises:
        ConfigError: there are too few of a kind.
    """
    works = [(work_of(step.requests), step.step_s) for step in steps]
    return fit_latency([Point(work=work, seconds=step_s) for work, step_s in works if work != StepWork()]).latency


def fit_through_drift(loads: Sequence[Sequence[RecordedStep]]) -> LatencyModel:
    """The latency model of the steps of some loads, each step at the pace that the machine has on average.

    Within a load contexts grow and batches shrink, so that a machine that becomes slower or faster meanwhile looks like
    a cost of contexts. Under a load hardly two steps are the same, so that the model says what each takes; the pace
    that the steps around it had against that is divided out, and the model is fitted again.

    Raises:
        ConfigError: there are too few steps of a kind.
    """
    steps = [step for load in loads for step in load if work_of(step.requests) != StepWork()]
    model = fit(steps)
    for _ in range(ROUNDS):
        model = fit(_at_mean_pace(steps, model))
    return model


def _at_mean_pace(steps: Sequence[RecordedStep], model: LatencyModel) -> list[RecordedStep]:
    at_s, step_s = np.array([step.at_s for step in steps]), np.array([step.step_s for step in steps])
    off = np.log(step_s / np.array([model.step_s(work_of(step.requests)) for step in steps]))
    pace = paces(at_s, off, np.arange(len(steps)), np.ones(len(steps), dtype=bool))
    pace -= np.average(pace, weights=step_s)
    return [replace(step, step_s=step.step_s / math.exp(each)) for step, each in zip(steps, pace, strict=True)]


def seconds_of(steps: Sequence[RecordedStep], latency: LatencyModel) -> tuple[float, float]:
    """What steps took, and what the profile says for them. Those that only look for KV that comes do not count."""
    works = [(step.step_s, work_of(step.requests)) for step in steps]
    real = [(step_s, work) for step_s, work in works if work != StepWork()]
    return sum(step_s for step_s, _ in real), sum(latency.step_s(work) for _, work in real)


def samples_of(steps: Sequence[RecordedStep]) -> dict[Region, list[Sample]]:
    """The steps by what they computed."""
    found: dict[Region, list[Sample]] = {region: [] for region in REGIONS}
    for step in steps:
        work = work_of(step.requests)
        found[region_of(work)].append((work, step.step_s))
    return found


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
