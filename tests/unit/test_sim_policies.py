"""What the schedulers of the two roles promise, held to in simulated runs, and each of their rules on a case that can
be reckoned by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.sim_cases import engine, run
from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.scheduling.pace import FLOOR_TOKENS
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.outcome import PREEMPTION, STEP, Outcome
from vllm_disagg.sim.system import EngineSpec, System
from vllm_disagg.sim.workload import Floats, Workload, as_ints

law = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SECOND = (Regime(constant_s=1.0),)
UNIT = LatencyModel(prefill=SECOND, decode=SECOND)
"""Every step takes a second."""

lines = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 300)), min_size=1, max_size=30)


def unit(policy: str, rules: Rules | None = None, **changes: Any) -> EngineSpec:
    values: dict[str, Any] = {
        "latency": UNIT, "kv_tokens": 16000, "max_num_batched_tokens": 2048, "policy": policy,
        "rules": rules or Rules(),
    }  # fmt: skip
    return engine(**values | changes)


def prompts(rows: list[tuple[float, int]]) -> Workload:
    rows = sorted(rows)
    return Workload(
        arrival_s=np.array([at_s for at_s, _ in rows], dtype=np.float64),
        prompt_tokens=as_ints([tokens for _, tokens in rows]),
        output_tokens=as_ints([1] * len(rows)),
        rate=1.0,
        source="by hand",
    )


def requests(*rows: tuple[float, int, int]) -> Workload:
    at_s, prompt, output = zip(*rows, strict=True)
    return Workload(
        arrival_s=np.array(at_s, dtype=np.float64), prompt_tokens=as_ints(prompt), output_tokens=as_ints(output),
        rate=1.0, source="by hand", max_tokens=as_ints(output),
    )  # fmt: skip


def steps(outcome: Outcome, instance: int) -> Floats:
    """Start, end, new prompt tokens and decoding requests of each step of an instance."""
    rows = outcome.log[(outcome.log[:, 0] == STEP) & (outcome.log[:, 3] == instance)]
    return rows[:, [1, 2, 5, 6]]


# Prefill.


@law
@given(lines, st.sampled_from(["fcfs", "sjf", "edf"]), st.sampled_from([0.5, 3.0]), st.sampled_from([32, 128, 400]))
def test_nobody_waits_longer_than_patience_and_the_work_of_those_before(
    rows: list[tuple[float, int]], order: Any, patience_s: float, batch_tokens: int
) -> None:
    """The stated bound: with steps of one second, patience, one step for each prompt that came before, and the one that
    was under way."""
    rules = Rules(prefill_order=order, patience_s=patience_s, batch_tokens=batch_tokens, slo_ttft_s=2.0)
    outcome = run(System(decode=(unit("prefill", rules),), phase="prefill"), prompts(rows))

    waited_s = outcome.prefill_start_s - outcome.arrival_s
    before = np.searchsorted(outcome.arrival_s, outcome.arrival_s, side="right") - 1
    assert np.all(waited_s <= patience_s + before + 1 + 1e-9)


@law
@given(lines, st.sampled_from(["fcfs", "sjf", "edf"]), st.sampled_from([32, 128, 400]))
def test_the_device_never_rests_while_a_prompt_waits(
    rows: list[tuple[float, int]], order: Any, batch_tokens: int
) -> None:
    rules = Rules(prefill_order=order, batch_tokens=batch_tokens)
    outcome = run(System(decode=(unit("prefill", rules),), phase="prefill"), prompts(rows))
    begun = np.sort(steps(outcome, 0)[:, 0])

    for arrived_s, started_s in zip(outcome.arrival_s, outcome.prefill_start_s, strict=True):
        own = begun[(begun >= arrived_s) & (begun <= started_s)]
        assert np.all(np.diff(own) <= 1 + 1e-9)  # one step after the other until it is its turn
        assert own[0] - arrived_s <= 1 + 1e-9


def test_short_prompts_fill_what_a_long_one_leaves_of_l_m() -> None:
    system = System(decode=(unit("prefill", Rules(batch_tokens=64)),), phase="prefill")
    outcome = run(system, prompts([(0.0, length) for length in (50, 60, 10, 100, 4)]))

    assert sorted(steps(outcome, 0)[:, 2].tolist()) == [60.0, 64.0, 100.0]


def test_an_order_other_than_arrival() -> None:
    rows = [(0.0, 90), (0.1, 80), (0.2, 20), (0.3, 40)]

    def started(order: Any) -> list[int]:
        rules = Rules(prefill_order=order, batch_tokens=16, slo_ttft_s=3.5)
        latency = LatencyModel(prefill=(Regime(per_token_s=0.02),), decode=SECOND)
        outcome = run(System(decode=(unit("prefill", rules, latency=latency),), phase="prefill"), prompts(rows))
        return np.argsort(outcome.prefill_start_s).tolist()

    assert started("fcfs") == [0, 1, 2, 3]
    assert started("sjf") == [0, 2, 3, 1]
    assert started("edf") == [0, 2, 3, 1]  # the second one could only be in time at the cost of two others


def test_prefill_admits_no_prompt_while_it_holds_its_share() -> None:
    """Each prompt holds 10 of 100 blocks for 50 s; three of them are its share."""
    prefill = unit("prefill", Rules(held_share=0.3, batch_tokens=160), kv_tokens=1600)
    decode = unit("decode", kv_tokens=176, max_num_seqs=1)
    outcome = run(System(prefill=(prefill,), decode=(decode,), early_reads=False), requests(*[(0.0, 160, 10)] * 6))

    assert outcome.prefill_end_s.tolist()[:4] == [1.0, 2.0, 3.0, 4.0]
    assert outcome.prefill_start_s[4] >= outcome.transfer_end_s[1]


# Decode.


@law
@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(2, 250), st.integers(2, 60)), min_size=4, max_size=20),
    st.sampled_from([0.02, 0.03, 0.05]),
)
def test_steps_with_streams_keep_the_pace_or_make_the_least_progress(
    rows: list[tuple[float, int, int]], target_s: float
) -> None:
    spec = engine(policy="decode", kv_tokens=32000, max_num_seqs=64, rules=Rules(slo_tpot_s=target_s))
    outcome = run(System(decode=(spec,)), requests(*sorted(rows)))
    mixed = steps(outcome, 0)
    mixed = mixed[(mixed[:, 2] > 0) & (mixed[:, 3] > 0)]

    # What a step costs per prompt beyond the first is not in the budget.
    assert np.all((mixed[:, 1] - mixed[:, 0] <= target_s * 1.2) | (mixed[:, 2] <= FLOOR_TOKENS))


def test_streams_never_wait_for_prompts() -> None:
    """Four streams, then a prompt of 240 tokens that alone would take longer than the pace allows."""
    spec = engine(policy="decode", kv_tokens=32000, rules=Rules(slo_tpot_s=0.03))
    rows = [*[(0.0, 16, 60)] * 4, (0.3, 240, 2), (0.3, 240, 2)]
    ours = run(System(decode=(spec,)), requests(*rows))
    plain = run(System(decode=(engine(kv_tokens=32000),)), requests(*rows))

    assert ours.longest_gap_s[:4].max() < 0.035 < plain.longest_gap_s[:4].max()
    assert ours.finish_s.max() < 1.2 * plain.finish_s.max()


def test_whoever_is_admitted_stays() -> None:
    """Thirty requests for a cache that holds four of them at their end: vLLM admits by the prompt alone."""
    rows = [(0.01 * number, 64, 100) for number in range(30)]
    kv = {"kv_tokens": 720, "block_size": 16}
    prefill = engine(policy="prefill", rules=Rules(batch_tokens=128))
    ours = run(System(prefill=(prefill,), decode=(engine(policy="decode", **kv),)), requests(*rows))
    plain = run(System(prefill=(prefill,), decode=(engine(policy="chunked", **kv),)), requests(*rows))

    assert 5 * ours.num_preemptions.sum() <= plain.num_preemptions.sum()


def test_kv_is_fetched_although_every_run_slot_is_taken() -> None:
    """One run slot: vLLM leaves the second request's KV on prefill until the first one has ended."""

    def second_fetch_s(policy: str) -> tuple[float, float]:
        spec = unit(policy, max_num_seqs=1)
        outcome = run(System(prefill=(unit("prefill"),), decode=(spec,), early_reads=False),
                      requests((0.0, 32, 6), (0.5, 32, 2)))  # fmt: skip
        return float(outcome.transfer_start_s[1]), float(outcome.finish_s[0])

    ours, plain = second_fetch_s("decode"), second_fetch_s("chunked")
    assert ours[0] < ours[1]
    assert plain[0] >= plain[1]


