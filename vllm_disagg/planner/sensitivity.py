"""How a plan would change with other targets or another rate, from the best placement of each kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.candidates import Candidate
from vllm_disagg.planner.goodput import attainment_at, find_goodput
from vllm_disagg.planner.placement import Mapper, Question, Score

SCALES: Final = (0.5, 0.6, 0.75, 0.9, 1.0, 1.25, 1.6, 2.0, 3.0)
"""Factors on both targets."""

_NUM_RATES: Final = 11
_LOWEST, _HIGHEST = 0.3, 1.5
"""Rates, of the higher goodput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One placement.

    Args:
        candidate: the placement.
        goodput: requests per second for a price of 1, for each of `SCALES`; 0 where the targets cannot be met, NaN
            where the workload has too few requests to tell.
        attainment: at each rate, with the targets asked for.
    """

    candidate: Candidate
    goodput: tuple[float, ...]
    attainment: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The best placement of each kind.

    Args:
        scales: factors on both targets.
        rates: requests per second for a price of 1.
        lines: one for each kind that there is.
    """

    scales: tuple[float, ...]
    rates: tuple[float, ...]
    lines: tuple[Line, ...]


def sensitivity(question: Question, ranking: Sequence[Score], mapper: Mapper = map) -> Sensitivity:
    """Look around a plan, with the requests of one seed.

    Args:
        question: that was planned for.
        ranking: what came out, best first.
        mapper: to use several cores.
    """
    firsts = [next((s for s in ranking if s.candidate.kind == kind), None) for kind in ("colocated", "split")]
    best = [score for score in firsts if score is not None]
    most = max(score.per_price for score in best)
    ratio = (_HIGHEST / _LOWEST) ** (1 / (_NUM_RATES - 1))
    rates = tuple(most * _LOWEST * ratio**step for step in range(_NUM_RATES))
    goodputs = list(mapper(_goodput, [(question, score, scale) for score in best for scale in SCALES]))
    shares = list(mapper(_attainment, [(question, score, rate) for score in best for rate in rates]))
    return Sensitivity(
        scales=SCALES,
        rates=rates,
        lines=tuple(
            Line(
                candidate=score.candidate,
                goodput=tuple(goodputs[at * len(SCALES) : (at + 1) * len(SCALES)]),
                attainment=tuple(shares[at * len(rates) : (at + 1) * len(rates)]),
            )
            for at, score in enumerate(best)
        ),
    )


def crossings(found: Sensitivity) -> list[float]:
    """Factors on the targets at which the better kind changes, between two of `scales` by linear interpolation of the
    logarithm."""
    if len(found.lines) < 2:
        return []
    ahead = [one - other for one, other in zip(*(line.goodput for line in found.lines), strict=True)]
    points = []
    for at, (before, after) in enumerate(pairwise(ahead)):
        if before * after < 0:
            low, high = math.log(found.scales[at]), math.log(found.scales[at + 1])
            points.append(math.exp(low + (high - low) * before / (before - after)))
    return points


def _goodput(task: tuple[Question, Score, float]) -> float:
    question, score, scale = task
    system, slo = question.resources.system(score.candidate), question.slo.scaled(scale)
    try:
        found = find_goodput(system, question.workloads[:1], slo, question.search, guess=score.goodput.mean)
    except ConfigError:
        return math.nan
    return found.mean / score.price


def _attainment(task: tuple[Question, Score, float]) -> float:
    question, score, rate = task
    system, workload = question.resources.system(score.candidate), question.workloads[0]
    return attainment_at(system, workload, rate * score.price, question.slo, question.search)
