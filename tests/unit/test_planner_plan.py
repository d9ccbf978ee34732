"""The answer of the planner: the verdict, the document, equations, and what it says where there is no answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.sim_cases import fixed
from tests.unit.test_planner_search import profile, question, resources
from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.link import Link
from vllm_disagg.core.profile import ParallelEntry
from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError, NoFeasiblePlacement
from vllm_disagg.planner.cluster import Cluster, Pool
from vllm_disagg.planner.placement import Question
from vllm_disagg.planner.plan import Gain, explain, make_plan, parse_placement, plan_document


def tight_tpot(**changes: Any) -> Question:
    """Prompts take 20 decode steps; whoever decodes must not wait for one."""
    values: dict[str, Any] = {"slo": SLO(ttft_s=2.0, tpot_s=0.02)}
    return question(**values | changes)


def test_interference_asks_for_a_split() -> None:
    plan = make_plan(tight_tpot())

    assert plan.choice == "split"
    assert plan.verdict.startswith("disaggregate: ")
    assert plan.gain is not None and plan.gain.is_clear and plan.gain.ratio > 1.2
    assert f"{plan.gain.ratio:.2f}x" in plan.verdict
    assert "guessed" in plan.verdict


def test_a_slow_link_keeps_it_colocated() -> None:
    slow = resources(cluster=Cluster(num_nodes=1, devices_per_node=4, intra=Link(bytes_per_s=2e5)))
    plan = make_plan(tight_tpot(resources=slow, slo=SLO(ttft_s=2.0, tpot_s=0.05)))

    assert plan.choice == "colocated"
    assert plan.verdict.startswith("stay colocated: ")
    assert plan.chosen.candidate.prefill is None
    assert next(score.limit for score in plan.ranking if score.candidate.kind == "split") in (
        "KV transfer",
        "decode queue",
    )


def test_both_kinds_are_measured_on_as_many_devices() -> None:
    plan = make_plan(tight_tpot())
    best = {kind: next(s for s in plan.ranking if s.candidate.kind == kind) for kind in ("split", "colocated")}

    assert best["split"].candidate.num_devices == best["colocated"].candidate.num_devices
    assert plan.ranking == tuple(sorted(plan.ranking, key=lambda score: score.rank))


def test_a_gain_is_clear_when_its_interval_leaves_one_side() -> None:
    assert Gain(ratio=1.3, half_width=0.2).is_clear
    assert Gain(ratio=0.7, half_width=0.2).is_clear
    assert not Gain(ratio=1.1, half_width=0.2).is_clear


def test_a_rate_is_served_by_as_many_as_it_needs() -> None:
    large = resources(cluster=Cluster(num_nodes=1, devices_per_node=16))
    plan = make_plan(tight_tpot(resources=large, rate=12.0))

    assert plan.chosen.goodput.mean >= 12.0
    assert plan.chosen.candidate.num_devices <= 16


def test_a_small_rate_needs_no_second_instance() -> None:
    """Per device the split is better here, but a single colocated one is enough."""
    plan = make_plan(tight_tpot(rate=0.05))

    assert plan.gain is not None and plan.gain.ratio > 1.2
    assert plan.choice == "colocated" and plan.chosen.price == 1.0
    assert plan.verdict.startswith("stay colocated: 1 x colocated TP1 PP1") and "costs 3" in plan.verdict


def test_a_rate_that_the_cluster_cannot_serve_says_what_it_can() -> None:
    with pytest.raises(NoFeasiblePlacement, match=r"500 requests/s are more than 4 devices serve.*they serve about \d"):
        make_plan(tight_tpot(rate=500.0))


def test_targets_that_nothing_meets_are_answered_with_the_nearest() -> None:
    with pytest.raises(NoFeasiblePlacement, match=r"TTFT 0.05 s .* nearest that can be met is TTFT 0\.1\d* s"):
        make_plan(question(slo=SLO(ttft_s=0.05, tpot_s=0.05)))


def test_the_document_can_be_stored_and_its_placement_read_back() -> None:
    plan = make_plan(tight_tpot())
    document = json.loads(json.dumps(plan_document(plan), allow_nan=False))

    assert parse_placement(document, origin="plan.json") == plan.chosen.candidate
    assert document["verdict"] == plan.verdict
    assert len(document["ranking"]) == len(plan.ranking)


@pytest.mark.parametrize("bad", [None, [], {}, {"format": "vllm-disagg-plan", "version": 2}])
def test_what_is_no_plan_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"plan\.json: expected a plan"):
        parse_placement(bad, origin="plan.json")


def test_an_incomplete_plan_is_refused() -> None:
    document = plan_document(make_plan(tight_tpot()))
    del document["placement"]["decode"]["tp"]

    with pytest.raises(ConfigError, match=r"plan\.json: placement is incomplete"):
        parse_placement(document, origin="plan.json")


def test_a_dear_prefill_device_changes_the_verdict() -> None:
    dear = resources(prefill=Pool(profile=profile(), price=20.0))

    assert make_plan(tight_tpot(resources=dear)).choice == "colocated"


def test_a_fast_prefill_device_of_another_kind_is_used_for_prefill() -> None:
    fast = profile(
        device="fast",
        entries={
            1: ParallelEntry(
                tp=1,
                latency=LatencyModel(
                    prefill=(Regime(constant_s=0.001, per_token_s=0.0001),), decode=(Regime(constant_s=0.01),)
                ),
                kv_capacity_tokens={1: 40000},
            )
        },
    )
    plan = make_plan(tight_tpot(resources=resources(prefill=Pool(profile=fast))))

    assert plan.choice == "split"
    assert plan.chosen.candidate.num_devices > 2 * plan.chosen.candidate.num_prefill_devices


def test_the_equations_with_the_models_numbers() -> None:
    lines = explain(replace(question(), workloads=(fixed(190, 2),)), 2.5)

    assert "D = 200.0 ms" in lines[0] and "R D = 0.50" in lines[0]
    assert lines[1].startswith("eq. 1: mean TTFT 300.0 ms")
    assert "K = 1.60" in lines[3] and "eq. 3: mean TTFT" in lines[3]
    assert "1.09" in lines[4]


def test_an_overloaded_queue_is_said_to_be_one() -> None:
    lines = explain(replace(question(), workloads=(fixed(190, 2),)), 6.0)

    assert "grows without end" in lines[1]
    assert "mean TTFT" in lines[2]
