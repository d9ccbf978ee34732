"""Step times: what a step sums up to, and what each regime charges for it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.core.latency import LatencyModel, Regime, StepWork, work_of

PREFILL = Regime(constant_s=1.0, per_token_s=0.1, per_area_s=0.001, per_prefill_s=0.01)
DECODE = Regime(constant_s=0.5, per_decode_s=0.02, per_context_s=0.003)
MODEL = LatencyModel(prefill=(PREFILL,), decode=(DECODE,))


def test_a_whole_prompt_has_the_area_of_its_square() -> None:
    assert work_of([(0, 7)]) == StepWork(prefill_tokens=7, prefill_area=49, num_prefills=1)


def test_a_later_chunk_also_attends_to_what_came_before() -> None:
    assert work_of([(5, 3)]).prefill_area == 8**2 - 5**2


@given(st.lists(st.integers(2, 50), min_size=1, max_size=8))
def test_the_chunks_of_a_prompt_have_the_area_of_the_whole(chunks: list[int]) -> None:
    starts = [sum(chunks[:index]) for index in range(len(chunks))]

    assert work_of(zip(starts, chunks, strict=True)).prefill_area == sum(chunks) ** 2


def test_one_new_token_counts_as_decoding_and_reads_itself_too() -> None:
    assert work_of([(9, 1), (0, 1)]) == StepWork(num_decodes=2, decode_context=11)


def test_a_request_without_new_tokens_does_nothing() -> None:
    assert work_of([(9, 0)]) == StepWork()


def test_an_empty_step_takes_no_time() -> None:
    assert MODEL.step_s(StepWork()) == 0.0


def test_a_step_of_prompts() -> None:
    assert MODEL.step_s(work_of([(0, 10), (0, 20)])) == pytest.approx(1.0 + 0.1 * 30 + 0.001 * 500 + 0.01 * 2)


def test_one_prompt_alone_is_a_step_of_one_prompt() -> None:
    small = Regime(up_to=20, constant_s=2.0, per_token_s=0.01)
    model = LatencyModel(prefill=(small, PREFILL), decode=(DECODE,))

    for tokens in (0, 1, 2, 20, 21, 3000):
        assert model.prompt_s(tokens) == model.step_s(work_of([(0, tokens)]))


def test_a_step_of_decoding_requests() -> None:
    assert MODEL.step_s(work_of([(9, 1), (19, 1)])) == pytest.approx(0.5 + 0.02 * 2 + 0.003 * 30)


def test_a_mixed_step_reads_the_weights_once() -> None:
    mixed = MODEL.step_s(work_of([(0, 10), (19, 1)]))

    assert mixed == pytest.approx(1.0 + 0.1 * 11 + 0.001 * 100 + 0.01 + 0.003 * 20)
    assert mixed < MODEL.step_s(work_of([(0, 10)])) + MODEL.step_s(work_of([(19, 1)]))


def test_mixed_regimes_replace_the_rule_for_mixed_steps() -> None:
    model = LatencyModel(
        prefill=(PREFILL,),
        decode=(DECODE,),
        mixed=(Regime(up_to=11, constant_s=7.0), Regime(constant_s=8.0, per_decode_s=1.0)),
    )

    assert model.step_s(work_of([(0, 10), (19, 1)])) == 7.0
    assert model.step_s(work_of([(0, 10), (19, 1), (19, 1)])) == 10.0
    assert model.step_s(work_of([(19, 1)])) == MODEL.step_s(work_of([(19, 1)]))


def test_a_regime_holds_up_to_its_limit_inclusive() -> None:
    model = LatencyModel(prefill=(PREFILL,), decode=(Regime(up_to=2, constant_s=1.0), Regime(constant_s=5.0)))

    assert [model.step_s(StepWork(num_decodes=batch)) for batch in (1, 2, 3)] == [1.0, 1.0, 5.0]


def test_prefill_regimes_go_by_new_tokens() -> None:
    model = LatencyModel(prefill=(Regime(up_to=16, constant_s=1.0), Regime(constant_s=5.0)), decode=(DECODE,))

    assert model.step_s(work_of([(0, 16)])) == 1.0
    assert model.step_s(work_of([(0, 8), (0, 9)])) == 5.0


def test_a_fit_that_goes_below_zero_is_cut_off_there() -> None:
    model = LatencyModel(prefill=(Regime(constant_s=1.0, per_area_s=-1.0),), decode=(Regime(per_decode_s=-1.0),))

    assert model.step_s(work_of([(0, 10)])) == 0.0
    assert model.step_s(work_of([(9, 1)])) == 0.0


@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 2000)), max_size=20),
    st.integers(0, 4000),
    st.integers(1, 2000),
)
def test_more_work_never_takes_less_time(step: list[tuple[int, int]], computed: int, new: int) -> None:
    longer = MODEL.step_s(work_of([*step, (computed, new)]))

    assert math.isfinite(longer)
    assert longer >= MODEL.step_s(work_of(step))
