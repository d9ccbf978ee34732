"""From measured step times to a latency model: DistServe's terms, fitted by relative error, robustly.

Relative error, since absolute least squares serves only the long steps; a soft-l1 loss, since measurements have
outliers; coefficients that are not negative, since a longer step cannot take less time; a second regime of decode steps
only where it clearly fits better. The error is told on points that the fit has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from vllm_disagg.core.latency import LatencyModel, Regime, StepWork
from vllm_disagg.core.profile import Profile
from vllm_disagg.errors import ConfigError

Fl = NDArray[np.float64]

Region = Literal["prefill", "decode", "mixed"]

Judgement = Literal["good", "warn", "refuse", "unknown"]

_MEDIAN: Final = "median_relative_error"

_LOSS_SCALE: Final = 0.05
"""Relative error beyond which a point counts as an outlier: its weight then grows linearly, not by the square."""

_HINGE_GAIN: Final = 0.8
"""A second regime has to bring the cost below this share of one regime's."""

_FOLDS: Final = 5
_MIN_PER_TERM: Final = 2

_TERMS: Final[dict[Region, tuple[str, ...]]] = {
    "prefill": ("constant_s", "per_token_s", "per_area_s", "per_prefill_s"),
    "decode": ("constant_s", "per_decode_s", "per_context_s"),
    "mixed": ("constant_s", "per_token_s", "per_area_s", "per_decode_s", "per_context_s"),
}

WARN_ABOVE: Final = 0.05
REFUSE_ABOVE: Final = 0.15
"""Median relative errors on held-out points above which a plan should warn, and refuse unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured step.

    Args:
        work: what it computed.
        seconds: how long it took.
    """

    work: StepWork
    seconds: float


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
    """A fitted model and how well it does, by kind of step."""

    latency: LatencyModel
    errors: dict[Region, FitError]

    @property
    def residuals(self) -> dict[str, float]:
        """For the profile: flat names to numbers."""
        return {
            f"{region}_{name}_relative_error": getattr(error, name)
            for region, error in self.errors.items()
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
    for region in _TERMS:
        own = [point for point in points if region_of(point.work) == region]
        if not own and region == "mixed":
            regimes[region] = ()
            continue
        needed = _MIN_PER_TERM * len(_TERMS[region])
        if len(own) < needed:
            raise ConfigError(f"{len(own)} measured {region} steps are too few to fit {needed // _MIN_PER_TERM} terms")
        fit = _fit_decode if region == "decode" else _fit_one(region)
        regimes[region] = fit(own)
        errors[region] = _held_out(region, own, fit)
    latency = LatencyModel(prefill=regimes["prefill"], decode=regimes["decode"], mixed=regimes["mixed"])
    return Fit(latency=latency, errors=errors)


def region_of(work: StepWork) -> Region:
    """What kind of step this is."""
    if work.num_prefills and work.num_decodes:
        return "mixed"
    return "prefill" if work.num_prefills else "decode"


def judge(fit: Fit) -> tuple[Judgement, str]:
    """Whether plans may rest on a fit, and the sentence to print."""
    return _judged({region: error.median for region, error in fit.errors.items()}, "")


def judge_profile(profile: Profile) -> tuple[Judgement, str]:
    """The same for a profile, by what its fits have left over (`Fit.residuals`). `unknown` where it does not say: then
    the profile's kind is all there is to go by."""
    worst: dict[int, tuple[Region, float]] = {}
    for tp, entry in profile.entries.items():
        known = {region: entry.residuals.get(f"{region}_{_MEDIAN}") for region in _TERMS}
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


Fitter = Callable[[Sequence[Point]], tuple[Regime, ...]]


def _fit_one(region: Region) -> Fitter:
    def fit(points: Sequence[Point]) -> tuple[Regime, ...]:
        coefficients, _ = _solve(_columns(region, points), _seconds(points))
        return (Regime(**dict(zip(_TERMS[region], coefficients, strict=True))),)

    return fit


def _fit_decode(points: Sequence[Point]) -> tuple[Regime, ...]:
    """One regime, or two that meet: the hinge max(0, batch - knee) adds to the time per request beyond the knee, so
    that there is no jump between them. The knee is the batch size with the least cost."""
    columns, seconds = _columns("decode", points), _seconds(points)
    names = _TERMS["decode"]
    single, cost = _solve(columns, seconds)
    batches = np.array([point.work.num_decodes for point in points], dtype=np.float64)
    sizes = np.unique(batches)
    best: tuple[float, Fl, float] | None = None
    for knee in sizes[2:-2]:
        hinged, hinged_cost = _solve(np.column_stack([columns, np.maximum(0.0, batches - knee)]), seconds)
        if best is None or hinged_cost < best[0]:
            best = hinged_cost, hinged, float(knee)
    if best is None or best[0] > _HINGE_GAIN * cost or best[1][-1] <= 0:
        return (Regime(**dict(zip(names, single, strict=True))),)
    constant, per_decode, per_context, extra = best[1].tolist()
    knee = best[2]
    return (
        Regime(up_to=knee, constant_s=constant, per_decode_s=per_decode, per_context_s=per_context),
        Regime(constant_s=constant - extra * knee, per_decode_s=per_decode + extra, per_context_s=per_context),
    )


def _solve(columns: Fl, seconds: Fl) -> tuple[Fl, float]:
    """Coefficients that are not negative, and their cost. Rows are divided by the measured time, so that the target is
    1 and residuals are relative errors; columns by their size, so that all coefficients are of one magnitude."""
    rows = columns / seconds[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    scaled = rows / scale
    start, _ = nnls(scaled, np.ones(len(seconds)))
    found = least_squares(
        lambda x: scaled @ x - 1.0,
        start,
        jac=lambda x: scaled,
        bounds=(0.0, np.inf),
        loss="soft_l1",
        f_scale=_LOSS_SCALE,
        x_scale="jac",
    )
    return np.asarray(found.x / scale, dtype=np.float64), float(found.cost)


def _columns(region: Region, points: Sequence[Point]) -> Fl:
    of_term: dict[str, Callable[[StepWork], float]] = {
        "constant_s": lambda work: 1.0,
        "per_token_s": lambda work: work.prefill_tokens,
        "per_area_s": lambda work: work.prefill_area,
        "per_prefill_s": lambda work: work.num_prefills,
        "per_decode_s": lambda work: work.num_decodes,
        "per_context_s": lambda work: work.decode_context,
    }
    return np.array([[of_term[term](point.work) for term in _TERMS[region]] for point in points], dtype=np.float64)


def _seconds(points: Sequence[Point]) -> Fl:
    return np.array([point.seconds for point in points], dtype=np.float64)


def _held_out(region: Region, points: Sequence[Point], fit: Fitter) -> FitError:
    """Fit on four fifths, predict the fifth, five times. Folds are dealt out in turn, so that each covers the grid."""
    errors: list[float] = []
    for fold in range(_FOLDS):
        kept = [point for index, point in enumerate(points) if index % _FOLDS != fold]
        left = points[fold::_FOLDS]
        regimes = fit(kept)
        # A mixed model is read by `LatencyModel.mixed`; the other kinds stand for themselves.
        model = LatencyModel(
            prefill=regimes, decode=regimes if region == "decode" else _ANY, mixed=regimes if region == "mixed" else ()
        )
        errors.extend(abs(model.step_s(point.work) / point.seconds - 1.0) for point in left)
    return FitError(
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
        worst=float(np.max(errors)),
        num_points=len(points),
    )


_ANY: Final = (Regime(),)
