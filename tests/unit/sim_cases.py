"""Small systems and workloads that the simulator's tests share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.link import Link
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.sim.arrivals import Arrivals
from vllm_disagg.sim.check import check_run
from vllm_disagg.sim.lengths import FixedLengths, fit_lengths, make_workload
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.run import Backend, simulate
from vllm_disagg.sim.system import EngineSpec, Policy, System
from vllm_disagg.sim.workload import Workload, as_ints

LATENCY = LatencyModel(
    prefill=(Regime(constant_s=0.010, per_token_s=0.0002, per_area_s=1e-8, per_prefill_s=0.0003),),
    decode=(
        Regime(up_to=6, constant_s=0.012, per_decode_s=0.0004, per_context_s=1e-6),
        Regime(constant_s=0.009, per_decode_s=0.0009, per_context_s=1e-6),
    ),
)
MIXED = LatencyModel(
    prefill=LATENCY.prefill,
    decode=LATENCY.decode,
    mixed=(Regime(constant_s=0.011, per_token_s=0.0002, per_area_s=1e-8, per_decode_s=0.0005, per_context_s=1e-6),),
)


def engine(**changes: Any) -> EngineSpec:
    values: dict[str, Any] = {"latency": LATENCY, "kv_tokens": 4096, "max_num_batched_tokens": 256, "max_num_seqs": 16}
    return EngineSpec(**values | changes)


def fixed(prompt: int, output: int, *, num: int = 100, rate: float = 1.0, seed: int = 0, cv: float = 1.0) -> Workload:
    lengths = FixedLengths(prompt_tokens=prompt, output_tokens=output)
    return make_workload(lengths, num_requests=num, rate=rate, seed=seed, arrivals=Arrivals(cv=cv))


def run(system: System, workload: Workload, backend: Backend = "reference") -> Outcome:
    """Simulate with a log, and check what has to hold in every run."""
    outcome = simulate(system, workload, log=True, backend=backend)
    check_run(system, workload, outcome)
    return outcome


_rules = st.builds(
    Rules,
    prefill_order=st.sampled_from(["fcfs", "fcfs", "sjf", "edf"]),
    batch_tokens=st.sampled_from([0, 40, 120]),
    backlog=st.booleans(),
    held_share=st.sampled_from([0.3, 0.9]),
    patience_s=st.sampled_from([0.2, 30.0]),
    slo_ttft_s=st.sampled_from([0.1, 2.0]),
    slo_tpot_s=st.sampled_from([0.02, 0.1]),
)


def _engines(*policies: Policy) -> st.SearchStrategy[EngineSpec]:
    return st.builds(
        engine,
        latency=st.sampled_from([LATENCY, MIXED]),
        kv_tokens=st.sampled_from([300, 700, 4096]),
        block_size=st.sampled_from([1, 16]),
        pp=st.integers(1, 3),
        policy=st.sampled_from(["chunked", "whole", "prefill_first", *policies * 3]),
        rules=_rules,
        max_num_batched_tokens=st.sampled_from([24, 64, 256]),
        max_num_seqs=st.sampled_from([1, 4, 16]),
        prefix_cache=st.booleans(),
        watermark=st.sampled_from([0.0, 0.1]),
        step_overhead_s=st.sampled_from([0.0, 0.002]),
        request_overhead_s=st.sampled_from([0.0, 0.0001]),
        hop_s=st.sampled_from([0.0, 0.001]),
    )


@st.composite
def systems(draw: st.DrawFn) -> System:
    """Anything that can be simulated."""
    phase = draw(st.sampled_from(["both", "both", "both", "prefill", "decode"]))
    prefill = tuple(draw(st.lists(_engines("prefill"), max_size=3))) if phase == "both" else ()
    others = _engines("prefill" if phase == "prefill" else "decode")
    return System(
        prefill=prefill,
        decode=tuple(draw(st.lists(others, min_size=1, max_size=3))),
        link=draw(st.sampled_from([Link(bytes_per_s=float("inf")), Link(bytes_per_s=2e4, latency_s=0.003)])),
        prefill_ends=draw(st.sampled_from([None, (0,) * len(prefill)])),
        kv_bytes_per_token=draw(st.sampled_from([0, 10])),
        handoff_s=draw(st.sampled_from([0.0, 0.004])),
        dispatch_s=draw(st.sampled_from([0.0, 0.001])),
        first_token=draw(st.sampled_from(["decode", "prefill"])),
        hold_cap_s=draw(st.sampled_from([0.05, 300.0])),
        pull_timeout_s=draw(st.sampled_from([0.03, 10.0])),
        early_reads=draw(st.booleans()),
        min_split_tokens=draw(st.sampled_from([0, 30])),
        phase=phase,
    )


@st.composite
def workloads(draw: st.DrawFn, max_requests: int = 40) -> Workload:
    """Short mixed requests, some of them too long to be served, some with a common beginning, some at one moment."""
    longest = draw(st.sampled_from([60, 330]))
    pairs = draw(
        st.lists(
            st.tuples(st.integers(1, longest), st.integers(1, 120)),
            min_size=draw(st.sampled_from([2, max_requests // 2])),
            max_size=max_requests,
        )
    )
    lengths = fit_lengths(as_ints([a for a, _ in pairs]), as_ints([b for _, b in pairs]), source="drawn")
    workload = make_workload(
        lengths,
        num_requests=len(pairs),
        rate=draw(st.sampled_from([2.0, 15.0, 100.0, 500.0])),
        seed=draw(st.integers(0, 5)),
        arrivals=Arrivals(cv=draw(st.sampled_from([0.0, 1.0, 2.0]))),
        shared_prefix_tokens=draw(st.sampled_from([0, 0, 40, 64])),
        num_prefixes=draw(st.integers(1, 4)),
    )
    if draw(st.booleans()):
        spare = draw(st.integers(0, 40))
        workload = replace(workload, max_tokens=workload.output_tokens + spare)
    if draw(st.booleans()):
        workload.arrival_s[: len(workload) // 2] = 0.0
    return workload
