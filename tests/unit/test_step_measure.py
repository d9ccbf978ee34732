"""What an engine's own steps teach its scheduler, and what of it outlives the engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vllm_disagg.core.latency import LatencyModel, Regime, work_of
from vllm_disagg.core.scheduling.pace import critical_length
from vllm_disagg.core.steps import read_steps
from vllm_disagg.scheduler.measure import REFRESH_STEPS, Measure, load_model, memory_file, save_model

TRUTH = LatencyModel(
    prefill=(Regime(constant_s=0.02, per_token_s=1e-4),),
    decode=(Regime(constant_s=0.02, per_decode_s=1e-5, per_context_s=1e-7),),
)


def run(measure: Measure, steps: int, *, seed: int = 1) -> None:
    """Steps of prompts and of streams, one after the other."""
    rng, now_s = random.Random(seed), 0.0
    for number in range(steps):
        requests = (
            tuple((0, rng.randint(16, 900)) for _ in range(rng.randint(1, 3)))
            if number % 2
            else tuple((rng.randint(10, 2000), 1) for _ in range(rng.randint(1, 64)))
        )
        step = object()
        measure.scheduled(step, requests, now_s=now_s)
        now_s += TRUTH.step_s(work_of(requests))
        measure.done(step, now_s=now_s)


def test_l_m_is_learned_from_the_first_steps_and_kept_for_the_next_start(tmp_path: Path) -> None:
    memory = tmp_path / "folder" / "known.json"
    first = Measure(profile=None, longest=2048, memory=memory)
    assert first.latency is None and first.batch_tokens is None and not first.trusted

    run(first, 4 * REFRESH_STEPS)
    first.close()
    second = Measure(profile=None, longest=2048, memory=memory)

    expected = critical_length(TRUTH, longest=2048)
    assert first.batch_tokens == pytest.approx(expected, rel=0.1)
    assert second.batch_tokens == pytest.approx(expected, rel=0.1)
    assert second.trusted
    work = work_of([(0, 700), (0, 100)])
    assert second.latency is not None
    assert second.latency.step_s(work) == pytest.approx(TRUTH.step_s(work), rel=0.05)


def test_steps_of_one_size_do_not_say_what_l_m_is(tmp_path: Path) -> None:
    """An L_m made of them might be small, and then no step would ever show that larger ones are worth more."""
    memory = tmp_path / "known.json"
    measure = Measure(profile=None, longest=2048, memory=memory)

    def prompts(number: int, tokens: int, *, begun_s: float) -> None:
        for place in range(number):
            step, now_s = object(), begun_s + place
            measure.scheduled(step, ((0, tokens),), now_s=now_s)
            measure.done(step, now_s=now_s + TRUTH.step_s(work_of([(0, tokens)])))

    prompts(4 * REFRESH_STEPS, 64, begun_s=0.0)
    assert measure.latency is not None and measure.batch_tokens is None
    measure.save()
    assert not memory.exists()

    for place, tokens in enumerate((256, 512, 1024, 2000)):
        prompts(REFRESH_STEPS // 4, tokens, begun_s=1000.0 * (1 + place))
    assert measure.batch_tokens == pytest.approx(critical_length(TRUTH, longest=2048), rel=0.1)


def test_what_was_learned_is_kept_at_once_and_not_only_at_a_proper_end(tmp_path: Path) -> None:
    memory = tmp_path / "known.json"
    measure = Measure(profile=None, longest=2048, memory=memory)
    run(measure, 2 * REFRESH_STEPS)  # and then it is killed

    kept = load_model(memory)
    assert kept is not None and measure.batch_tokens is not None
    assert critical_length(kept, longest=2048) == pytest.approx(measure.batch_tokens, rel=0.1)


def test_what_a_profile_says_is_not_overwritten_by_what_was_learned(tmp_path: Path) -> None:
    memory = tmp_path / "known.json"
    measure = Measure(profile=TRUTH, longest=2048, memory=memory)
    run(measure, 2 * REFRESH_STEPS)
    measure.close()

    assert not memory.exists()
    assert measure.batch_tokens == critical_length(TRUTH, longest=2048)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"prefill": [], "decode": [], "mixed": []}', '{"prefill": 5, "decode": [], "mixed": []}',
        '{"prefill": [{"up_to": 1}], "decode": [{}], "mixed": []}',
        '{"prefill": [{"constant_s": -1}], "decode": [{}], "mixed": []}',
        '{"prefill": [{"other": 1}], "decode": [{}], "mixed": []}',
        '{"prefill": [{"constant_s": NaN}], "decode": [{}], "mixed": []}',
    ],
)  # fmt: skip
def test_a_spoilt_memory_is_as_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "known.json"
    file.write_text(text)

    assert load_model(file) is None
    assert Measure(profile=None, longest=2048, memory=file).latency is None


def test_a_memory_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    save_model(TRUTH, tmp_path / "file" / "known.json")


def test_engines_of_different_kinds_have_different_memories() -> None:
    assert memory_file("model", 1) == memory_file("model", 1) != memory_file("model", 2)


def test_overlapping_steps_count_from_the_end_of_the_one_before(tmp_path: Path) -> None:
    """Two steps in flight: the second one is launched while the first one runs."""
    log = tmp_path / "steps"
    measure = Measure(profile=None, longest=2048, log=log)
    first, second, lost = object(), object(), object()
    measure.scheduled(lost, ((0, 5),), now_s=0.0)  # never ends
    measure.scheduled(first, ((0, 100),), now_s=1.0)
    measure.scheduled(second, ((100, 1),), now_s=1.1)
    measure.scheduled(object(), (), now_s=1.2)  # an empty step is none
    measure.done(first, now_s=1.5)
    measure.done(second, now_s=1.8)
    measure.done(object(), now_s=9.0)  # unknown
    measure.close()

    assert [(step.at_s, round(step.step_s, 6), step.requests) for step in read_steps(log)] == [
        (1.0, 0.5, ((0, 100),)),
        (1.5, 0.3, ((100, 1),)),
    ]


def test_the_planner_fits_its_latency_model_to_a_schedulers_log(tmp_path: Path) -> None:
    fit = pytest.importorskip("vllm_disagg.planner.fit", reason="needs scipy")
    log = tmp_path / "steps"
    measure = Measure(profile=None, longest=2048, log=log)
    run(measure, 400)
    measure.close()

    found = fit.fit_latency([fit.Point(work=work_of(step.requests), seconds=step.step_s) for step in read_steps(log)])

    assert fit.judge(found)[0] == "good"
    for requests in ([(0, 700), (0, 100)], [(0, 2000)], [(500, 1)] * 32):
        assert found.latency.step_s(work_of(requests)) == pytest.approx(TRUTH.step_s(work_of(requests)), rel=0.02)