@pytest.mark.parametrize(("policy", "victim"), [("decode", 16), ("chunked", 18)])
def test_the_stream_that_is_furthest_ahead_gives_way(policy: str, victim: int) -> None:
    """Sixteen short answers, then three long ones, which outgrow the cache: a step takes 1 s and a token is due every
    3 s, so that the oldest stream is the furthest ahead. vLLM takes the last one."""
    rows = [*[(0.0, 8, 2)] * 16, (100.0, 33, 60), (103.0, 33, 60), (106.0, 33, 60)]
    spec = unit(policy, kv_tokens=160, rules=Rules(slo_tpot_s=3.0))
    outcome = run(System(decode=(spec,)), replace(requests(*rows), max_tokens=None))

    assert outcome.log[outcome.log[:, 0] == PREEMPTION, 4].tolist()[0] == victim


# Bad input.


def test_a_policy_belongs_to_its_role() -> None:
    with pytest.raises(ConfigError, match="policy 'prefill' is one of instances that end requests"):
        System(decode=(unit("prefill"),))
    with pytest.raises(ConfigError, match="policy 'decode' is one of instances that decode"):
        System(prefill=(unit("decode"),), decode=(unit("decode"),))
    with pytest.raises(ConfigError, match="fcfs, sjf, edf"):
        Rules(prefill_order="lifo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="held share"):
        Rules(held_share=0.0)
