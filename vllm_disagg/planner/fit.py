"""From measured step times to a latency model: DistServe's terms, fitted by relative error, robustly.

Relative error, since absolute least squares serves only the long steps; a soft-l1 loss, since measurements have
outliers; no coefficient by which a larger step would take less time; more than one regime only where that clearly fits
better. The error is told on points that the fit has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from vllm_disagg.core.latency import LatencyModel, Regime, StepWork
from vllm_disagg.core.profile import Profile
from vllm_disagg.errors import ConfigError

Fl = NDArray[np.float64]

Region = Literal["prefill", "decode", "mixed"]
REGIONS: Final[tuple[Region, ...]] = ("prefill", "decode", "mixed")

Judgement = Literal["good", "warn", "refuse", "unknown"]

_MEDIAN: Final = "median_relative_error"

_LOSS_SCALE: Final = 0.05
"""Relative error beyond which a point counts as an outlier: its weight then grows linearly, not by the square."""

_REGIME_GAIN: Final = 0.8
"""One regime more has to bring the cost below this share of what it was."""

_MOST_REGIMES: Final = 4
_FOLDS: Final = 5
_MIN_PER_TERM: Final = 2
_MIN_PER_REGIME: Final = 4
"""Different sizes that a regime has to span."""

_MOST_SEAMS: Final = 24
"""Seams that are tried for one regime more, spread over the measured sizes."""

_MIXED_LENGTHS: Final = 1.05
"""A batch of prompts is of mixed lengths when its attention area is so many times that of equal ones."""

_Value = Callable[[StepWork], float]

_SIZE: Final[dict[Region, tuple[str, _Value]]] = {
    "prefill": ("per_token_s", lambda work: work.prefill_tokens),
    "decode": ("per_decode_s", lambda work: work.num_decodes),
    "mixed": ("per_token_s", lambda work: work.prefill_tokens + work.num_decodes),
}
"""What a region's regimes are divided by, and the coefficient of it that each regime has for itself."""

_SHARED: Final[dict[Region, dict[str, _Value]]] = {
    "prefill": {"per_area_s": lambda work: work.prefill_area, "per_prefill_s": lambda work: work.num_prefills},
    "decode": {"per_context_s": lambda work: work.decode_context},
    "mixed": {
        "per_area_s": lambda work: work.prefill_area,
        "per_prefill_s": lambda work: work.num_prefills,
        "per_decode_s": lambda work: work.num_decodes,
        "per_context_s": lambda work: work.decode_context,
    },
}
"""Coefficients that all regimes of a region share. In mixed steps that of decoding requests is what they cost beyond
their one token."""

WARN_ABOVE: Final = 0.05
REFUSE_ABOVE: Final = 0.15
"""Median relative errors on held-out points above which a plan should warn, and refuse unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured step.

    Args:
        work: what it computed.
        seconds: how long it took.
        group: points of the same group are left out of the fit together; empty for a group of its own.
    """

    work: StepWork
    seconds: float
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """Relative errors on points that were left out of the fit (5-fold cross-validation).

    Args:
        median, p90, worst: of the absolute relative error.
        num_points: how many there were.
    """

    median: float
    p90: float
    worst: float
    num_points: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A fitted model and how well it does, by kind of step.

    Args:
        latency: the model, fitted to all points.
        errors: by kind of step.
        mixed_lengths: of those prefill steps whose prompts had different lengths; None where there were none.
    """

    latency: LatencyModel
    errors: dict[Region, FitError]
    mixed_lengths: FitError | None = field(default=None)

    @property
    def residuals(self) -> dict[str, float]:
        """For the profile: flat names to numbers."""
        named = {str(region): error for region, error in self.errors.items()}
        if self.mixed_lengths is not None:
            named["prefill_mixed_lengths"] = self.mixed_lengths
        return {
            f"{region}_{name}_relative_error": getattr(error, name)
            for region, error in named.items()
            for name in ("median", "p90", "worst")
        }


def fit_latency(points: Sequence[Point]) -> Fit:
    """Fit a latency model.

    Args:
        points: measured steps of prompts only and of decoding only; steps with both are optional. Without them a mixed
            step follows from the other two (`LatencyModel.mixed`).

    Raises:
        ConfigError: a measurement is not a positive number, or there are too few of a kind.
    """
    for point in points:
        if not (math.isfinite(point.seconds) and point.seconds > 0):
            raise ConfigError(f"a step of {point.work} cannot have taken {point.seconds!r} s")
    regimes: dict[Region, tuple[Regime, ...]] = {}
    errors: dict[Region, FitError] = {}
    mixed_lengths: FitError | None = None
    for region in REGIONS:
        own = [point for point in points if region_of(point.work) == region]
        if not own and region == "mixed":
            regimes[region] = ()
            continue
        num_terms = 2 + len(_SHARED[region])
        if len(own) < _MIN_PER_TERM * num_terms:
            raise ConfigError(f"{len(own)} measured {region} steps are too few to fit {num_terms} terms")
        regimes[region] = _fit_region(region, own)
        off = _held_out(region, own)
        errors[region] = _error(off)
        ragged = [error for error, point in zip(off, own, strict=True) if has_mixed_lengths(point.work)]
        if region == "prefill" and ragged:
            mixed_lengths = _error(ragged)
    latency = LatencyModel(prefill=regimes["prefill"], decode=regimes["decode"], mixed=regimes["mixed"])
    return Fit(latency=latency, errors=errors, mixed_lengths=mixed_lengths)


def region_of(work: StepWork) -> Region:
    """What kind of step this is."""
    if work.num_prefills and work.num_decodes:
        return "mixed"
    return "prefill" if work.num_prefills else "decode"


def has_mixed_lengths(work: StepWork) -> bool:
    """Whether a step's prompts, all computed from their beginning, differ in length."""
    equal = work.prefill_tokens**2 / max(work.num_prefills, 1)
    return work.num_prefills > 1 and work.prefill_area > _MIXED_LENGTHS * equal


