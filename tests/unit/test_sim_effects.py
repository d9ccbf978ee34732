"""Each effect of the simulator, one at a time, on cases small enough to reckon by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.sim_cases import engine, run
from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.link import Link
from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.outcome import PHASES, PREEMPTION, STEP, TRANSFER, Outcome
from vllm_disagg.sim.system import EngineSpec, System
from vllm_disagg.sim.workload import Prefixes, Workload, as_ints

SECOND = (Regime(constant_s=1.0),)
UNIT = LatencyModel(prefill=SECOND, decode=SECOND)
"""Every step takes a second."""


def unit(**changes: Any) -> EngineSpec:
    values: dict[str, Any] = {"latency": UNIT, "block_size": 16, "kv_tokens": 1600}
    return engine(**values | changes)


def requests(*rows: tuple[float, int, int], prefixes: Prefixes | None = None) -> Workload:
    """Rows of arrival, prompt, output."""
    arrival, prompt, output = zip(*rows, strict=True)
    return Workload(
        arrival_s=np.array(arrival, dtype=np.float64),
        prompt_tokens=as_ints(prompt),
        output_tokens=as_ints(output),
        rate=1.0,
        source="by hand",
        prefixes=prefixes,
    )


def steps(outcome: Outcome, instance: int = 0) -> list[tuple[float, int, int]]:
    """Start, new prompt tokens and decoding requests of each step of an instance."""
    rows = outcome.log[(outcome.log[:, 0] == STEP) & (outcome.log[:, 3] == instance)]
    return [(row[1], int(row[5]), int(row[6])) for row in rows]


def pair(prefill: EngineSpec | None = None, decode: EngineSpec | None = None, **changes: Any) -> System:
    return System(prefill=(prefill or unit(),), decode=(decode or unit(),), **changes)


# Forming steps.


def test_decoding_goes_first_and_prompts_get_the_rest_of_the_budget() -> None:
    system = System(decode=(unit(max_num_batched_tokens=32),))
    outcome = run(system, requests((0.0, 8, 5), (0.5, 70, 2)))

    assert steps(outcome) == [(0, 8, 0), (1, 31, 1), (2, 31, 1), (3, 8, 1), (4, 0, 2)]


def test_a_step_of_prompts_and_decoding_is_a_mixed_one() -> None:
    parts = LatencyModel(
        prefill=(Regime(constant_s=1.0, per_token_s=0.1),), decode=(Regime(constant_s=0.5, per_context_s=0.01),)
    )
    system = System(decode=(unit(latency=parts),))
    outcome = run(system, requests((0.0, 10, 2), (0.1, 20, 1)))

    assert outcome.first_token_s[0] == pytest.approx(2.0)
    assert outcome.finish_s[0] == pytest.approx(2.0 + 1.0 + 0.1 * 21 + 0.01 * 11)


def test_whole_prompts_are_packed_up_to_l_m_and_longer_ones_run_alone() -> None:
    system = System(decode=(unit(policy="whole", max_num_batched_tokens=64),), phase="prefill")
    outcome = run(system, requests(*[(0.0, length, 1) for length in (30, 30, 30, 100, 10)]))

    assert [tokens for _, tokens, _ in steps(outcome)] == [60, 30, 100, 10]


def test_prefill_first_interrupts_decoding_and_never_mixes() -> None:
    system = System(decode=(unit(policy="prefill_first"),))
    outcome = run(system, requests((0.0, 10, 4), (1.5, 20, 2)))

    assert steps(outcome) == [(0, 10, 0), (1, 0, 1), (2, 20, 0), (3, 0, 2), (4, 0, 1)]


def test_no_more_requests_run_than_allowed() -> None:
    outcome = run(System(decode=(unit(max_num_seqs=2),)), requests(*[(0.0, 4, 3)] * 4))

    assert outcome.first_token_s.tolist() == [1, 1, 4, 4]


def test_everything_that_comes_at_one_moment_is_seen_by_the_step_of_that_moment() -> None:
    outcome = run(System(decode=(unit(),)), requests(*[(3.0, 4, 1)] * 4))

    assert outcome.first_token_s.tolist() == [4.0] * 4


def test_host_time_is_added_to_each_step() -> None:
    spec = unit(step_overhead_s=0.5, request_overhead_s=0.25)
    outcome = run(System(decode=(spec,)), requests((0.0, 4, 1), (0.0, 4, 2)))

    assert outcome.finish_s.tolist() == [2.0, 2.0 + 1.75]


# Memory.


def test_the_last_one_gives_way_and_computes_everything_again() -> None:
    outcome = run(System(decode=(unit(kv_tokens=64),)), requests((0.0, 30, 20), (0.0, 30, 6)))

    assert outcome.num_preemptions.tolist() == [0, 1]
    assert outcome.log[outcome.log[:, 0] == PREEMPTION, 4].tolist() == [1]
    lost_s = float(outcome.log[outcome.log[:, 0] == PREEMPTION, 1][0])
    again = [tokens for start, tokens, _ in steps(outcome) if start >= lost_s and tokens]
    assert again == [30 + 3]  # its prompt and the tokens it had made
    assert outcome.finish_s[1] > outcome.finish_s[0]


def test_a_prompt_is_admitted_only_when_all_of_it_fits() -> None:
    spec = unit(kv_tokens=96, max_num_batched_tokens=32)
    outcome = run(System(decode=(spec,)), requests((0.0, 60, 3), (0.0, 60, 1)))

    assert outcome.prefill_start_s[1] >= outcome.finish_s[0]


def test_a_request_that_never_fits_is_refused_and_counts_as_missed() -> None:
    outcome = run(System(decode=(unit(kv_tokens=64),)), requests((0.0, 60, 30), (0.0, 10, 2)))

    assert outcome.refused.tolist() == [True, False]
    assert outcome.attainment(SLO(ttft_s=100, tpot_s=100)) == 0.5
    assert np.isinf(outcome.ttft_s[0]) and np.isinf(outcome.tpot_s[0])


def test_prefill_keeps_kv_until_it_is_fetched_and_admits_no_more_than_fit() -> None:
    """Two prompts fill prefill's memory; a transfer takes 10 s."""
    system = pair(unit(kv_tokens=64), link=Link(bytes_per_s=3.2), kv_bytes_per_token=1, pull_timeout_s=99.0)
    outcome = run(system, requests(*[(0.0, 32, 2)] * 4))

    assert outcome.prefill_end_s.tolist() == [1.0, 1.0, 12.0, 22.0]
    assert outcome.transfer_end_s.tolist() == [11.0, 21.0, 31.0, 41.0]


