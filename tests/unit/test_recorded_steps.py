"""The log of an engine's steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_disagg.errors import ConfigError
from vllm_disagg.profiler.steps import RecordedStep, cycles_s, read_steps


def step(at_s: float, *requests: tuple[int, int], step_s: float = 0.1) -> RecordedStep:
    return RecordedStep(at_s=at_s, step_s=step_s, requests=requests)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    steps = [step(1.5, (0, 64)), step(1.75, (64, 1), (0, 7), step_s=0.25)]
    file = tmp_path / "steps"
    file.write_text("".join(item.line() for item in steps))

    assert read_steps(file) == steps


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path: Path) -> None:
    file = tmp_path / "steps"
    file.write_text(step(1.0, (0, 8)).line() + "[2.0,0.1,[[8,")

    assert read_steps(file) == [step(1.0, (0, 8))]


def test_an_error_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "steps"
    file.write_text(step(1.0, (0, 8)).line() + '{"a": 1}\n')

    with pytest.raises(ConfigError, match=r"steps:2: expected"):
        read_steps(file)


def test_a_cycle_lasts_until_the_next_launch_unless_the_engine_had_nothing_to_do() -> None:
    prompt, token, another = step(1.0, (0, 8)), step(1.125, (8, 1), (0, 5)), step(7.0, (0, 9))

    assert cycles_s([prompt, token, another]) == [(prompt, 0.125)]
