"""Fitting step times: known coefficients come back, outliers do not matter, and the error is an honest one."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_disagg.core.latency import LatencyModel, Regime, StepWork, work_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.fit import Fit, FitError, Point, fit_latency, judge, region_of
from vllm_disagg.profiles import load_profile

TRUE = LatencyModel(
    prefill=(Regime(constant_s=0.018, per_token_s=1e-4, per_area_s=7e-9),),
    decode=(Regime(constant_s=0.02, per_decode_s=4e-5, per_context_s=6e-7),),
)
LENGTHS = (16, 64, 128, 256, 512, 1024, 2000)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192)


def grid(model: LatencyModel, *, noise: float = 0.0, outliers: float = 0.0, mixed: bool = False) -> list[Point]:
    works = [work_of([(0, length)] * batch) for batch in (1, 2, 4) for length in LENGTHS]
    works += [work_of([(0, 100), (0, 900)]), work_of([(0, 16), (0, 512), (0, 64)])]
    works += [work_of([(length, 1)] * batch) for batch in BATCHES for length in LENGTHS[1:]]
    if mixed:
        works += [work_of([(0, n), *[(500, 1)] * batch]) for n in LENGTHS for batch in (1, 8, 64)]
    rng = np.random.default_rng(0)
    factors = np.exp(rng.normal(0, noise, len(works)))
    spoiled = rng.random(len(works)) < outliers
    factors[spoiled] *= rng.uniform(1.5, 4.0, int(spoiled.sum()))
    return [Point(work=work, seconds=model.step_s(work) * factor) for work, factor in zip(works, factors, strict=True)]


def off(fit: Fit, model: LatencyModel, works: list[StepWork]) -> float:
    """Median relative error against the truth."""
    return float(np.median([abs(fit.latency.step_s(work) / model.step_s(work) - 1) for work in works]))


def fresh() -> list[StepWork]:
    rng = np.random.default_rng(1)
    prompts = [work_of([(0, int(n)) for n in rng.integers(10, 1500, rng.integers(1, 5))]) for _ in range(40)]
    decodes = [work_of([(int(n), 1) for n in rng.integers(10, 2000, rng.integers(1, 190))]) for _ in range(40)]
    return prompts + decodes


def test_exact_measurements_give_the_coefficients_back() -> None:
    fit = fit_latency(grid(TRUE))

    assert fit.latency.prefill[0].per_token_s == pytest.approx(1e-4, rel=1e-4)
    assert fit.latency.prefill[0].per_area_s == pytest.approx(7e-9, rel=1e-3)
    assert fit.latency.decode[0].per_context_s == pytest.approx(6e-7, rel=1e-4)
    assert fit.latency.mixed == ()
    assert max(error.worst for error in fit.errors.values()) < 1e-3


def test_noise_and_outliers_do_little_harm() -> None:
    fit = fit_latency(grid(TRUE, noise=0.03, outliers=0.04))

    assert off(fit, TRUE, fresh()) < 0.02
    assert all(error.median < 0.05 for error in fit.errors.values())


def test_a_second_regime_is_found_where_there_is_one() -> None:
    knee = LatencyModel(
        prefill=TRUE.prefill,
        decode=(
            Regime(up_to=96, constant_s=0.02, per_decode_s=4e-5, per_context_s=6e-7),
            Regime(constant_s=0.02 - 96 * 1.6e-4, per_decode_s=2e-4, per_context_s=6e-7),
        ),
    )
    fit = fit_latency(grid(knee, noise=0.02))

    assert len(fit.latency.decode) == 2
    assert 64 <= fit.latency.decode[0].up_to <= 128
    assert off(fit, knee, fresh()) < 0.02
    at = fit.latency.decode[0].up_to
    below, above = (fit.latency.step_s(StepWork(num_decodes=int(at) + extra)) for extra in (0, 1))
    assert 0 <= above - below < 0.001  # no jump at the seam


def test_one_regime_is_enough_where_there_is_no_knee() -> None:
    assert len(fit_latency(grid(TRUE, noise=0.03)).latency.decode) == 1


def test_a_published_model_can_be_fitted_from_its_own_steps() -> None:
    model = load_profile("opt-13b-a100-80g").entry(1).latency
    fit = fit_latency(grid(model, noise=0.01))

    assert off(fit, model, fresh()) < 0.05


def test_mixed_steps_get_terms_of_their_own_when_measured() -> None:
    model = LatencyModel(
        prefill=TRUE.prefill,
        decode=TRUE.decode,
        mixed=(Regime(constant_s=0.03, per_token_s=2e-4, per_decode_s=1e-4, per_context_s=1e-6),),
    )
    fit = fit_latency(grid(model, mixed=True))

    assert fit.latency.mixed[0].per_token_s == pytest.approx(2e-4, rel=0.01)
    assert fit.errors["mixed"].median < 0.01


def test_coefficients_are_never_negative() -> None:
    shrinking = [Point(work=work_of([(0, n)] * b), seconds=1.0 / n) for n in LENGTHS for b in (1, 2)]
    fit = fit_latency([*shrinking, *(p for p in grid(TRUE) if region_of(p.work) == "decode")])
    regime = fit.latency.prefill[0]

    assert min(regime.constant_s, regime.per_token_s, regime.per_area_s, regime.per_prefill_s) >= 0
    assert judge(fit)[0] == "refuse"


def test_the_error_is_that_of_points_the_fit_has_not_seen() -> None:
    noisy = fit_latency(grid(TRUE, noise=0.1))

    assert 0.04 < noisy.errors["decode"].median < 0.12
    assert noisy.residuals["decode_median_relative_error"] == noisy.errors["decode"].median


@pytest.mark.parametrize(("median", "verdict"), [(0.03, "good"), (0.08, "warn"), (0.2, "refuse")])
def test_what_a_plan_may_rest_on(median: float, verdict: str) -> None:
    error = FitError(median=median, p90=median, worst=median, num_points=50)

    assert judge(Fit(latency=TRUE, errors={"prefill": error}))[0] == verdict


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_measurements_that_cannot_be(seconds: float) -> None:
    with pytest.raises(ConfigError, match="cannot have taken"):
        fit_latency([*grid(TRUE), Point(work=work_of([(0, 10)]), seconds=seconds)])


def test_too_few_measurements() -> None:
    with pytest.raises(ConfigError, match="3 measured prefill steps are too few"):
        fit_latency(grid(TRUE)[:3])