def judge(fit: Fit) -> tuple[Judgement, str]:
    """Whether plans may rest on a fit, and the sentence to print."""
    return _judged({region: error.median for region, error in fit.errors.items()}, "")


def judge_profile(profile: Profile) -> tuple[Judgement, str]:
    """The same for a profile, by what its fits have left over (`Fit.residuals`). `unknown` where it does not say: then
    the profile's kind is all there is to go by."""
    worst: dict[int, tuple[Region, float]] = {}
    for tp, entry in profile.entries.items():
        known = {region: entry.residuals.get(f"{region}_{_MEDIAN}") for region in REGIONS}
        medians = {region: value for region, value in known.items() if value is not None}
        if medians:
            worst[tp] = max(medians.items(), key=lambda item: item[1])
    if not worst:
        return "unknown", f"the profile of {profile.model.name} does not say how well its step times were fitted"
    tp, (region, median) = max(worst.items(), key=lambda item: item[1][1])
    return _judged({region: median}, f" of {profile.model.name} on TP{tp}")


def _judged(medians: Mapping[Region, float], whose: str) -> tuple[Judgement, str]:
    region, median = max(medians.items(), key=lambda item: item[1])
    text = f"the fitted {region} steps{whose} are off by {median:.1%} at the median on held-out points"
    if not median <= REFUSE_ABOVE:
        return "refuse", f"{text}, more than {REFUSE_ABOVE:.0%}: measure again on an idle machine"
    return ("warn" if median > WARN_ABOVE else "good"), text


@dataclass(frozen=True, slots=True)
class _Shape:
    """Times of a region as a sum of terms that no size makes smaller: a constant, a slope for each regime, a step up at
    each seam, and what the regimes share. All coefficients are 0 or more, so that a larger step never takes less.

    `seams` are the sizes up to which all regimes but the last hold.
    """

    region: Region
    seams: tuple[float, ...] = ()

    def columns(self, points: Sequence[Point]) -> Fl:
        sizes = np.array([_SIZE[self.region][1](point.work) for point in points], dtype=np.float64)
        edges = (0.0, *self.seams, math.inf)
        slopes = [np.clip(sizes - low, 0.0, high - low) for low, high in pairwise(edges)]
        jumps = [(sizes > seam).astype(np.float64) for seam in self.seams]
        shared = [
            np.array([value(point.work) for point in points], dtype=np.float64)
            for value in _SHARED[self.region].values()
        ]
        return np.column_stack([np.ones(len(points)), *slopes, *jumps, *shared])

    def regimes(self, coefficients: Fl) -> tuple[Regime, ...]:
        number = len(self.seams) + 1
        constant, *rest = coefficients.tolist()
        slopes, jumps, shared = rest[:number], rest[number : 2 * number - 1], rest[2 * number - 1 :]
        named = dict(zip(_SHARED[self.region], shared, strict=True))
        extra = named.pop("per_decode_s", 0.0)
        found, level, low = [], constant, 0.0
        for index, slope in enumerate(slopes):
            high = self.seams[index] if index < number - 1 else math.inf
            own = {_SIZE[self.region][0]: slope}
            if self.region == "mixed":
                own["per_decode_s"] = slope + extra
            found.append(Regime(up_to=high, constant_s=level - slope * low, **own, **named))
            if index < number - 1:
                level, low = level + slope * (high - low) + jumps[index], high
        return tuple(found)


