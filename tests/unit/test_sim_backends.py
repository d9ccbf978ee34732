"""The compiled simulator gives what the readable one gives, event for event and to the last bit, on anything that can
be simulated. Compiling takes some seconds after each change of the kernel; the result is kept on disk."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests.unit.sim_cases import systems, workloads
from vllm_disagg.errors import ConfigError
from vllm_disagg.sim import run as run_module
from vllm_disagg.sim.check import check_run
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.run import simulate
from vllm_disagg.sim.system import System
from vllm_disagg.sim.workload import Workload


def differences(first: Outcome, second: Outcome) -> list[str]:
    pairs = {field.name: (getattr(first, field.name), getattr(second, field.name)) for field in fields(Outcome)}
    return [name for name, (a, b) in pairs.items() if not np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(systems(), workloads())
def test_both_give_the_same_events_and_nothing_impossible_happens(system: System, workload: Workload) -> None:
    pytest.importorskip("numba")
    reference = simulate(system, workload, log=True, backend="reference")
    compiled = simulate(system, workload, log=True, backend="compiled")

    check_run(system, workload, reference)
    assert differences(reference, compiled) == []


def test_without_numba_the_readable_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "has_numba", lambda: False)
    from tests.unit.sim_cases import engine, fixed

    system, workload = System(decode=(engine(),)), fixed(10, 3, num=5)

    assert len(simulate(system, workload)) == 5
    with pytest.raises(ConfigError, match=r"vllm-disagg\[sim\]"):
        simulate(system, workload, backend="compiled")
    with pytest.raises(ConfigError, match="auto, compiled or reference"):
        simulate(system, workload, backend="quick")  # type: ignore[arg-type]
