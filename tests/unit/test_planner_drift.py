"""Drift: a shift is noticed soon, none where there is none; and replanning says whether it pays."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.sim_cases import fixed
from tests.unit.test_planner_plan import tight_tpot
from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.drift import (
    Drift,
    MoveCost,
    Sensitivity,
    Watch,
    baseline_of,
    observe,
    replan,
    start_watch,
    threshold,
)
from vllm_disagg.planner.plan import make_plan
from vllm_disagg.sim.lengths import SURROGATES, make_workload
from vllm_disagg.sim.workload import Workload


def chat(num: int = 3000, rate: float = 2.0, seed: int = 0) -> Workload:
    return make_workload(SURROGATES["humaneval-like"], num_requests=num, rate=rate, seed=seed)


def watch_all(watch: Watch, workload: Workload, *, scale: float = 1.0) -> tuple[int, Drift] | None:
    """After how many requests what drift was found."""
    for index in range(len(workload)):
        watch, drift = observe(
            watch,
            arrival_s=float(workload.arrival_s[index]),
            prompt_tokens=int(workload.prompt_tokens[index] * scale),
            output_tokens=int(workload.output_tokens[index]),
        )
        if drift is not None:
            return index, drift
    return None


def test_an_unchanged_stream_raises_no_alarm() -> None:
    watch = start_watch(baseline_of(chat()))

    assert [watch_all(watch, chat(seed=seed)) for seed in range(1, 4)] == [None] * 3


def test_longer_prompts_are_noticed_within_a_few_hundred_requests() -> None:
    found = watch_all(start_watch(baseline_of(chat())), chat(seed=1), scale=1.5)

    assert found is not None
    assert found[0] < 300
    assert found[1] == Drift(signal="prompt length", rose=True)


@pytest.mark.parametrize(("rate", "rose"), [(4.0, True), (1.0, False)])
def test_a_changed_rate_is_noticed(rate: float, rose: bool) -> None:
    found = watch_all(start_watch(baseline_of(chat())), chat(rate=rate, seed=1))

    assert found is not None and found[1] == Drift(signal="rate", rose=rose)


def test_rarer_false_alarms_need_more_evidence() -> None:
    assert threshold(0.5, 1e3) < threshold(0.5, 1e5) < threshold(0.5, 1e7)


def test_false_alarms_of_normal_data_come_about_as_often_as_stated() -> None:
    """Two sides of three signals share the rate: one side alone runs six times as long."""
    step, every, rng = 0.8, 50.0, np.random.default_rng(0)
    limit, runs = threshold(step, every), []
    for _ in range(300):
        total, count = 0.0, 0
        while total <= limit:
            total = max(0.0, total + rng.standard_normal() - step / 2)
            count += 1
        runs.append(count)

    assert np.mean(runs) == pytest.approx(6 * every, rel=0.2)


@pytest.mark.parametrize("bad", [{"shift": 0.0}, {"shift": float("nan")}, {"false_alarm_every": 1.0}])
def test_sensitivities_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sensitivity(**bad)


def test_a_baseline_needs_requests() -> None:
    with pytest.raises(ConfigError, match="at least 10"):
        baseline_of(chat(num=5))


# Replanning.


def test_the_same_requests_keep_the_plan() -> None:
    asked = tight_tpot()

    assert replan(make_plan(asked), asked).action == "keep"


def test_longer_answers_move_devices_to_decoding_if_that_pays() -> None:
    old = make_plan(tight_tpot())
    answers = tight_tpot(workloads=tuple(fixed(20, 150, num=2000, seed=seed) for seed in range(4)))
    now = replan(old, answers)

    assert now.action == "move" and now.gain is not None and now.gain.ratio > 1.2
    assert now.reason.startswith("move: ")
    dear = replan(old, answers, MoveCost(reload_s=3600.0, horizon_s=360.0))
    assert dear.action == "keep" and "does not clearly pay" in dear.reason


def test_a_placement_that_cannot_meet_the_targets_any_more_is_left() -> None:
    old = make_plan(tight_tpot(slo=SLO(ttft_s=2.0, tpot_s=0.05)))
    long_prompts = tight_tpot(
        workloads=tuple(fixed(260, 30, num=2000, seed=seed) for seed in range(4)), slo=SLO(ttft_s=0.2, tpot_s=0.05)
    )
    now = replan(old, long_prompts)

    assert now.action == "move" or now.plan.chosen.candidate == old.chosen.candidate
