"""Laws of the order in which waiting prompts are computed, and of what a step packs."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_disagg.core.latency import work_of
from vllm_disagg.core.queueing import one_device_s
from vllm_disagg.core.scheduling.order import AGEING, Policy, Prompt, on_time, order
from vllm_disagg.core.scheduling.pace import critical_length
from vllm_disagg.core.scheduling.packing import MAX_PASSES, backlog_limit, even_limit, pack
from vllm_disagg.profiles import load_profile

law = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
POLICIES: tuple[Policy, ...] = ("fcfs", "sjf", "edf")

prompts = st.lists(
    st.builds(
        Prompt,
        arrived_s=st.floats(0, 50),
        run_s=st.floats(0.001, 5),
        deadline_s=st.one_of(st.just(math.inf), st.floats(0, 100)),
        priority=st.integers(-2, 2),
    ),
    max_size=12,
)


@law
@given(prompts, st.sampled_from(POLICIES), st.floats(50, 100), st.floats(1, 100))
def test_nobody_is_lost_and_nobody_goes_twice(
    waiting: list[Prompt], policy: Policy, now_s: float, patience_s: float
) -> None:
    assert sorted(order(waiting, policy, now_s=now_s, patience_s=patience_s)) == list(range(len(waiting)))


@law
@given(prompts, st.sampled_from(POLICIES), st.floats(50, 100), st.floats(1, 60))
def test_who_has_waited_long_enough_is_overtaken_by_nobody_who_came_later(
    waiting: list[Prompt], policy: Policy, now_s: float, patience_s: float
) -> None:
    line = [waiting[place] for place in order(waiting, policy, now_s=now_s, patience_s=patience_s)]

    for ahead, behind in itertools.combinations(line, 2):
        if now_s - behind.arrived_s >= patience_s:
            assert ahead.arrived_s <= behind.arrived_s


@law
@given(prompts, st.floats(50, 100))
def test_fcfs_goes_by_arrival_within_a_priority(waiting: list[Prompt], now_s: float) -> None:
    line = [waiting[place] for place in order(waiting, "fcfs", now_s=now_s, patience_s=1e9)]

    assert [(p.priority, p.arrived_s) for p in line] == sorted((p.priority, p.arrived_s) for p in line)


@law
@given(prompts, st.floats(50, 100))
def test_ageing_bounds_who_may_overtake_in_sjf(waiting: list[Prompt], now_s: float) -> None:
    line = [waiting[place] for place in order(waiting, "sjf", now_s=now_s, patience_s=1e9)]

    for ahead, behind in itertools.combinations(line, 2):
        if ahead.priority == behind.priority and ahead.arrived_s > behind.arrived_s:
            assert ahead.arrived_s - behind.arrived_s <= (behind.run_s - ahead.run_s) / AGEING + 1e-9


def met(waiting: list[Prompt], line: tuple[int, ...], now_s: float) -> int:
    """How many meet their deadline when run one after the other."""
    number, end_s = 0, now_s
    for place in line:
        end_s += waiting[place].run_s
        number += waiting[place].deadline_s != math.inf and end_s <= waiting[place].deadline_s
    return number


@law
@given(
    st.lists(
        st.builds(
            Prompt,
            arrived_s=st.just(0.0),
            run_s=st.integers(1, 9).map(float),
            deadline_s=st.integers(1, 25).map(float),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_edf_meets_as_many_deadlines_as_any_order_could(waiting: list[Prompt]) -> None:
    best = max(met(waiting, line, 0.0) for line in itertools.permutations(range(len(waiting))))

    assert met(waiting, tuple(order(waiting, "edf", now_s=0.0, patience_s=1e9)), 0.0) == best
    assert len(on_time(waiting, now_s=0.0)) == best


def test_edf_lets_one_long_prompt_wait_rather_than_three_short_ones() -> None:
    long = Prompt(arrived_s=0, run_s=1.0, deadline_s=1.05)
    short = [Prompt(arrived_s=0.1, run_s=0.1, deadline_s=0.5 + 0.1 * n) for n in range(3)]

    assert order([long, *short], "edf", now_s=0.1, patience_s=10) == [1, 2, 3, 0]
    assert order([long, *short], "fcfs", now_s=0.1, patience_s=10) == [0, 1, 2, 3]
    assert order([long, *short], "edf", now_s=10.0, patience_s=10)[0] == 0  # its patience is over


# What a step packs.

lengths = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 200)), max_size=20)


@law
@given(lengths, st.integers(1, 2048), st.integers(0, 400), st.integers(0, MAX_PASSES + 1))
def test_budgets_hold_and_nothing_that_fits_is_left_out(
    waiting: list[tuple[int, int]], limit: int, free: int, passes: int
) -> None:
    packed = pack(waiting, limit_tokens=limit, free_blocks=free, passes=passes)
    chosen = [waiting[place] for place in packed.chosen]
    tokens, blocks = sum(item[0] for item in chosen), sum(item[1] for item in chosen)

    assert list(packed.chosen) == sorted(set(packed.chosen))
    assert blocks <= free
    assert tokens <= max(limit, chosen[0][0] if chosen else 0)
    if waiting and waiting[0][1] <= free:
        assert packed.chosen[0] == 0  # the first one always goes if there is memory
    elif waiting:
        assert packed.head_passed == bool(chosen)
        assert not chosen or passes < MAX_PASSES
    if chosen:
        left = [waiting[place] for place in range(len(waiting)) if place not in packed.chosen]
        assert not any(item[0] <= limit - tokens and item[1] <= free - blocks for item in left)


def test_a_longer_prompt_than_l_m_goes_alone() -> None:
    assert pack([(900, 1), (10, 1)], limit_tokens=512, free_blocks=9).chosen == (0,)


def test_short_prompts_fill_what_a_long_one_leaves() -> None:
    assert pack([(300, 1), (400, 1), (100, 1), (112, 1)], limit_tokens=512, free_blocks=9).chosen == (0, 2, 3)


@law
@given(st.data())
def test_the_kth_in_line_runs_within_k_steps(data: Any) -> None:
    """First come first served: passing fills steps, and never makes anybody wait longer."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    line = [(number, rng.randint(1, 1500)) for number in range(rng.randint(1, 30))]
    begun: dict[int, int] = {}
    following = len(line)
    for step in itertools.count(1):
        if not line:
            break
        packed = pack([(tokens, 1) for _, tokens in line], limit_tokens=512, free_blocks=10**6)
        for place in packed.chosen:
            begun[line[place][0]] = step
        line = [item for place, item in enumerate(line) if place not in packed.chosen]
        if step < 20:
            line.append((following, rng.randint(1, 100)))  # short ones keep coming
            following += 1

    assert all(step <= number + 1 for number, step in begun.items())


