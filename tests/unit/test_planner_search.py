"""Goodput, its limits, and the placement algorithms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.unit.sim_cases import engine, fixed
from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.link import LINKS, Link
from vllm_disagg.core.profile import ModelShape, ParallelEntry, Profile
from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError, NoFeasiblePlacement
from vllm_disagg.planner.bounds import decode_bound, load_of, prefill_bound
from vllm_disagg.planner.candidates import Candidate, Resources, Shape, colocated, segmented, shapes
from vllm_disagg.planner.cluster import Cluster, EngineOptions, Pool, critical_length
from vllm_disagg.planner.goodput import SearchSettings, attainment_at, find_goodput, half_width, slo_scale
from vllm_disagg.planner.limits import limit_of
from vllm_disagg.planner.placement import (
    Effort,
    Question,
    algorithm_1,
    algorithm_2,
    best_colocated,
    measure,
    nearest_slo,
    require_shapes,
)
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.run import simulate
from vllm_disagg.sim.system import System

SLOW_PROMPTS = LatencyModel(
    prefill=(Regime(constant_s=0.01, per_token_s=0.001),), decode=(Regime(constant_s=0.01, per_decode_s=0.0005),)
)
TARGETS = SLO(ttft_s=0.5, tpot_s=0.05)


def profile(**changes: Any) -> Profile:
    """Four layers, four heads; twice the devices are 1.6 times as fast."""
    entries = {
        tp: ParallelEntry(
            tp=tp,
            latency=LatencyModel(
                prefill=(Regime(constant_s=0.01 / speed, per_token_s=0.001 / speed),),
                decode=(Regime(constant_s=0.01 / speed, per_decode_s=0.0005 / speed),),
            ),
            kv_capacity_tokens={1: 4000 * tp, 2: 9000 * tp, 4: 19000 * tp},
        )
        for tp, speed in ((1, 1.0), (2, 1.6))
    }
    shape = ModelShape(
        name="small", num_layers=4, num_heads=4, num_kv_heads=4, head_size=64, hidden_size=256,
        weight_bytes=1000, kv_bytes_per_token=1000, max_model_len=2048,
    )  # fmt: skip
    values: dict[str, Any] = {
        "model": shape, "device": "toy", "device_memory_bytes": 8_000_000, "kind": "guess", "source": "",
        "entries": entries,
    }  # fmt: skip
    return Profile(**values | changes)


def resources(**changes: Any) -> Resources:
    pool = Pool(profile=profile())
    values: dict[str, Any] = {
        "prefill": pool, "decode": pool, "cluster": Cluster(num_nodes=1, devices_per_node=4),
        "options": EngineOptions(chunk_budgets=(256, 2048)), "longest_tokens": 300,
    }  # fmt: skip
    return Resources(**values | changes)


def question(**changes: Any) -> Question:
    workloads = tuple(fixed(200, 30, num=2000, seed=seed) for seed in range(4))
    values: dict[str, Any] = {
        "resources": resources(), "workloads": workloads, "slo": TARGETS,
        "effort": Effort(quick_requests=200, quick_spans=2.0, finalists=2),
        "search": SearchSettings(min_requests=200, spans=2.0, tolerance=0.05),
    }  # fmt: skip
    return Question(**values | changes)


# Goodput.


def test_goodput_lies_where_attainment_crosses_the_goal() -> None:
    system, workload = System(decode=(engine(latency=SLOW_PROMPTS),)), fixed(100, 20, num=300)
    goodput = find_goodput(system, [workload], TARGETS)

    assert attainment_at(system, workload, goodput.mean * 0.97, TARGETS) >= 0.9
    assert attainment_at(system, workload, goodput.mean * 1.03, TARGETS) < 0.9


def test_where_one_begins_to_search_does_not_matter() -> None:
    system, workload = System(decode=(engine(latency=SLOW_PROMPTS),)), fixed(100, 20, num=300)
    found = [find_goodput(system, [workload], TARGETS, guess=guess).mean for guess in (0.01, 5.0, 1000.0)]

    assert found == pytest.approx([found[0]] * 3, rel=0.02)


def test_a_short_run_would_hide_that_a_system_is_overloaded() -> None:
    """Sixteen requests decode 47 requests per second. Those that wait are not late before a second has passed."""
    system, workload = System(decode=(engine(latency=SLOW_PROMPTS),), phase="decode"), fixed(100, 20, num=5000)
    targets = SLO(ttft_s=0.5, tpot_s=0.05)
    short = find_goodput(system, [workload], targets, SearchSettings(min_requests=100, spans=0.0)).mean
    steady = find_goodput(system, [workload], targets).mean

    assert short > 60 > 50 > steady


def test_a_higher_goal_means_less_goodput() -> None:
    system, workload = System(decode=(engine(latency=SLOW_PROMPTS),)), fixed(100, 20, num=300)
    usual, strict = (find_goodput(system, [workload], TARGETS, SearchSettings(goal=goal)).mean for goal in (0.9, 0.99))

    assert 0 < strict < usual


def test_targets_that_a_lone_request_misses_have_no_goodput() -> None:
    system = System(decode=(engine(latency=SLOW_PROMPTS),))

    assert find_goodput(system, [fixed(400, 20)], SLO(ttft_s=0.3, tpot_s=1.0)).per_seed == (0.0,)


def test_each_phase_is_judged_by_its_own_target() -> None:
    spec, never = engine(latency=SLOW_PROMPTS), float("inf")
    prefill = find_goodput(
        System(decode=(spec,), phase="prefill"), [fixed(100, 20, num=3000)], SLO(ttft_s=0.5, tpot_s=never)
    ).mean
    decode = find_goodput(
        System(decode=(spec,), phase="decode"), [fixed(100, 20, num=3000)], SLO(ttft_s=never, tpot_s=0.05)
    ).mean

    assert 5 < prefill < 1 / 0.11
    assert 35 < decode < 16 / 0.018 / 19 * 1.05  # 16 requests at most, whose step takes 18 ms


def test_the_interval_widens_with_the_spread() -> None:
    assert half_width([1.0, 1.0, 1.0]) == 0.0
    assert half_width([1.0]) == float("inf")
    assert half_width([0.9, 1.1]) == pytest.approx(12.706 * 0.1)


def test_the_slo_scale_is_the_smallest_that_reaches_the_goal() -> None:
    outcome = simulate(System(decode=(engine(latency=SLOW_PROMPTS),)), fixed(100, 20, num=300, rate=7.0))
    scale = slo_scale(outcome, TARGETS)

    assert outcome.attainment(TARGETS.scaled(scale * (1 + 1e-9)), skip=0.1) >= 0.9
    assert outcome.attainment(TARGETS.scaled(scale * 0.999), skip=0.1) < 0.9


@pytest.mark.parametrize("bad", [{"goal": 0.0}, {"goal": 1.1}, {"skip": 0.5}, {"tolerance": 0.0}])
def test_searches_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SearchSettings(**bad)  # type: ignore[arg-type]


# Limits.


def pair(**changes: Any) -> System:
    spec = engine(latency=SLOW_PROMPTS)
    return System(**{"prefill": (spec,), "decode": (spec,)} | changes)


@pytest.mark.parametrize(
    ("system", "prompt", "output", "rate", "expected"),
    [
        (pair(), 200, 5, 6.0, "prefill queue"),
        (pair(), 700, 5, 0.1, "prefill time"),
        (pair(link=Link(bytes_per_s=1e6), kv_bytes_per_token=10_000), 100, 5, 0.3, "KV transfer"),
        (pair(decode=(engine(latency=SLOW_PROMPTS, max_num_seqs=2),)), 100, 60, 4.0, "decode queue"),
        (
            System(decode=(engine(latency=SLOW_PROMPTS, max_num_seqs=200),), phase="decode"),
            10,
            60,
            90.0,
            "decode steps",
        ),
        (System(decode=(engine(kv_tokens=96),)), 90, 20, 1.0, "too long"),
    ],
)
def test_what_limits_a_system(system: System, prompt: int, output: int, rate: float, expected: str) -> None:
    targets = SLO(ttft_s=0.5, tpot_s=0.02 if expected == "decode steps" else 0.1)
    limit, share = limit_of(simulate(system, fixed(prompt, output, num=150, rate=rate)), targets)

    assert limit == expected
    assert share > 0.5


def test_nothing_limits_what_meets_its_targets() -> None:
    assert limit_of(simulate(pair(), fixed(10, 5, rate=0.5)), TARGETS) == ("nothing", 0.0)


# Shapes and candidates.


def test_shapes_divide_the_model_and_leave_room_for_kv() -> None:
    opt_66b = load_profile("opt-66b-a100-80g")
    found = shapes(opt_66b, Cluster(num_nodes=1, devices_per_node=8), 2048)

    assert {shape.tp for shape in found} == {2, 3, 4, 8}
    assert Shape(2, 4) in found and Shape(2, 3) not in found  # 64 layers
    assert Shape(2, 1) in found  # 11,600 tokens of KV
    assert Shape(2, 1) not in shapes(opt_66b, Cluster(), 12_000)
    assert all(shape.num_devices <= 8 for shape in found)


def test_tensor_parallelism_stays_in_a_node() -> None:
    assert {
        shape.tp for shape in shapes(load_profile("opt-66b-a100-80g"), Cluster(num_nodes=8, devices_per_node=2), 1)
    } == {2}


def test_segments_hold_both_phases_of_the_same_layers() -> None:
    held = resources(cluster=Cluster(num_nodes=2, devices_per_node=4))
    for candidate in segmented(held):
        assert candidate.prefill is not None
        assert candidate.prefill.pp % candidate.segments == candidate.decode.pp % candidate.segments == 0
        assert candidate.num_devices <= 4 * candidate.segments
        assert np.gcd(candidate.num_prefill, candidate.num_decode) == 1
    assert {candidate.segments for candidate in segmented(held)} == {1, 2}


def test_distserves_placement_of_66b_is_among_the_candidates() -> None:
    opt_66b = Pool(profile=load_profile("opt-66b-a100-80g"))
    held = Resources(
        prefill=opt_66b, decode=opt_66b, cluster=Cluster(num_nodes=4), options=EngineOptions(), longest_tokens=2048
    )
    wanted = Candidate(kind="split", prefill=Shape(4, 1), num_prefill=1, decode=Shape(2, 2), num_decode=1)

    assert wanted in set(segmented(held))


def test_kv_across_nodes_shares_each_nodes_link() -> None:
    held = resources(cluster=Cluster(num_nodes=2, devices_per_node=4, inter=LINKS["25g"]))
    across = Candidate(kind="split", prefill=Shape(2, 1), num_prefill=3, decode=Shape(1, 1), num_decode=2, segments=0)
    system = held.system(across)

    assert system.link == LINKS["25g"]
    assert system.prefill_ends == (0, 0, 1) and system.decode_ends == (1, 1)
    inside = held.system(replace(across, segments=1))
    assert inside.prefill_ends is None and inside.link.bytes_per_s == LINKS["nvlink"].bytes_per_s


def test_l_m_is_where_throughput_saturates() -> None:
    latency = load_profile("opt-13b-a100-80g").entry(1).latency

    assert 450 <= critical_length(latency, EngineOptions().l_m_share, longest=2048) <= 550
    assert critical_length(latency, 0.5, longest=2048) < critical_length(latency, 0.9, longest=2048)


def test_profiles_of_two_models_do_not_go_together() -> None:
    other = Pool(profile=profile(model=replace(profile().model, name="other")))

    with pytest.raises(ConfigError, match="profiles of the same model"):
        resources(prefill=other)


# Bounds.


@pytest.mark.parametrize("candidate", [*segmented(resources())][::4], ids=lambda candidate: candidate.name)
def test_no_placement_does_better_than_its_bound(candidate: Candidate) -> None:
    asked = question()
    load, held = load_of(asked.workloads), asked.resources
    assert candidate.prefill is not None
    bound = min(
        candidate.num_prefill * prefill_bound(held.prefill_engine(candidate.prefill), load),
        candidate.num_decode * decode_bound(held.decode_engine(candidate.decode), load, TARGETS),
    )

    assert find_goodput(held.system(candidate), asked.workloads, TARGETS).mean <= bound * 1.1


# Algorithms.


def test_leaving_out_by_bounds_does_not_change_the_answer() -> None:
    asked = question()
    workload, search = asked.quick
    exhaustive = max(
        find_goodput(asked.resources.system(candidate), [workload], TARGETS, search).mean / candidate.num_devices
        for candidate in segmented(asked.resources)
    )

    assert algorithm_2(asked)[0].per_price == pytest.approx(exhaustive, rel=0.05)


def test_algorithm_1_keeps_both_phases_busy() -> None:
    scores = algorithm_1(question())
    best = scores[0].candidate

    assert best.num_prefill_devices > best.num_decode * best.decode.num_devices  # prompts take most of the time here
    assert best.num_devices <= 4
    assert scores == sorted(scores, key=lambda score: score.rank)


def test_algorithm_1_buys_what_the_rate_needs() -> None:
    large = resources(cluster=Cluster(num_nodes=1, devices_per_node=16))
    asked = question(resources=large, rate=16.0)
    best = min(algorithm_1(asked), key=lambda score: score.price)

    assert attainment_at(large.system(best.candidate), asked.workloads[0], 16.0, TARGETS, asked.search) >= 0.9
    assert best.candidate.num_devices <= 10


def test_a_dearer_device_has_to_give_more() -> None:
    dear = resources(prefill=Pool(profile=profile(), price=3.0))
    candidate = next(segmented(dear))

    assert (
        dear.price(candidate)
        == 3.0 * candidate.num_prefill_devices + candidate.num_decode * candidate.decode.num_devices
    )


def test_colocated_instances_are_tried_with_each_budget() -> None:
    assert {candidate.budget for candidate in colocated(resources())} == {256, 2048}
    assert best_colocated(question())[0].per_price > 0


def test_measuring_uses_all_seeds_and_names_the_limit() -> None:
    asked = question()
    (best,) = measure(asked, best_colocated(asked)[:1])

    assert len(best.goodput.per_seed) == 4
    assert best.limit != "nothing"


def test_the_nearest_targets_that_can_be_met() -> None:
    tight = question(slo=SLO(ttft_s=0.05, tpot_s=0.05))
    candidates = [*segmented(tight.resources), *colocated(tight.resources)]
    found = nearest_slo(tight, candidates)

    assert algorithm_2(tight) == best_colocated(tight) == []
    assert found is not None
    nearest, candidate = found
    assert nearest.ttft_s == pytest.approx((0.01 + 0.2) / 1.6, rel=0.2)
    assert nearest.ttft_s / nearest.tpot_s == pytest.approx(1.0)
    assert find_goodput(tight.resources.system(candidate), tight.workloads, nearest.scaled(1.1)).mean > 0


def test_a_model_that_fits_nowhere_says_what_is_missing() -> None:
    with pytest.raises(NoFeasiblePlacement, match=r"small .* fits no prefill instance on 1 x 4 toy"):
        require_shapes(question(resources=resources(longest_tokens=10**6)))
    require_shapes(question())
