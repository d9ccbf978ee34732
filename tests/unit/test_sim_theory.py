"""The simulator against closed forms: DistServe's equations 1 to 3, Little's law, and what cannot be otherwise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sim_cases import engine, fixed, run
from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.link import Link
from vllm_disagg.core.queueing import crossover_load, inter_op_s, intra_op_s, one_device_s, replicas_s
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.run import simulate
from vllm_disagg.sim.system import EngineSpec, System
from vllm_disagg.sim.workload import Floats, Workload

D = 0.2
LOADS = (0.1, 0.3, 0.5, 0.7, 0.9)


def device(seconds: float = D, pp: int = 1) -> EngineSpec:
    """Serves one prompt at a time, in so many seconds: this project's prefill scheduler with an L_m of one token."""
    constant = (Regime(constant_s=seconds),)
    latency = LatencyModel(prefill=constant, decode=constant)
    return engine(latency=latency, pp=pp, policy="prefill", rules=Rules(batch_tokens=1))


def prompts(load: float, num: int, seed: int = 0, service_s: float = D) -> Workload:
    return fixed(2, 1, num=num, rate=load / service_s, seed=seed)


def lindley(arrival_s: Floats, service_s: float) -> Floats:
    """When a queue with one server and equal service times is done with each: the recursion itself."""
    done, free_s = np.empty(len(arrival_s)), 0.0
    for index, arrival in enumerate(arrival_s):
        free_s = done[index] = max(arrival, free_s) + service_s
    return done


# The formulas.


def test_the_published_check_values() -> None:
    assert one_device_s(0.2, 3) == pytest.approx(0.35)
    assert inter_op_s(0.2, 3) == pytest.approx(0.221429, abs=1e-6)
    assert intra_op_s(0.2, 3, 1.6) == pytest.approx(0.1625)
    assert replicas_s(0.2, 6, 2) == pytest.approx(0.35)


@pytest.mark.parametrize(
    ("speed_up", "load"), [(1.3, 0.6106), (1.5, 0.9361), (1.6, 1.0949), (1.7, 1.2571), (1.9, 1.6257)]
)
def test_where_pipelining_overtakes_tensor_parallelism(speed_up: float, load: float) -> None:
    assert crossover_load(speed_up) == pytest.approx(load, abs=1e-4)


@pytest.mark.parametrize("load", [1.0, 1.5, -0.1])
def test_a_queue_without_end_is_refused(load: float) -> None:
    with pytest.raises(ConfigError, match="grows without end"):
        one_device_s(1.0, load)


# Prefill, first come first served. The recursion is exact; the formulas are its mean over infinitely many requests.


@pytest.mark.parametrize("load", LOADS)
def test_one_device_is_a_queue_with_one_server(load: float) -> None:
    workload = prompts(load, 400)
    outcome = run(System(decode=(device(),), phase="prefill"), workload)

    assert np.allclose(outcome.first_token_s, lindley(workload.arrival_s, D), rtol=1e-9)


