"""Goodput: the highest rate at which enough requests meet both latency targets; and the tightest targets at a rate.

A probe is a simulation at one rate. All probes of one seed serve the same requests with the same pattern of arrivals,
only faster or slower (common random numbers), so that attainment falls nearly monotonously with the rate. Each seed
gives a goodput of its own; their spread gives the confidence interval. The rate is realised exactly (`Workload.paced`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.run import Backend, simulate
from vllm_disagg.sim.system import System
from vllm_disagg.sim.workload import Floats, Workload

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95 %, two-sided, by degrees of freedom from 1 on; 2 beyond the table."""

_MAX_DOUBLINGS = 60

_MOST_MISSING = 8
"""A workload with fewer than one in so many of the needed requests finds no limit any more."""

_FIRST_FACTOR, _LAST_FACTOR = 1.25, 4.0
"""Between the first two rates that are tried, and between two of them at most. Each is the square of the last."""

_FEW = 100

_FAR = 0.1
"""Attainment below the goal by so much is no chance of a short run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How goodput is searched.

    Args:
        goal: attainment that counts as enough; DistServe uses 0.9 and 0.99.
        min_requests: of a run, at least.
        spans: a run also lasts at least so many times as long as a request may take within its targets. In a shorter
            one a system could be overloaded all the time without a request missing its targets yet.
        skip: share of the requests left out at the beginning and at the end of a run: neither the filling system nor
            the draining one is what runs all day.
        tolerance: the bisection ends when the bracket is narrower than this share of its lower end. The result is
            interpolated between its ends, as DistServe's evaluation does.
        backend: of the simulator.
    """

    goal: float = 0.9
    min_requests: int = 2000
    spans: float = 10.0
    skip: float = 0.1
    tolerance: float = 0.02
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.goal <= 1:
            raise ConfigError(f"the attainment goal must lie between 0 and 1, not {self.goal!r}")
        if not (0 <= self.skip < 0.5 and 0 < self.tolerance < 1):
            raise ConfigError(
                f"skip must lie in 0..0.5 and tolerance in 0..1, not {self.skip!r} and {self.tolerance!r}"
            )
        if self.min_requests < 1 or not self.spans >= 0:
            raise ConfigError(f"a run needs requests and a length, not {self.min_requests!r} and {self.spans!r} spans")

    def run_of(self, workload: Workload, rate: float, slo: SLO) -> Workload:
        """The part of a workload that is served at a rate; all of it where it has no more."""
        return workload.head(self.needed(workload, rate, slo)).paced(rate)

    def needed(self, workload: Workload, rate: float, slo: SLO) -> int:
        """How many requests a run at a rate should have."""
        return max(self.min_requests, math.ceil(self.spans * rate * span_s(workload, slo)))


