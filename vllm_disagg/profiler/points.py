"""From steps to the points that are fitted: steps that computed the same are one point, at their median."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vllm_disagg.core.latency import StepWork, work_of
from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.planner.fit import Point, Region, region_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one kind of work.

    Args:
        point: the median.
        num_steps: how many steps it is of.
        spread: half the difference between its upper and lower quartile, as a share of the median; 0 of one step.
    """

    point: Point
    num_steps: int
    spread: float


def measured(steps: Mapping[str, Sequence[Sequence[RecordedStep]]]) -> list[Measured]:
    """Points of all cells.

    Args:
        steps: of each cell by its name, for each time that it was measured.
    """
    grouped: dict[str, list[tuple[StepWork, float]]] = defaultdict(list)
    for cell, runs in steps.items():
        for run in runs:
            for step in run:
                if step.step_s > 0 and (work := work_of(step.requests)) != StepWork():
                    grouped[group_of(cell, step, work)].append((work, step.step_s))
    return [_measured(name, samples) for name, samples in grouped.items()]


def group_of(cell: str, step: RecordedStep, work: StepWork) -> str:
    """The same for steps that computed the same. Decoding requests count by their number within a cell, where their
    contexts are nearly the same all along; beside prompts likewise. Prompts count by their lengths."""
    prompts = sorted(request for request in step.requests if request[1] > 1)
    return f"{cell if work.num_decodes else ''}|{work.num_decodes}|{prompts}"


def spreads(points: Iterable[Measured]) -> dict[Region, float]:
    """How much steps that computed the same differ, by kind of step: the median over all points of several steps."""
    found: dict[Region, list[float]] = defaultdict(list)
    for item in points:
        if item.num_steps > 2:
            found[region_of(item.point.work)].append(item.spread)
    return {region: statistics.median(values) for region, values in found.items()}


def _measured(name: str, samples: Sequence[tuple[StepWork, float]]) -> Measured:
    seconds = [step_s for _, step_s in samples]
    middle = statistics.median(seconds)
    context = round(statistics.median(work.decode_context for work, _ in samples))
    point = Point(work=replace(samples[0][0], decode_context=context), seconds=middle, group=name)
    if len(seconds) < 3:
        return Measured(point=point, num_steps=len(seconds), spread=0.0)
    low, _, high = statistics.quantiles(seconds, n=4)
    return Measured(point=point, num_steps=len(seconds), spread=(high - low) / 2 / middle)
