"""When an emulated device is done with its steps."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_disagg.emulation.clock import DeviceClock, wait_until

steps_of = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=30)


def test_a_step_takes_its_time_and_the_next_waits_for_it() -> None:
    clock = DeviceClock()

    assert clock.launch(2.0, 10.0) == 12.0
    assert clock.launch(1.0, 11.0) == 13.0
    assert clock.launch(1.0, 20.0) == 21.0


def test_a_hidden_host_delays_no_step_that_goes_on() -> None:
    clock = DeviceClock(hides_host=True)

    assert clock.launch(2.0, 10.0) == 12.0
    assert clock.launch(2.0, 12.5, goes_on=True) == 14.0
    assert clock.launch(1.0, 14.5, goes_on=False) == 15.5  # the engine was idle
    assert clock.launch(1.0, 19.0, goes_on=True) == 19.0  # the host needed 3.5, of which a step of 1 hides 1
    assert DeviceClock().launch(1.0, 5.0, goes_on=True) == 6.0


def test_stages_work_on_different_steps_at_once() -> None:
    clock = DeviceClock(num_stages=2)

    ends = [clock.launch(2.0, 0.0) for _ in range(4)]

    assert ends == [2.0, 3.0, 4.0, 5.0]


def test_a_long_step_holds_up_those_behind_it() -> None:
    clock = DeviceClock(num_stages=2)

    assert [clock.launch(seconds, 0.0) for seconds in (2.0, 8.0, 2.0)] == [2.0, 9.0, 10.0]


def test_dilation_stretches_steps_and_overheads() -> None:
    assert DeviceClock(dilation=5.0, overhead_s=0.5).launch(1.5, 0.0) == 10.0
    assert DeviceClock(dilation=0.0, overhead_s=0.5).launch(1.5, 3.0) == 3.0


@settings(deadline=None)
@given(steps=steps_of, num_stages=st.integers(1, 4), jitter=st.floats(0, 1))
def test_steps_end_in_the_order_of_their_launch_and_never_before(
    steps: list[tuple[float, float]], num_stages: int, jitter: float
) -> None:
    clock = DeviceClock(num_stages=num_stages, jitter=jitter)
    now_s, ends = 0.0, []
    for gap_s, step_s in steps:
        now_s += gap_s
        ends.append(clock.launch(step_s, now_s))
        assert ends[-1] >= now_s

    assert all(first <= second for first, second in itertools.pairwise(ends))


@settings(deadline=None)
@given(steps=steps_of, num_stages=st.integers(1, 4), dilation=st.floats(0.1, 20))
def test_a_dilated_run_is_the_same_run_slower(
    steps: list[tuple[float, float]], num_stages: int, dilation: float
) -> None:
    plain, slow, now_s = DeviceClock(num_stages=num_stages), DeviceClock(num_stages=num_stages, dilation=dilation), 0.0
    for gap_s, step_s in steps:
        now_s += gap_s

        assert slow.launch(step_s, now_s * dilation) == pytest.approx(plain.launch(step_s, now_s) * dilation)


def test_jitter_keeps_the_mean_and_has_the_spread_asked_for() -> None:
    clock = DeviceClock(jitter=0.3, seed=4)
    lengths = [clock.launch(1.0, 100.0 * index) - 100.0 * index for index in range(4000)]

    assert statistics.fmean(lengths) == pytest.approx(1.0, abs=0.02)
    assert statistics.stdev(map(math.log, lengths)) == pytest.approx(0.3, abs=0.02)


def test_a_seed_repeats_its_jitter_and_another_does_not() -> None:
    one, same, other = (DeviceClock(jitter=0.1, seed=seed) for seed in (1, 1, 2))
    lengths = [[clock.launch(1.0, 0.0) for _ in range(5)] for clock in (one, same, other)]

    assert lengths[0] == lengths[1] != lengths[2]


def test_waiting_for_what_is_over_tells_by_how_much() -> None:
    assert wait_until(-math.inf) == math.inf