def test_decode_fetches_only_what_it_has_room_for() -> None:
    outcome = run(pair(decode=unit(kv_tokens=48)), requests((0.0, 32, 5), (0.0, 32, 5)))

    assert outcome.transfer_start_s[1] == outcome.finish_s[0]
    assert outcome.num_preemptions.sum() == 0


def test_kv_that_nobody_fetches_is_given_up_and_decode_computes_the_prompt() -> None:
    system = pair(decode=unit(kv_tokens=48), hold_cap_s=2.5)
    outcome = run(system, requests((0.0, 32, 5), (0.0, 32, 5)))

    assert np.isnan(outcome.transfer_start_s[1]) and not np.isnan(outcome.transfer_start_s[0])
    assert (outcome.finish_s[0], 32, 0) in steps(outcome, 1)


def test_a_transfer_that_takes_too_long_costs_a_local_prefill() -> None:
    system = pair(link=Link(bytes_per_s=3.2), kv_bytes_per_token=1, pull_timeout_s=4.0)
    outcome = run(system, requests((0.0, 32, 2)))

    assert np.isnan(outcome.transfer_end_s[0])
    assert outcome.first_token_s[0] == 1.0 + 4.0 + 1.0


# The way of a split request.


def test_the_last_prompt_token_is_computed_again_and_its_step_gives_the_first_token() -> None:
    system = pair(link=Link(bytes_per_s=32.0), kv_bytes_per_token=1, handoff_s=0.25)
    outcome = run(system, requests((0.0, 32, 3)))

    assert steps(outcome, 0) == [(0.0, 32, 0)]
    assert steps(outcome, 1) == [(2.25, 0, 1), (3.25, 0, 1), (4.25, 0, 1)]
    assert outcome.ttft_s[0] == 3.25
    assert outcome.tpot_s[0] == 1.0


