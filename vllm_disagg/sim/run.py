"""Run a simulation: compiled where numba is installed, else in plain Python. The results are the same."""

from __future__ import annotations

import importlib.util
from typing import Literal

from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.reference import Simulation
from vllm_disagg.sim.system import System
from vllm_disagg.sim.workload import Workload

Backend = Literal["auto", "compiled", "reference"]


def simulate(system: System, workload: Workload, *, log: bool = False, backend: Backend = "auto") -> Outcome:
    """Serve a workload until its last request has ended.

    Args:
        system: the deployment.
        workload: the requests; in phase `prefill` their output lengths are not used.
        log: whether to keep `Outcome.log`.
        backend: `auto` compiles where numba is there, which comes with vLLM and with the extra `sim`.

    Raises:
        ConfigError: the compiled version was asked for and numba is missing.
    """
    if backend not in ("auto", "compiled", "reference"):
        raise ConfigError(f"the backend must be auto, compiled or reference, not {backend!r}")
    if backend == "reference" or (backend == "auto" and not has_numba()):
        return Simulation(system, workload, log=log).run()
    if not has_numba():
        raise ConfigError("the compiled simulator needs numba: pip install vllm-disagg[sim]")
    from vllm_disagg.sim.fast import run_compiled

    return run_compiled(system, workload, log=log)


def has_numba() -> bool:
    """Whether the compiled version can run."""
    return importlib.util.find_spec("numba") is not None