@pytest.mark.parametrize("load", LOADS)
def test_a_pipeline_is_a_queue_with_half_the_service_and_one_more_stage(load: float) -> None:
    workload = prompts(2 * load, 400)
    outcome = run(System(decode=(device(pp=2),), phase="prefill"), workload)

    assert np.allclose(outcome.first_token_s, lindley(workload.arrival_s, D / 2) + D / 2, rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("load", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("speed_up", [1.6])
def test_means_are_those_of_equations_1_2_and_3_within_1_percent(load: float, speed_up: float) -> None:
    pytest.importorskip("numba")
    num_runs = max(1, round(0.3 / (1 - load) ** 2))  # of 400,000 requests: waits near saturation vary slowly

    def ttft_s(spec: EngineSpec, rate: float) -> float:
        system = System(decode=(spec,), phase="prefill")
        runs = (simulate(system, fixed(2, 1, num=400_000, rate=rate, seed=seed)) for seed in range(num_runs))
        return float(np.mean([outcome.ttft_s.mean() for outcome in runs]))

    assert ttft_s(device(), load / D) == pytest.approx(one_device_s(D, load / D), rel=0.01)
    assert ttft_s(device(pp=2), 2 * load / D) == pytest.approx(inter_op_s(D, 2 * load / D), rel=0.01)
    rate = speed_up * load / D
    assert ttft_s(device(D / speed_up), rate) == pytest.approx(intra_op_s(D, rate, speed_up), rel=0.01)


def test_replicas_with_the_shortest_queue_beat_the_formula_with_a_split_stream() -> None:
    workload = prompts(1.6, 3000)
    outcome = run(System(decode=(device(), device()), phase="prefill"), workload)

    assert D < outcome.ttft_s.mean() < replicas_s(D, 1.6 / D, 2)
    assert np.bincount(outcome.decode_instance).min() > 1000


# Little's law: requests in the system = rate x time in it, over any run that starts and ends empty.


def mean_number_inside(outcome: Outcome, until_s: float) -> float:
    """By following the number of requests through all arrivals and departures."""
    moments = np.concatenate((outcome.arrival_s, outcome.finish_s))
    changes = np.concatenate((np.ones(len(outcome)), -np.ones(len(outcome))))
    order = np.argsort(moments, kind="stable")
    inside = np.cumsum(changes[order])
    return float((inside[:-1] * np.diff(moments[order])).sum() / until_s)


@pytest.mark.parametrize("policy", ["chunked", "whole", "prefill_first", "phase"])
@pytest.mark.parametrize("split", [False, True])
def test_littles_law(policy: str, split: bool) -> None:
    prefill, decode = ("prefill", "decode") if policy == "phase" else (policy, policy)
    system = System(
        prefill=(engine(policy=prefill, kv_tokens=600),) if split else (),
        decode=(engine(policy=decode, kv_tokens=600),),
        link=Link(bytes_per_s=5e3),
        kv_bytes_per_token=1,
    )
    outcome = run(system, fixed(60, 12, num=150, rate=12.0))
    until_s = outcome.finish_s.max()

    assert mean_number_inside(outcome, until_s) == pytest.approx(len(outcome) / until_s * outcome.latency_s.mean())


# What cannot be otherwise.


def pair(**changes: object) -> System:
    values = {
        "prefill": (engine(),), "decode": (engine(),), "link": Link(bytes_per_s=2e5), "kv_bytes_per_token": 1000,
    }  # fmt: skip
    return System(**values | changes)  # type: ignore[arg-type]


def test_an_infinite_link_is_never_slower() -> None:
    workload = fixed(100, 10, num=200, rate=4.0)
    finite, infinite = (run(pair(link=Link(bytes_per_s=bandwidth)), workload) for bandwidth in (1e6, float("inf")))

    assert infinite.ttft_s.mean() < finite.ttft_s.mean()
    assert np.all(infinite.prefill_end_s == finite.prefill_end_s)


def test_faster_devices_are_never_slower() -> None:
    slow = engine()
    regime = slow.latency.prefill[0]
    halved = replace(regime, constant_s=regime.constant_s / 2, per_token_s=regime.per_token_s / 2)
    twice = replace(slow, latency=replace(slow.latency, prefill=(halved,)))
    workload = fixed(100, 10, num=200, rate=8.0)

    assert run(pair(prefill=(twice,)), workload).ttft_s.mean() < run(pair(prefill=(slow,)), workload).ttft_s.mean()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.sampled_from([2.0, 6.0, 12.0]))
def test_a_transfer_never_takes_less_than_the_link_allows(seed: int, rate: float) -> None:
    outcome = run(pair(), fixed(100, 4, num=40, rate=rate, seed=seed))
    alone_s = 7 * 16 * 1000 / 2e5  # seven blocks

    assert np.nanmin(outcome.transfer_end_s - outcome.transfer_start_s) >= alone_s - 1e-9


def test_one_seed_gives_one_run() -> None:
    first, again = (run(pair(), fixed(50, 5, seed=9)) for _ in range(2))

    assert np.array_equal(first.log, again.log)
