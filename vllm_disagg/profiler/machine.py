"""A machine that becomes slower and faster while an engine on it is measured.

A neighbour, heat or a clock that changes for some seconds looks like a cost of whatever was measured in them. What can
be told apart is what was measured more than once: steps that computed the same took as long but for the machine. So the
pace around each step is that of other steps at about the same time, against what they took at other times, and it is
divided out. Nothing is asked of the model that is fitted afterwards, and no step is judged by steps like itself: an
error of the model stays, and so does noise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vllm_disagg.core.latency import StepWork, work_of
from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.profiler.points import group_of

Fl = NDArray[np.float64]

AROUND_S: Final = 4.0
"""The pace around a step is that of the steps up to so many seconds before and after."""

LEAST: Final = 8
"""Where these are fewer, the next ones in time are asked as well."""

ROUNDS: Final = 20
"""So often what steps take and the pace are told from each other. Each time a part of what is left is found, the larger
the more kinds of steps were measured at the same time."""

_OUTLIER, _LEAST_LIMIT = 3.0, 0.05
"""So many standard deviations beyond what steps like it take, and at least so much, a step says no more than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How the machine's pace moved while it was measured.

    Args:
        fast, slow: what steps took in its fast and in its slow times, over what they took on average: the tenth and the
            ninetieth percentile.
    """

    fast: float = 1.0
    slow: float = 1.0

    @property
    def is_none(self) -> bool:
        """Whether none was found."""
        return self.fast == self.slow == 1.0


def at_mean_pace(
    steps: Mapping[str, Sequence[Sequence[RecordedStep]]],
) -> tuple[dict[str, list[list[RecordedStep]]], Drift]:
    """What a profiler's steps would have taken at the pace that the machine had on average.

    Args:
        steps: of each cell by its name, for each time that it was measured.
    """
    places = list(_computing(steps))
    if not places:
        return {cell: [list(run) for run in runs] for cell, runs in steps.items()}, Drift()
    names = list(dict.fromkeys(place.kind for place in places))
    number_of = {name: number for number, name in enumerate(names)}
    runs_of: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for place in places:
        runs_of[place.kind].add((place.cell, place.turn))
    pace = _told_apart(
        [place.step for place in places],
        np.array([number_of[place.kind] for place in places]),
        np.array([len(runs_of[place.kind]) > 1 for place in places]),
    )
    found = {cell: [list(run) for run in runs] for cell, runs in steps.items()}
    if not pace.any():
        return found, Drift()
    for place, slower in zip(places, pace.tolist(), strict=True):
        steady = replace(place.step, step_s=place.step.step_s / math.exp(slower))
        found[place.cell][place.turn][place.number] = steady
    fast, slow = np.exp(np.percentile(pace, (10, 90)))
    return found, Drift(fast=float(fast), slow=float(slow))


def paces(at_s: Fl, off: Fl, kinds: NDArray[Any], tells: NDArray[np.bool_]) -> Fl:
    """How much slower the machine was around each step than on average, as logarithms.

    What the steps around each one say counts as far as it says what others took: as noise says nothing of other steps,
    none of it is taken for a pace.

    Args:
        at_s: when each step began.
        off: logarithm of what it took, over what it takes on average.
        kinds: the pace around a step is not told by steps of its own kind.
        tells: whether it says anything of the pace.
    """
    around = _around(at_s, off, kinds, tells)
    told, shown = around[tells], off[tells]
    if not told.any():
        return np.zeros(len(off))
    limit = max(_LEAST_LIMIT, _OUTLIER * 1.4826 * float(np.median(np.abs(shown))))
    part = float(np.clip(shown, -limit, limit) @ told) / float(told @ told)
    scaled: Fl = min(1.0, max(0.0, part)) * around
    return scaled


@dataclass(frozen=True, slots=True)
class _Place:
    """A step, where it is, and what it computed."""

    cell: str
    turn: int
    number: int
    kind: str
    step: RecordedStep


def _computing(steps: Mapping[str, Sequence[Sequence[RecordedStep]]]) -> Iterator[_Place]:
    for cell, runs in steps.items():
        for turn, run in enumerate(runs):
            for number, step in enumerate(run):
                if step.step_s > 0 and (work := work_of(step.requests)) != StepWork():
                    yield _Place(cell, turn, number, group_of(cell, step, work), step)


def _told_apart(steps: Sequence[RecordedStep], kinds: NDArray[Any], again: NDArray[np.bool_]) -> Fl:
    """The pace around each step, with the mean of all at 0. What a kind of step takes is the median of its steps, each
    at the pace that is known by then."""
    at_s, step_s = np.array([step.at_s for step in steps]), np.array([step.step_s for step in steps])
    taken = np.log(step_s)
    order = np.argsort(kinds, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1)
    usual: Fl = np.zeros_like(taken)
    pace: Fl = np.zeros_like(taken)
    for _ in range(ROUNDS):
        for which in members:
            usual[which] = np.median(taken[which] - pace[which])
        pace = paces(at_s, taken - usual, kinds, again)
        if pace.any():
            pace -= np.average(pace, weights=step_s)
    return pace


def _around(at_s: Fl, off: Fl, kinds: NDArray[Any], tells: NDArray[np.bool_]) -> Fl:
    order = np.flatnonzero(tells)[np.argsort(at_s[tells], kind="stable")]
    times, what, whose = at_s[order], off[order], kinds[order]
    firsts, lasts = np.searchsorted(times, at_s - AROUND_S), np.searchsorted(times, at_s + AROUND_S, side="right")
    found = np.zeros(len(at_s))
    for index, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
        others = whose[first:last] != kinds[index]
        while np.count_nonzero(others) < LEAST and (first > 0 or last < len(times)):
            before_s = at_s[index] - times[first - 1] if first > 0 else math.inf
            after_s = times[last] - at_s[index] if last < len(times) else math.inf
            first, last = (first - 1, last) if before_s <= after_s else (first, last + 1)
            others = whose[first:last] != kinds[index]
        if others.any():
            found[index] = np.median(what[first:last][others])
    return found