def test_with_an_early_first_token_the_transfer_counts_in_tpot() -> None:
    system = pair(link=Link(bytes_per_s=32.0), kv_bytes_per_token=1, handoff_s=0.25, first_token="prefill")
    outcome = run(system, requests((0.0, 32, 3), (50.0, 32, 1)))

    assert steps(outcome, 1) == [(2.25, 0, 1), (3.25, 0, 1)]
    assert outcome.ttft_s.tolist() == [1.0, 1.0]
    assert outcome.tpot_s[0] == (4.25 - 1.0) / 2
    assert np.isnan(outcome.tpot_s[1]) and np.isnan(outcome.transfer_start_s[1])
    assert outcome.longest_gap_s[0] == 2.25


def test_what_has_arrived_is_noticed_when_the_running_step_ends() -> None:
    """The first one decodes in steps that begin at whole seconds; the other's KV comes between two of them."""
    system = pair(link=Link(bytes_per_s=64.0), kv_bytes_per_token=1, handoff_s=0.2, early_reads=False)
    outcome = run(system, requests((0.0, 32, 9), (3.0, 32, 2)))

    assert outcome.decode_start_s[0] == pytest.approx(1.7)
    # Handed over at 4.2, seen when the step ends at 4.7; there at 5.2, seen at 5.7.
    assert outcome.transfer_start_s[1] == pytest.approx(4.7)
    assert outcome.transfer_end_s[1] == pytest.approx(5.2)
    assert outcome.decode_start_s[1] == pytest.approx(5.7)


def test_a_busy_decode_instance_fetches_on_arrival() -> None:
    """As above, but the KV is there before the running step ends, and the next one computes it."""
    system = pair(link=Link(bytes_per_s=64.0), kv_bytes_per_token=1, handoff_s=0.1)
    outcome = run(system, requests((0.0, 32, 9), (3.0, 32, 2)))

    assert outcome.decode_start_s[0] == pytest.approx(1.6)
    assert outcome.transfer_start_s[1] == pytest.approx(4.1)
    assert outcome.transfer_end_s[1] == pytest.approx(4.6)
    assert outcome.decode_start_s[1] == pytest.approx(4.6)


def test_a_fetch_that_the_reserve_has_no_room_for_waits_for_the_step() -> None:
    """Four of seven free blocks are more than a quarter of them."""
    full = pair(link=Link(bytes_per_s=64.0), kv_bytes_per_token=1, handoff_s=0.1, decode=unit(kv_tokens=160))
    outcome = run(full, requests((0.0, 32, 9), (3.0, 64, 2)))

    assert outcome.transfer_start_s[1] > outcome.prefill_end_s[1] + 0.1 + 0.01


@pytest.mark.parametrize(("ends", "second"), [((0, 0), 3.0), ((0, 1), 2.0)])
def test_transfers_share_a_link_end(ends: tuple[int, int], second: float) -> None:
    system = System(
        prefill=(unit(), unit()), decode=(unit(), unit()), link=Link(bytes_per_s=32.0), kv_bytes_per_token=1,
        prefill_ends=ends,
    )  # fmt: skip
    outcome = run(system, requests((0.0, 32, 2), (0.0, 32, 2)))

    assert sorted(outcome.transfer_end_s) == [2.0, second]


