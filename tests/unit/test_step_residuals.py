"""What the benchmark of the emulation's timing makes of recorded steps."""

from __future__ import annotations

import random

import pytest

from vllm_disagg.core.latency import LatencyModel, Regime, work_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.profiler.steps import RecordedStep

pytest.importorskip("scipy")

from benchmarks.step_residuals import fit, fit_through_drift, jitter, residuals

TRUTH = LatencyModel(
    prefill=(Regime(constant_s=0.02, per_token_s=0.002, per_area_s=1e-6),),
    decode=(
        Regime(up_to=1, constant_s=0.05, per_context_s=1e-6),
        Regime(constant_s=0.045, per_decode_s=0.004, per_context_s=1e-6),
    ),
    mixed=(Regime(constant_s=0.05, per_token_s=0.002, per_decode_s=0.004, per_context_s=2e-6),),
)


def steps(*, noise: float = 0.0, outliers: int = 0) -> list[RecordedStep]:
    dice = random.Random(1)
    found = []
    for number in range(600):
        decodes = [(dice.randint(8, 400), 1) for _ in range(dice.choice((1, 2, 3, 4, 6, 9, 13, 18, 25)))]
        prompts = [(0, dice.randint(8, 300)) for _ in range(dice.randint(1, 3))]
        requests = tuple((decodes, prompts, decodes + prompts)[number % 3])
        step_s = TRUTH.step_s(work_of(requests)) * dice.lognormvariate(0, noise)
        step_s *= 8 if number < outliers else 1
        found.append(RecordedStep(at_s=float(number), step_s=step_s, requests=requests))
    return found


def test_the_fit_finds_the_times_of_a_device_that_follows_the_model() -> None:
    model = fit(steps())

    for step in steps():
        assert model.step_s(work_of(step.requests)) == pytest.approx(step.step_s, rel=0.01)


def test_a_few_interrupted_steps_do_not_move_it() -> None:
    model = fit(steps(outliers=12))

    assert residuals(model, steps())["decode"]["sum_ratio"] == pytest.approx(1.0, abs=0.01)


def test_noise_is_found_as_jitter_and_does_not_bias_the_times() -> None:
    noisy = steps(noise=0.1)
    model = fit(noisy)

    assert jitter(model, noisy) == pytest.approx(0.1, rel=0.15)
    assert residuals(model, noisy)["mixed"]["sum_ratio"] == pytest.approx(1.0, abs=0.02)


def test_a_machine_that_becomes_slower_while_contexts_grow_does_not_make_contexts_dear() -> None:
    """Streams that generate together: contexts and time are the same but for a factor."""
    dice, load, at_s = random.Random(1), list[RecordedStep](), 0.0
    for number in range(600):
        requests = [(number // 2 + dice.randint(0, 400), 1) for _ in range(1 + number // 7 % 25)]
        if number % 5 == 0:
            requests = requests * (number % 2) + [(0, dice.randint(8, 300))]
        step_s = TRUTH.step_s(work_of(requests)) * (1 + at_s / 400)
        load.append(RecordedStep(at_s=at_s, step_s=step_s, requests=tuple(requests)))
        at_s += step_s
    plain, through = (model.decode[-1].per_context_s for model in (fit(load), fit_through_drift([load])))

    assert plain > 5e-6
    assert through < 1.5e-6


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        fit(steps()[:20])
