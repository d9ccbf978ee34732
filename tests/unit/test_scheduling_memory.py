"""Laws of admission by growth, of budgets beside streams, of victims, hints and learned step times."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_disagg.core.latency import LatencyModel, Regime, StepWork, work_of
from vllm_disagg.core.scheduling.growth import (
    ENOUGH,
    LEAST_QUANTILE,
    PRIOR,
    OutputLengths,
    has_room,
    next_headroom,
    peak_blocks,
    quantile_of,
)
from vllm_disagg.core.scheduling.hints import BOUNDS, PRIORITY, TPOT, TTFT, clean, hints_of
from vllm_disagg.core.scheduling.pace import critical_length, prompt_tokens_beside
from vllm_disagg.core.scheduling.refine import MIN_STEPS, StepTimes
from vllm_disagg.core.scheduling.victims import MAX_PREEMPTIONS, ahead_s, rank
from vllm_disagg.profiles import load_profile

law = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
LLAMA = load_profile("llama-3-8b-a100-80g").entry(1).latency

holders = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=12)


@law
@given(holders)
def test_the_peak_is_that_of_a_run_step_by_step(requests: list[tuple[int, int]]) -> None:
    peak = max((sum(held + step for held, growth in requests if growth >= step) for step in range(31)), default=0)

    assert peak_blocks(requests) == peak


@law
@given(holders, st.tuples(st.integers(0, 50), st.integers(0, 30)), st.integers(0, 600))
def test_whoever_is_admitted_finds_memory_to_the_end(
    running: list[tuple[int, int]], candidate: tuple[int, int], usable: int
) -> None:
    admitted = has_room(running, candidate, usable_blocks=usable)

    assert admitted == (not running or peak_blocks([*running, candidate]) <= usable)
    if not admitted:  # less memory never admits more
        assert not has_room(running, candidate, usable_blocks=usable - 1)


def test_expected_lengths_follow_what_was_seen() -> None:
    lengths = OutputLengths()
    assert lengths.remaining("chat", quantile=0.75, generated=0, most=4096) == 256  # nothing is known yet
    for value in range(1, 101):
        lengths.add("chat", value)
    for _ in range(20):
        lengths.add("code", 1000)

    assert lengths.remaining("chat", quantile=0.75, generated=0, most=4096) == 76
    assert (
        lengths.remaining("chat", quantile=0.75, generated=60, most=4096) == 91 - 60
    )  # of those that were longer than 60
    assert lengths.remaining("chat", quantile=0.75, generated=0, most=40) == 40
    assert lengths.remaining("chat", quantile=0.75, generated=40, most=40) == 0
    assert lengths.remaining("code", quantile=0.75, generated=0, most=4096) == 1000
    assert lengths.remaining("new", quantile=0.75, generated=0, most=4096) >= 76  # a kind without answers: all kinds
    assert 1 <= lengths.remaining("chat", quantile=0.75, generated=5000, most=10**6) <= 5000


@law
@given(st.lists(st.integers(1, 900), max_size=ENOUGH - 1), st.integers(0, 900), st.floats(0, 1))
def test_missing_answers_count_as_guesses(values: list[int], generated: int, quantile: float) -> None:
    lengths, guess = OutputLengths(), max(PRIOR, 2 * generated)
    for value in values:
        lengths.add("k", value)
    known = sorted([value for value in values if value > generated] + [guess] * (ENOUGH - len(values)))

    remaining = lengths.remaining("k", quantile=quantile, generated=generated, most=4096)

    assert generated + remaining == known[min(len(known) - 1, int(quantile * len(known)))]


@law
@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(0, 600), st.integers(1, 600))
def test_expected_lengths_stay_within_what_is_allowed(values: list[int], generated: int, most: int) -> None:
    lengths = OutputLengths(window=32)
    for value in values:
        lengths.add("k", value)

    remaining = lengths.remaining("k", quantile=0.75, generated=generated, most=most)

    assert remaining == 0 if generated >= most else 1 <= remaining <= most - generated


def test_successive_requests_spread_over_all_quantiles() -> None:
    for first in (1, 50, 1000):
        found = sorted(quantile_of(number) for number in range(first, first + 20))
        assert found[0] >= LEAST_QUANTILE and found[-1] < 1
        assert max(b - a for a, b in pairwise(found)) < 0.09  # 20 even ones would be 0.045 apart


def test_old_answers_and_old_kinds_are_forgotten() -> None:
    lengths = OutputLengths(window=32)
    for number in range(2000):
        lengths.add(number % 500, 10)
    for _ in range(64):
        lengths.add("k", 300)

    assert lengths.remaining("k", quantile=0.75, generated=0, most=9999) == 300
    assert len(lengths._kinds) <= 256


def test_preemptions_widen_the_headroom_and_calm_steps_take_it_back() -> None:
    headroom = 0.0
    for _ in range(30):
        headroom = next_headroom(headroom, preempted=2)
    assert headroom == pytest.approx(0.2)
    for _ in range(700):
        headroom = next_headroom(headroom, preempted=0)
    assert 0.08 < headroom < 0.12


# Budgets.


@law
@given(st.integers(1, 256), st.integers(0, 400_000), st.floats(0.001, 0.5), st.integers(0, 4096))
def test_a_step_with_its_budget_keeps_the_pace_or_makes_the_least_progress(
    decodes: int, context: int, target_s: float, computed: int
) -> None:
    def step_s(tokens: int) -> float:
        return LLAMA.step_s(
            StepWork(
                prefill_tokens=tokens, prefill_area=tokens * (tokens + 2 * computed), num_prefills=1,
                num_decodes=decodes, decode_context=context,
            )
        )  # fmt: skip

    tokens = prompt_tokens_beside(
        LLAMA, num_decodes=decodes, decode_context=context, target_s=target_s, computed=computed, floor=32, ceiling=2048
    )

    assert 32 <= tokens <= 2048
    assert tokens == 32 or step_s(tokens) <= target_s
    assert tokens >= 2048 - 15 or step_s(tokens + 16) > target_s  # nothing is given away


def test_without_streams_the_whole_step_is_the_prompts() -> None:
    assert prompt_tokens_beside(LLAMA, num_decodes=0, decode_context=0, target_s=0.001, floor=1, ceiling=512) == 512


def test_l_m_is_where_the_device_gets_busy() -> None:
    opt = load_profile("opt-13b-a100-80g").entry(1).latency

    assert 450 <= critical_length(opt, longest=2048) <= 550


# Victims.


def test_the_stream_that_can_best_afford_it_gives_way() -> None:
    behind = rank(0, 0, ahead_s=-0.1, recompute_s=0.1)
    costly = rank(0, 0, ahead_s=1.0, recompute_s=2.0)
    ahead = rank(0, 0, ahead_s=1.0, recompute_s=0.1)
    often = rank(MAX_PREEMPTIONS, 0, ahead_s=9.0, recompute_s=0.1)
    unimportant = rank(0, 1, ahead_s=-5.0, recompute_s=3.0)

    assert sorted([ahead, behind, costly, often, unimportant]) == [often, costly, behind, ahead, unimportant]


def test_a_stream_is_ahead_by_what_its_tokens_had_time_for() -> None:
    assert ahead_s(num_tokens=10, tpot_s=0.1, since_first_s=0.4) == pytest.approx(0.6)


# Hints.


@law
@given(st.dictionaries(st.sampled_from([TTFT, TPOT, PRIORITY, "other"]), st.one_of(
    st.floats(), st.integers(), st.booleans(), st.sampled_from(["", "5", " 7 ", "-1e400", "nan", "soon"]), st.none(),
    st.lists(st.integers(), max_size=2),
)))  # fmt: skip
def test_whatever_a_client_says_becomes_a_sane_promise(values: dict[str, object]) -> None:
    taken, touched = clean(values)
    hints = hints_of(taken, ttft_s=2.0, tpot_s=0.1)

    assert all(BOUNDS[name][0] <= value <= BOUNDS[name][1] for name, value in taken.items())
    assert set(touched) <= set(values) & set(BOUNDS)
    assert 0.001 <= hints.ttft_s <= 3600 and 0.001 <= hints.tpot_s <= 60 and -100 <= hints.priority <= 100


def test_hints_are_taken_clamped_or_ignored_and_that_is_told() -> None:
    assert clean({TTFT: 250, TPOT: "40", PRIORITY: 1}) == ({TTFT: 250, TPOT: 40.0, PRIORITY: 1}, {})
    assert clean({TTFT: -5, TPOT: "soon"}) == ({TTFT: 1.0}, {TTFT: "clamped", TPOT: "ignored"})
    assert hints_of({}, ttft_s=2.0, tpot_s=0.1).ttft_s == 2.0


# Step times that are learned.


def random_work(rng: random.Random, kind: str) -> StepWork:
    prompts = [(0, rng.randint(16, 1500)) for _ in range(rng.randint(1, 3))] if kind != "decode" else []
    decodes = [(rng.randint(10, 4000), 1) for _ in range(rng.randint(1, 90))] if kind != "prefill" else []
    return work_of([*prompts, *decodes])


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_step_times_are_learned_from_nothing(noise: float) -> None:
    rng, times = random.Random(1), StepTimes()
    assert times.model() is None
    for _ in range(600):
        for kind in ("prefill", "decode", "mixed"):
            work = random_work(rng, kind)
            times.add(work, LLAMA.step_s(work) * math.exp(rng.gauss(0, noise)))
    learned = times.model()
    assert learned is not None

    for kind in ("prefill", "decode", "mixed"):
        for _ in range(50):
            work = random_work(rng, kind)
            assert learned.step_s(work) == pytest.approx(LLAMA.step_s(work), rel=0.06 + 2 * noise)
    truth = critical_length(LLAMA, longest=2048)
    assert critical_length(learned, longest=2048) == pytest.approx(truth, rel=0.05 if not noise else 0.35)


def test_a_profile_is_corrected_by_what_is_measured() -> None:
    rng, times = random.Random(2), StepTimes(LLAMA)
    work = random_work(rng, "prefill")
    assert times.model().step_s(work) == LLAMA.step_s(work)  # type: ignore[union-attr]
    for number in range(3 * MIN_STEPS):
        for kind, factor in (("prefill", 10.0), ("decode", 11.0), ("mixed", 9.0)):
            step = random_work(rng, kind)
            stalled = 40.0 if number % 10 == 0 else 1.0  # a machine that stands still now and then
            times.add(step, factor * stalled * LLAMA.step_s(step))
    corrected = times.model()
    assert corrected is not None

    for kind, factor in (("prefill", 10.0), ("decode", 11.0), ("mixed", 9.0)):
        step = random_work(rng, kind)
        assert corrected.step_s(step) == pytest.approx(factor * LLAMA.step_s(step), rel=0.03)


def test_nonsense_times_are_not_learned() -> None:
    times = StepTimes()
    for _ in range(100):
        times.add(work_of([(0, 100)]), -1.0)
        times.add(work_of([(0, 100)]), math.nan)
        times.add(work_of([]), 1.0)

    assert times.model() is None
    assert times.count("prefill") == 0


@law
@given(st.integers(0, 10**6))
def test_a_learned_model_never_predicts_negative_times(seed: int) -> None:
    rng, times = random.Random(seed), StepTimes()
    for _ in range(40):
        kind = rng.choice(["prefill", "decode", "mixed"])
        times.add(random_work(rng, kind), rng.uniform(0.001, 0.5))
    learned = times.model()

    if learned is not None:
        regimes: list[Regime] = [*learned.prefill, *learned.decode, *learned.mixed]
        assert all(
            min(r.constant_s, r.per_token_s, r.per_area_s, r.per_decode_s, r.per_context_s) >= 0 for r in regimes
        )
        assert isinstance(learned, LatencyModel)
