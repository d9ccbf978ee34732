"""What other targets and rates would change about a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_disagg.core.slo import SLO
from vllm_disagg.planner.candidates import Candidate, Resources, Shape
from vllm_disagg.planner.cluster import Cluster, EngineOptions, Pool
from vllm_disagg.planner.goodput import SearchSettings
from vllm_disagg.planner.placement import Question
from vllm_disagg.planner.plan import make_plan
from vllm_disagg.planner.sensitivity import SCALES, Line, Sensitivity, crossings, sensitivity
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.lengths import FixedLengths, make_workload

CANDIDATE = Candidate(kind="colocated", decode=Shape(1, 1), num_decode=1)


def lines(*goodputs: tuple[float, ...]) -> Sensitivity:
    scales = tuple(2.0**power for power in range(len(goodputs[0])))
    return Sensitivity(
        scales=scales,
        rates=(1.0,),
        lines=tuple(Line(candidate=CANDIDATE, goodput=goodput, attainment=(1.0,)) for goodput in goodputs),
    )


def test_where_two_lines_cross_the_better_kind_changes() -> None:
    assert crossings(lines((0.0, 1.0, 3.0), (1.0, 2.0, 2.0))) == [pytest.approx(2**1.5)]
    assert crossings(lines((1.0, 2.0), (2.0, 3.0))) == []
    assert crossings(lines((1.0, 2.0))) == []


@pytest.mark.parametrize("goodput", [(float("nan"), 1.0), (0.0, 0.0)])
def test_what_is_not_known_or_not_possible_crosses_nothing(goodput: tuple[float, ...]) -> None:
    assert crossings(lines(goodput, (0.0, 2.0))) == []


@pytest.fixture(scope="module")
def around() -> tuple[Any, Sensitivity]:
    profile = load_profile("tiny")
    question = Question(
        resources=Resources(
            prefill=Pool(profile=profile), decode=Pool(profile=profile), cluster=Cluster(devices_per_node=2),
            options=EngineOptions(), longest_tokens=200,
        ),
        workloads=tuple(
            make_workload(FixedLengths(prompt_tokens=128, output_tokens=8), num_requests=6000, seed=seed)
            for seed in range(2)
        ),
        slo=SLO(ttft_s=0.01, tpot_s=0.005),
        rate=None,
        search=SearchSettings(min_requests=300),
    )  # fmt: skip
    plan = make_plan(question)
    return plan, sensitivity(question, plan.ranking)


def test_at_the_targets_asked_for_it_is_the_plans_own_goodput(around: tuple[Any, Sensitivity]) -> None:
    plan, found = around
    for line in found.lines:
        [score] = [score for score in plan.ranking if score.candidate == line.candidate]
        assert line.goodput[SCALES.index(1.0)] == pytest.approx(score.per_price, rel=0.1)


def test_looser_targets_never_cost_goodput_and_more_requests_never_gain_attainment(
    around: tuple[Any, Sensitivity],
) -> None:
    for line in around[1].lines:
        known = np.array(line.goodput)[~np.isnan(line.goodput)]
        assert (np.diff(known) >= -0.05 * known[1:]).all()
        assert line.attainment[0] >= line.attainment[-1]
    firsts, lasts = zip(*((line.attainment[0], line.attainment[-1]) for line in around[1].lines), strict=True)
    assert min(lasts) < 0.9 <= max(firsts)