def span_s(workload: Workload, slo: SLO) -> float:
    """How long a request of mean length may take within its targets. A target that is infinite does not count."""
    decoding_s = slo.tpot_s * float(workload.output_tokens.mean())
    return sum(part for part in (slo.ttft_s, decoding_s) if math.isfinite(part))


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Requests per second of a whole system.

    Args:
        per_seed: one for each workload that was tried; 0 where even a single request at a time misses its targets.
        num_probes: simulations it took.
    """

    per_seed: tuple[float, ...]
    num_probes: int

    @property
    def mean(self) -> float:
        """Over seeds."""
        return sum(self.per_seed) / len(self.per_seed)

    @property
    def half_width(self) -> float:
        """Of the 95 % confidence interval of the mean (Student's t over seeds); infinite with one seed."""
        return half_width(self.per_seed)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean."""
    if len(values) < 2:
        return math.inf
    degrees = len(values) - 1
    t = _T_95[degrees - 1] if degrees <= len(_T_95) else 2.0
    return float(t * np.std(values, ddof=1) / math.sqrt(len(values)))


def find_goodput(
    system: System,
    workloads: Sequence[Workload],
    slo: SLO,
    settings: SearchSettings | None = None,
    *,
    guess: float | None = None,
    limit: float = math.inf,
) -> Goodput:
    """Search the goodput of a system.

    Args:
        system: the deployment; in its phase `prefill` the TPOT target does not matter, in `decode` TTFT does not.
        workloads: one per seed. Their rates are replaced, and as many of their requests are used as the settings ask
            for; 20,000 are enough for most.
        slo: the targets.
        settings: of the search.
        guess: a rate near which to begin; None for one of the workload's own.
        limit: a rate that cannot be exceeded, for instance from `bounds`: none above it is tried, and it is the answer
            where it meets the goal. Overloaded runs are the long ones, and short ones among them look better than they
            are.

    Raises:
        ConfigError: there is no workload.
    """
    if not workloads:
        raise ConfigError("a goodput search needs at least one workload")
    settings = settings or SearchSettings()
    found, probes, start = [], 0, guess
    for workload in workloads:
        value, num = _of_one(system, workload, slo, settings, min(start or workload.rate, limit), limit)
        found.append(value)
        probes += num
        start = value or start
    return Goodput(per_seed=tuple(found), num_probes=probes)


def attainment_at(
    system: System, workload: Workload, rate: float, slo: SLO, settings: SearchSettings | None = None
) -> float:
    """Attainment at one rate. Where the first `min_requests` fall far short already, the run ends with them: an
    overloaded system only gets worse."""
    settings = settings or SearchSettings()
    run = settings.run_of(workload, rate, slo)
    if len(run) > settings.min_requests:
        first = simulate(system, workload.head(settings.min_requests).paced(rate), backend=settings.backend)
        if (short := first.attainment(slo, skip=settings.skip)) < settings.goal - _FAR:
            return short
    return simulate(system, run, backend=settings.backend).attainment(slo, skip=settings.skip)


def slo_scale(outcome: Outcome, slo: SLO, settings: SearchSettings | None = None) -> float:
    """The smallest factor on both targets with which a run reaches the goal (DistServe's second row of figures).

    No search is needed: what happens does not depend on the targets, so that each request has a smallest factor of its
    own, and the goal's quantile of these is the answer. Infinite if too many requests were refused.
    """
    settings = settings or SearchSettings()
    needed = np.sort(needed_scale(outcome, slo)[outcome.window(settings.skip)])
    return float(needed[math.ceil(settings.goal * len(needed)) - 1])


def needed_scale(outcome: Outcome, slo: SLO) -> Floats:
    """For each request the smallest factor on both targets with which it meets them."""
    of_tpot = np.nan_to_num(outcome.tpot_s / slo.tpot_s, nan=0.0, posinf=np.inf)
    scale: Floats = np.maximum(outcome.ttft_s / slo.ttft_s, of_tpot)
    return scale


def _of_one(
    system: System, workload: Workload, slo: SLO, settings: SearchSettings, start: float, limit: float
) -> tuple[float, int]:
    """Bracket by steps that grow, since the start is often near, then bisect on the logarithm, then interpolate."""
    seen: dict[float, float] = {}

    def enough(rate: float) -> bool:
        seen[rate] = attainment_at(system, workload, rate, slo, settings)
        return seen[rate] >= settings.goal

    low = high = start
    factor = _FIRST_FACTOR
    if enough(start):
        while low < limit and enough(high := min(high * factor, limit)):
            low, factor = high, min(factor**2, _LAST_FACTOR)
            if settings.needed(workload, high, slo) > _MOST_MISSING * len(workload) or len(seen) > _MAX_DOUBLINGS:
                raise ConfigError(
                    f"{len(workload)} requests are too few to find the goodput: they meet their targets even at "
                    f"{high:.3g}/s, where they last only {len(workload) / high:.2g} s"
                )
        if low >= limit:
            return limit, len(seen)
    else:
        floor = _one_at_a_time(workload, slo)
        if seen[start] < settings.goal - _FAR and _hopeless(system, workload, floor, slo, settings):
            return 0.0, len(seen)
        while low > floor and not enough(low := max(low / factor, floor)):
            high, factor = low, min(factor**2, _LAST_FACTOR)
        if seen[low] < settings.goal:
            return 0.0, len(seen)
    while high - low > settings.tolerance * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return _crossing(low, seen[low], high, seen[high], settings.goal), len(seen)


def _hopeless(system: System, workload: Workload, rate: float, slo: SLO, settings: SearchSettings) -> bool:
    """Whether a few requests that do not see each other show that the targets cannot be met at any rate."""
    alone = simulate(system, workload.head(_FEW).paced(rate), backend=settings.backend)
    return alone.attainment(slo) < settings.goal - _FAR


def _one_at_a_time(workload: Workload, slo: SLO) -> float:
    """A rate at which requests that meet their targets do not see each other."""
    return 0.01 / max(span_s(workload, slo), 1e-9)


def _crossing(low: float, above: float, high: float, below: float, goal: float) -> float:
    """Where the line between the two probes meets the goal."""
    return low + (high - low) * (above - goal) / (above - below) if above > below else low