def test_whole_blocks_travel() -> None:
    outcome = run(pair(link=Link(bytes_per_s=1.0), kv_bytes_per_token=1, pull_timeout_s=99), requests((0.0, 17, 2)))

    assert outcome.transfer_end_s[0] - outcome.transfer_start_s[0] == 32.0
    assert outcome.log[outcome.log[:, 0] == TRANSFER, 6].tolist() == [2]


def test_the_five_phases_add_up_to_ttft() -> None:
    system = pair(link=Link(bytes_per_s=100.0), kv_bytes_per_token=1, handoff_s=0.3, dispatch_s=0.1)
    outcome = run(system, requests(*[(index * 0.7, 20 + index, 4) for index in range(12)]))

    phases = outcome.phases()
    assert tuple(phases) == PHASES
    assert np.allclose(sum(phases.values()), outcome.ttft_s)  # type: ignore[arg-type]
    assert all(values.max() > 0 for values in phases.values())


def test_short_prompts_stay_on_the_decode_instance() -> None:
    outcome = run(pair(min_split_tokens=32), requests((0.0, 31, 2), (0.0, 32, 2)))

    assert outcome.prefill_instance.tolist() == [-1, 0]


def test_requests_go_to_the_instance_with_the_fewest_prompt_tokens() -> None:
    system = System(decode=(unit(), unit()))
    outcome = run(system, requests((0.0, 100, 9), (0.1, 10, 9), (0.2, 10, 9), (0.3, 100, 9), (0.4, 10, 9)))

    assert outcome.decode_instance.tolist() == [0, 1, 1, 1, 0]


def test_decode_alone_begins_with_the_second_token() -> None:
    outcome = run(System(decode=(unit(),), phase="decode"), requests((0.0, 32, 3), (0.0, 32, 1)))

    assert outcome.ttft_s.tolist() == [0.0, 0.0]
    assert outcome.finish_s.tolist() == [2.0, 0.0]


# Pipelines.


def test_a_pipeline_works_on_several_steps_and_waits_for_the_longest() -> None:
    """Two stages of half a second; a next token needs the last one, so that one request alone leaves bubbles."""
    alone = run(System(decode=(unit(pp=2),)), requests((0.0, 4, 4)))
    both = run(System(decode=(unit(pp=2),)), requests((0.0, 4, 4), (0.5, 4, 4)))

    assert alone.finish_s.tolist() == [4.0]
    assert both.finish_s.tolist() == [4.0, 4.5]
    assert [start for start, _, _ in steps(both)] == [index / 2 for index in range(8)]


def test_uneven_steps_leave_bubbles() -> None:
    spec = unit(latency=LatencyModel(prefill=(Regime(per_token_s=0.1),), decode=SECOND), pp=2, policy="whole",
                max_num_batched_tokens=1)  # fmt: skip
    outcome = run(System(decode=(spec,), phase="prefill"), requests((0.0, 40, 1), (0.0, 10, 1), (0.0, 40, 1)))

    # Stages take 2, 0.5 and 2 s: the short one waits for the second stage. The last one waits for the first step's end,
    # since no more steps are under way than there are stages.
    assert outcome.first_token_s == pytest.approx([4.0, 4.5, 8.0])


# Shared prefixes.


def shared(*chunks: list[int], tokens: int = 32) -> Prefixes:
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in chunks])))
    return Prefixes(chunk_tokens=tokens, offsets=as_ints(offsets), ids=as_ints(np.concatenate(chunks)))


def test_a_common_beginning_is_computed_once() -> None:
    workload = requests((0.0, 40, 2), (5.0, 50, 2), (9.0, 50, 2), prefixes=shared([0], [0], [1]))
    outcome = run(System(decode=(unit(),)), workload)

    assert outcome.cached_tokens.tolist() == [0, 32, 0]
    assert [tokens for _, tokens, _ in steps(outcome) if tokens] == [40, 18, 50]


