"""The simulator against our schedulers over vLLM's own: the same requests, in virtual time, request by request.

vLLM's EngineCore, scheduler and block pool and our connector are real; a step takes what the profile says
(`benchmarks/schedulers_virtual.py`). The simulator is given the same engines. Whatever it does not model shows as a
token at another time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from benchmarks.load import Request, Times
from benchmarks.schedulers import BLOCK_SIZE, LATENCY, Row
from benchmarks.schedulers_virtual import HANDOFF_S, Deployment, Device
from tests.unit.sim_cases import run
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.system import EngineSpec, Policy, System
from vllm_disagg.sim.workload import Floats, Workload, as_ints

pytestmark = pytest.mark.vllm

EXACT_S = 1e-6
"""Two clocks that add up the same steps."""

PLAIN = ("--no-enable-prefix-caching",)
"""What a preempted request has left in its own prefix cache is not simulated."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        rows: arrival, prompt tokens and output tokens of each request.
        prefill, decode: flags of the engines.
        split: over both, or on the decode instance alone.
        scheduling: `--kv-scheduling`.
        early: whether a busy decode instance begins to fetch when a request arrives.
    """

    rows: Sequence[tuple[float, int, int]]
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    split: bool = True
    scheduling: str = "phase"
    early: bool = False


def served(case: Case, folder: Path) -> tuple[Floats, Floats, int, System]:
    """By the real schedulers: TTFT, end, preemptions; and the system as the simulator knows it."""
    rng = np.random.default_rng(7)
    requests = [
        Request(at_s=at_s, prompt=tuple(rng.integers(5000, 27000, prompt).tolist()), num_output_tokens=output)
        for at_s, prompt, output in case.rows
    ]
    row = Row(
        name="case", what="", requests=lambda _: requests, figures=lambda *_: {}, warm=lambda _: [],
        flags=lambda role, _: [], both_flags=(),
    )  # fmt: skip
    flags = {"prefill": (*PLAIN, *case.prefill), "decode": (*PLAIN, *case.decode)}
    deployment = Deployment(row, case.scheduling, folder, flags, early=case.early)
    try:
        times = deployment.run(requests, split=case.split)
        system = system_of(case, deployment)
        preempted = sum(
            len(decision.preempted)
            for device in (deployment.prefill, deployment.decode)
            for decision in device.engine.decisions
        )
    finally:
        deployment.stop()
    return first_tokens(times), ends(times), preempted, system


def first_tokens(times: Sequence[Times]) -> Floats:
    return np.array([item.token_times_s[0] for item in times])


def ends(times: Sequence[Times]) -> Floats:
    return np.array([item.token_times_s[-1] for item in times])


def system_of(case: Case, deployment: Deployment) -> System:
    def engine(device: Device, policy: Policy) -> EngineSpec:
        scheduler = device.engine.scheduler
        settings = scheduler.settings
        return EngineSpec(
            latency=LATENCY,
            kv_tokens=(scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1) * BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            policy=policy,
            rules=Rules(
                prefill_order=settings.prefill_order,
                batch_tokens=getattr(scheduler, "batch_tokens", 0),
                backlog=not settings.batch_tokens,
                held_share=settings.held_share,
                patience_s=settings.patience_s,
                slo_ttft_s=settings.slo_ttft_s,
                slo_tpot_s=settings.slo_tpot_s,
            ),
            max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
            max_num_seqs=scheduler.max_num_active_reqs,
        )

    ours = case.scheduling == "phase"
    return System(
        prefill=(engine(deployment.prefill, "prefill" if ours else "chunked"),) if case.split else (),
        decode=(engine(deployment.decode, "decode" if ours else "chunked"),),
        handoff_s=HANDOFF_S,
        early_reads=case.early,
        hold_cap_s=6000.0,
    )


def simulated(case: Case, system: System) -> Outcome:
    at_s, prompt, output = zip(*case.rows, strict=True)
    workload = Workload(
        arrival_s=np.array(at_s), prompt_tokens=as_ints(prompt), output_tokens=as_ints(output), rate=1.0,
        source="by hand", max_tokens=as_ints(output),
    )  # fmt: skip
    return run(system, workload)


def mixed(num: int, rate: float, prompts: tuple[int, int], outputs: tuple[int, int], seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.exponential(1 / rate, num))
    return [(float(at), int(rng.integers(*prompts)), int(rng.integers(*outputs))) for at in at_s]


CASES = {
    "prefill, as they came": Case(rows=mixed(40, 12.0, (40, 1500), (2, 6))),
    "prefill, short ones first": Case(
        rows=mixed(40, 25.0, (40, 1500), (2, 6)), prefill=("--kv-prefill-order", "sjf", "--kv-patience-s", "0.5")
    ),
    "prefill, by deadline": Case(
        rows=mixed(40, 25.0, (40, 1500), (2, 6)), prefill=("--kv-prefill-order", "edf", "--kv-slo-ttft-s", "0.3")
    ),
    "prefill, longer than a step": Case(
        rows=mixed(24, 12.0, (40, 1900), (2, 6)), prefill=("--max-num-batched-tokens", "512")
    ),
    "prefill, held KV at its share": Case(
        rows=mixed(30, 25.0, (100, 900), (20, 60)),
        prefill=("--num-gpu-blocks-override", "200", "--kv-held-share", "0.4"),
        decode=("--num-gpu-blocks-override", "180"),
    ),
    "decode, room for all": Case(rows=mixed(40, 20.0, (40, 400), (20, 90))),
    "decode, admitted by growth": Case(
        rows=mixed(40, 30.0, (40, 300), (40, 200)), decode=("--num-gpu-blocks-override", "160")
    ),
    "decode, few run slots": Case(rows=mixed(30, 30.0, (40, 300), (20, 60)), decode=("--max-num-seqs", "4")),
    "decode, prompts beside streams": Case(
        rows=mixed(30, 10.0, (40, 1500), (30, 120)), split=False, decode=("--kv-slo-tpot-s", "0.03")
    ),
    "decode, prompts and little memory": Case(
        rows=mixed(40, 20.0, (40, 500), (40, 200)), split=False,
        decode=("--kv-slo-tpot-s", "0.03", "--num-gpu-blocks-override", "140"),
    ),
    "decode, early reads": Case(rows=mixed(40, 20.0, (40, 400), (20, 90)), early=True),
    "vLLM's own": Case(rows=mixed(30, 20.0, (40, 900), (20, 60)), scheduling="vllm"),
    "vLLM's own, little memory": Case(
        rows=mixed(40, 30.0, (40, 300), (40, 200)), decode=("--num-gpu-blocks-override", "160"), scheduling="vllm"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_request_has_its_tokens_when_the_simulator_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    ttft_s, end_s, preempted, system = served(case, tmp_path)
    outcome = simulated(case, system)

    assert outcome.num_preemptions.sum() == preempted
    assert np.allclose(outcome.ttft_s, ttft_s, rtol=0, atol=EXACT_S)
    assert np.allclose(outcome.latency_s, end_s, rtol=0, atol=EXACT_S)