def test_a_prompt_that_finds_no_memory_is_passed_for_a_bounded_number_of_steps() -> None:
    """Short prompts keep coming, each holds its blocks for two steps, and the big one needs all of them."""
    total, big = 10, (100, 10)
    held: list[tuple[int, int]] = []  # until which step, how many blocks
    passes = 0
    for step in range(100):
        held = [item for item in held if item[0] > step]
        free = total - sum(blocks for _, blocks in held)
        packed = pack([big, (50, 6)], limit_tokens=512, free_blocks=free, passes=passes)
        if 0 in packed.chosen:
            assert step <= MAX_PASSES + 2
            return
        passes += packed.head_passed
        held += [(step + 2, 6) for place in packed.chosen if place]
        if not held:
            held.append((step + 2, 1))
    pytest.fail("it starved")


@law
@given(st.integers(1, 10**5), st.integers(1, 4096), st.integers(1, 8))
def test_steps_of_a_pipeline_are_as_equal_as_they_can_be(total: int, limit: int, stages: int) -> None:
    even = even_limit(total, limit_tokens=limit, stages=stages)

    assert even <= limit
    assert -(-total // even) == -(-total // limit)  # not one step more
    if stages > 1 and total > limit:
        assert total - even * (total // even) == 0 or even - total % even < -(-total // even)


@law
@given(st.integers(0, 100_000), st.integers(1, 2048), st.integers(0, 8192), st.integers(1, 4))
def test_a_long_line_gets_larger_steps(waiting: int, limit: int, more: int, stages: int) -> None:
    found = backlog_limit(waiting, limit, limit + more, stages)

    assert limit <= found <= limit + more
    assert found == limit if waiting <= 3 * limit else found <= waiting  # what three steps hold is no long line
    assert found <= backlog_limit(waiting + 100, limit, limit + more, stages)


def test_a_long_line_waits_less_in_larger_steps() -> None:
    """Prompts of 16 tokens on an A100: how long they wait for their first tokens on average, as the limit says and with
    other sizes of a step."""
    latency = load_profile("llama-3-8b-a100-80g").entry(1).latency
    limit = critical_length(latency, longest=2048)

    def mean_wait_s(count: int, size: int) -> float:
        steps = [min(size, count - first) for first in range(0, count, size)]
        ends = itertools.accumulate(latency.step_s(work_of([(0, 16)] * step)) for step in steps)
        return sum(step * end_s for step, end_s in zip(steps, ends, strict=True)) / count

    for count in (200, 400, 800):
        found = mean_wait_s(count, backlog_limit(16 * count, limit, 8192, 1) // 16)
        assert found < mean_wait_s(count, limit // 16)
        assert found < 1.02 * min(mean_wait_s(count, size) for size in range(8, 200))


def test_fcfs_one_at_a_time_waits_as_the_formula_says() -> None:
    """M/D/1 (DistServe's equation 1): mean time to first token, within 1 %."""
    d_s, rate, rng = 0.1, 7.0, random.Random(5)
    now_s, arrived, free_s, total_s, number = 0.0, [], 0.0, 0.0, 150_000
    for _ in range(number):
        now_s += rng.expovariate(rate)
        arrived.append(now_s)
    waiting: list[Prompt] = []
    following = 0
    while following < number or waiting:
        if not waiting:
            free_s = max(free_s, arrived[following])
        while following < number and arrived[following] <= free_s:
            waiting.append(Prompt(arrived_s=arrived[following], run_s=d_s))
            following += 1
        line = order(waiting, "fcfs", now_s=free_s, patience_s=math.inf)
        (chosen,) = pack([(512, 1) for _ in line], limit_tokens=512, free_blocks=10**9).chosen
        free_s += d_s
        total_s += free_s - waiting.pop(line[chosen]).arrived_s

    assert total_s / number == pytest.approx(one_device_s(d_s, rate), rel=0.01)