def test_the_last_token_of_a_cached_prompt_is_computed_again() -> None:
    outcome = run(System(decode=(unit(),)), requests((0.0, 64, 2), (5.0, 64, 2), prefixes=shared([0, 1], [0, 1])))

    assert outcome.cached_tokens.tolist() == [0, 48]


def test_without_a_prefix_cache_everything_is_computed() -> None:
    workload = requests((0.0, 40, 2), (5.0, 50, 2), prefixes=shared([0], [0]))

    assert run(System(decode=(unit(prefix_cache=False),)), workload).cached_tokens.sum() == 0


def test_decode_fetches_only_what_it_does_not_have() -> None:
    workload = requests((0.0, 64, 2), (9.0, 64, 2), prefixes=shared([0], [0]))
    outcome = run(pair(link=Link(bytes_per_s=64.0), kv_bytes_per_token=1), workload)

    assert outcome.log[outcome.log[:, 0] == TRANSFER, 6].tolist() == [4, 2]


def test_what_was_let_go_first_is_overwritten_first() -> None:
    workload = requests(
        (0.0, 32, 1), (2.0, 32, 1), (4.0, 48, 1), (6.0, 32, 1), (8.0, 33, 1),
        prefixes=shared([0], [1], [], [1], [0]),
    )  # fmt: skip
    outcome = run(System(decode=(unit(kv_tokens=96),)), workload)

    assert outcome.cached_tokens.tolist() == [0, 0, 0, 16, 0]


def test_running_requests_share_the_blocks_of_a_common_beginning() -> None:
    """Each needs 5 blocks of 8, 4 of them the same."""
    workload = requests((0.0, 65, 4), (1.0, 65, 4), (1.0, 65, 4), prefixes=shared([0, 1], [0, 1], [0, 1]))
    outcome = run(System(decode=(unit(kv_tokens=128),)), workload)

    assert outcome.num_preemptions.sum() == 0
    assert outcome.first_token_s.tolist() == [1.0, 2.0, 2.0]


# Bad input.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pp": 0}, "pp must be at least 1"),
        ({"kv_tokens": 8}, "less than one block"),
        ({"policy": "fifo"}, "chunked, whole, prefill_first"),
        ({"watermark": 1.0}, "watermark"),
        ({"step_overhead_s": float("nan")}, "step_overhead_s must be 0 or more"),
    ],
)
def test_engines_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        unit(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decode": ()}, "at least one decode instance"),
        ({"link": Link(bytes_per_s=0.0)}, "positive bandwidth"),
        ({"pull_timeout_s": 0.0}, "pull_timeout_s must be positive"),
        ({"handoff_s": -1.0}, "handoff_s must be 0 or more"),
        ({"phase": "decode"}, "alone"),
        ({"prefill_ends": (0, 1)}, "as many link ends"),
    ],
)
def test_systems_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        System(**{"prefill": (unit(),), "decode": (unit(),)} | changes)


@pytest.mark.parametrize("bad", [{"ttft_s": 0.0, "tpot_s": 1.0}, {"ttft_s": 1.0, "tpot_s": float("nan")}])
def test_slos_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="positive number of seconds"):
        SLO(**bad)


def test_both_targets_have_to_be_met_by_the_same_request() -> None:
    slo = SLO(ttft_s=1.0, tpot_s=0.1)

    assert slo.met_by(ttft_s=1.0, tpot_s=0.1) and slo.met_by(ttft_s=0.5, tpot_s=None)
    assert not slo.met_by(ttft_s=1.1, tpot_s=0.05) and not slo.met_by(ttft_s=0.5, tpot_s=0.11)
    assert slo.scaled(2.0).met_by(ttft_s=1.1, tpot_s=0.11)
