"""An emulated engine's scheduler decides what the real engine's decides: which requests run in each step, how many
tokens each computes, into which blocks, and who is preempted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.vllm.emulated import Engine, tiny_llama_profile
from tests.vllm.traces import Trace, flags_of, traces

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
TRACES = traces()


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Of the tiny Llama that the real engine runs."""
    return tiny_llama_profile(tmp_path, 1)


def run_real(numbers: list[int], folder: Path) -> dict[str, Any]:
    """Run traces on the real engine, in a process of its own."""
    result = folder / "decisions.json"
    command = [sys.executable, "-m", "tests.vllm.traces", str(result), *map(str, numbers)]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(result.read_text(encoding="utf-8")))


def run_emulated(trace: Trace, profile: Path) -> dict[str, Any]:
    engine = Engine(flags_of(trace, "--emulate", str(profile), "--dilation", "0"))
    result = trace.run(engine)
    engine.stop()
    return result


def is_what_it_should_be(trace: Trace, result: dict[str, Any]) -> bool:
    """Whether a trace has come to the situations that it is there for."""
    decisions = result["decisions"]
    lengths = {str(index): len(arrival.prompt) for index, arrival in enumerate(trace.arrivals)}
    chunked = any(
        dict(map(tuple, decision["tokens"]))[name] < lengths[name] - saved
        for decision in decisions
        for name, saved in decision["new"]
    )
    return (
        (not trace.preempts or any(decision["preempted"] for decision in decisions))
        and (not trace.hits or any(saved for decision in decisions for _, saved in decision["new"]))
        and (not trace.chunks or chunked)
    )


def test_decisions_equal_those_of_the_real_engine(profile: Path, tmp_path: Path) -> None:
    numbers = [0, 2]

    real = run_real(numbers, tmp_path)

    for number in numbers:
        assert is_what_it_should_be(TRACES[number], real[str(number)])
        assert run_emulated(TRACES[number], profile) == real[str(number)]


@pytest.mark.full
def test_decisions_equal_those_of_the_real_engine_on_all_traces(profile: Path, tmp_path: Path) -> None:
    begun_s = time.monotonic()
    real = run_real(list(range(len(TRACES))), tmp_path)
    real_s = time.monotonic() - begun_s
    results = [run_emulated(trace, profile) for trace in TRACES]
    emulated_s = time.monotonic() - begun_s - real_s
    equal = [result == real[str(number)] for number, result in enumerate(results)]
    decisions = [decision for result in results for decision in result["decisions"]]
    print(
        f"\n{sum(equal)} of {len(TRACES)} traces agree in all {len(decisions)} steps, with "
        f"{sum(len(decision['preempted']) for decision in decisions)} preemptions; "
        f"real {real_s:.0f} s, emulated {emulated_s:.0f} s"
    )
    assert all(equal), [number for number, same in enumerate(equal) if not same]
    assert [number for number, trace in enumerate(TRACES) if not is_what_it_should_be(trace, results[number])] == []
