"""What a recording engine writes down."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from tests.vllm.emulated import Engine, emulated
from vllm_disagg.errors import ConfigError
from vllm_disagg.profiler.facts import read_facts
from vllm_disagg.profiler.steps import STEPS_ENV, RecordedStep, read_steps
from vllm_disagg.profiles import load_profile

pytestmark = pytest.mark.vllm

RECORDER = ("--distributed-executor-backend", "vllm_disagg.profiler.emulated.RecordingEmulatedExecutor")
WISH = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


def steps_of(engine: Engine, file: Path) -> list[RecordedStep]:
    engine.run([engine.add(range(5000, 5000 + length), WISH) for length in (40, 7)])
    engine.settle()
    engine.stop()
    return read_steps(file)


def test_each_step_is_written_with_what_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEPS_ENV, str(tmp_path / "steps"))

    steps = steps_of(emulated(*RECORDER, "--max-num-batched-tokens", "32"), tmp_path / "steps")

    assert [step.requests for step in steps] == [
        ((0, 32),),
        ((32, 8), (0, 7)),
        ((40, 1), (7, 1)),
        ((41, 1), (8, 1)),
    ]


def test_a_step_lasts_as_long_as_the_device_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEPS_ENV, str(tmp_path / "steps"))

    steps = steps_of(
        Engine(["--emulate", "tiny", "--dilation", "5", "--emulate-host", "shown", *RECORDER]), tmp_path / "steps"
    )

    assert all(step.step_s >= 0.005 for step in steps)  # the profile's least is a millisecond


def test_an_emulated_engine_says_it_is_what_its_profile_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEPS_ENV, str(tmp_path / "steps"))
    engine = emulated(*RECORDER, "--max-model-len", "1024", "--max-num-seqs", "8")
    engine.stop()

    facts, tiny = read_facts(tmp_path / "steps"), load_profile("tiny")
    assert facts is not None and facts.emulated.startswith("emulated tiny")
    assert facts.model == dataclasses.replace(tiny.model, max_model_len=1024)
    assert (facts.device, facts.device_memory_bytes) == (tiny.device, tiny.device_memory_bytes)
    assert 0.98 * tiny.kv_capacity_tokens(1, 1) < facts.kv_capacity_tokens <= tiny.kv_capacity_tokens(1, 1)
    assert facts.max_seqs == 8 and not facts.fills_kv


def test_it_wants_to_know_where_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEPS_ENV, raising=False)

    with pytest.raises(ConfigError, match=STEPS_ENV):
        emulated(*RECORDER)


def test_it_does_not_time_steps_that_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEPS_ENV, str(tmp_path / "steps"))

    with pytest.raises(ConfigError, match="one at a time"):
        emulated(*RECORDER, "--pipeline-parallel-size", "2")