def _fit_region(region: Region, points: Sequence[Point]) -> tuple[Regime, ...]:
    """One regime more as long as that makes the cost clearly smaller."""
    seconds = _seconds(points)
    shape = _Shape(region)
    coefficients, cost = _solve(shape.columns(points), seconds)
    while len(shape.seams) + 1 < _MOST_REGIMES:
        candidates = _divided(shape, points)
        if not candidates:
            break
        weights = _weights(shape.columns(points) @ coefficients / seconds - 1.0)
        best = min(candidates, key=lambda candidate: _quick_cost(candidate.columns(points), seconds, weights))
        found, less = _solve(best.columns(points), seconds)
        if less > _REGIME_GAIN * cost:
            break
        shape, coefficients, cost = best, found, less
    return shape.regimes(coefficients)


def _divided(shape: _Shape, points: Sequence[Point]) -> list[_Shape]:
    """The same with one seam more, wherever enough sizes remain on either side."""
    sizes = np.unique([_SIZE[shape.region][1](point.work) for point in points])
    places = np.unique(np.linspace(0, len(sizes) - 1, _MOST_SEAMS + 2).astype(int))[1:-1]
    found = []
    for seam in sizes[places].tolist():
        seams = tuple(sorted({*shape.seams, seam}))
        edges = (-math.inf, *seams, math.inf)
        inside = [int(((low < sizes) & (sizes <= high)).sum()) for low, high in pairwise(edges)]
        if len(seams) > len(shape.seams) and min(inside) >= _MIN_PER_REGIME:
            found.append(_Shape(shape.region, seams))
    return found


def _solve(columns: Fl, seconds: Fl) -> tuple[Fl, float]:
    """Coefficients that are not negative, and their cost. Rows are divided by the time, so that residuals are relative
    errors: by the measured one at first and then by the modelled one, since measured ones would favour the steps that
    happened to be fast. Columns are divided by their size, so that all coefficients are of one magnitude."""
    found, cost, divisor = np.zeros(columns.shape[1]), 0.0, seconds
    for _ in range(2):
        scaled, scale = _scaled(columns, divisor)
        target = seconds / divisor
        start, _ = nnls(scaled, target)
        result = least_squares(
            _residuals_of,
            start,
            jac=_jacobian_of,
            args=(scaled, target),
            bounds=(0.0, np.inf),
            loss="soft_l1",
            f_scale=_LOSS_SCALE,
            x_scale="jac",
        )
        found, cost = np.asarray(result.x / scale, dtype=np.float64), float(result.cost)
        divisor = np.maximum(columns @ found, 0.1 * seconds)
    return found, cost


def _residuals_of(x: Fl, scaled: Fl, target: Fl) -> Fl:
    return np.asarray(scaled @ x - target, dtype=np.float64)


def _jacobian_of(x: Fl, scaled: Fl, target: Fl) -> Fl:
    return scaled


def _quick_cost(columns: Fl, seconds: Fl, weights: Fl) -> float:
    """The weighted square error of the best coefficients: enough to compare seams by."""
    scaled, _ = _scaled(columns, seconds)
    _, norm = nnls(scaled * weights[:, None], weights)
    return float(norm)


def _weights(residuals: Fl) -> Fl:
    """What makes least squares of residuals like these behave as the soft-l1 loss does."""
    return np.asarray((1.0 + (residuals / _LOSS_SCALE) ** 2) ** -0.25, dtype=np.float64)


def _scaled(columns: Fl, seconds: Fl) -> tuple[Fl, Fl]:
    rows = columns / seconds[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    return rows / scale, scale


def _seconds(points: Sequence[Point]) -> Fl:
    return np.array([point.seconds for point in points], dtype=np.float64)


def _held_out(region: Region, points: Sequence[Point]) -> list[float]:
    """Fit on four fifths, predict the fifth, five times; the error of each point. Groups are dealt out in turn, so that
    each fold covers the grid."""
    groups = {name: index for index, name in enumerate(dict.fromkeys(map(_group_of, enumerate(points))))}
    folds = [groups[_group_of(item)] % _FOLDS for item in enumerate(points)]
    errors = [0.0] * len(points)
    for fold in range(_FOLDS):
        kept = [point for point, own in zip(points, folds, strict=True) if own != fold]
        left = [index for index, own in enumerate(folds) if own == fold]
        if not kept or not left:
            continue
        regimes = _fit_region(region, kept)
        # A mixed model is read by `LatencyModel.mixed`; the other kinds stand for themselves.
        model = LatencyModel(
            prefill=regimes, decode=regimes if region == "decode" else _ANY, mixed=regimes if region == "mixed" else ()
        )
        for index in left:
            errors[index] = abs(model.step_s(points[index].work) / points[index].seconds - 1.0)
    return errors


def _group_of(item: tuple[int, Point]) -> str:
    index, point = item
    return point.group or f"#{index}"


def _error(errors: Sequence[float]) -> FitError:
    return FitError(
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
        worst=float(np.max(errors)),
        num_points=len(errors),
    )


_ANY: Final = (Regime(),)
