"""How fast the simulator and the planner are.

    taskset -c 0,1 python -m benchmarks.simulator

The simulator runs on one core, OPT-13B on emulated A100s with ShareGPT-like lengths, and every effect that it models is
on. The planner's Algorithms 1 and 2 run for 32 devices in two threads, each time in a new interpreter: once with an
empty compilation cache and once with a filled one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, OtherLoad, fact_list, facts, table
from vllm_disagg.core.link import LINKS
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.core.slo import SLO
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.lengths import SURROGATES, make_workload
from vllm_disagg.sim.run import Backend, simulate
from vllm_disagg.sim.system import EngineSpec, System

PROFILE = load_profile("opt-13b-a100-80g")
TARGETS = SLO(ttft_s=0.25, tpot_s=0.1)


def engine(tp: int = 1, pp: int = 1, **changes: Any) -> EngineSpec:
    return EngineSpec(
        latency=PROFILE.entry(tp).latency,
        kv_tokens=PROFILE.kv_capacity_tokens(tp, pp),
        pp=pp,
        step_overhead_s=0.001,
        request_overhead_s=1e-5,
        num_devices=tp * pp,
        **changes,
    )


PREFILL = {"policy": "prefill", "max_num_batched_tokens": 2048, "rules": Rules(batch_tokens=512)}
DECODE = {"policy": "decode"}
LINK = {"link": LINKS["25g"], "kv_bytes_per_token": PROFILE.model.kv_bytes_per_token, "handoff_s": 0.005}
SYSTEMS = {
    "colocated": System(decode=(engine(max_num_batched_tokens=2048),)),
    "colocated, prefill first": System(decode=(engine(policy="prefill_first", watermark=0.01),)),
    "1P(TP2) 1D": System(prefill=(engine(2, **PREFILL),), decode=(engine(**DECODE),), **LINK),
    "2P1D": System(prefill=(engine(**PREFILL),) * 2, decode=(engine(**DECODE),), **LINK),
    "1P(PP2) 1D(PP2), early first token": System(
        prefill=(engine(pp=2, **PREFILL),), decode=(engine(pp=2, **DECODE),), first_token="prefill", **LINK
    ),
    "8P4D": System(prefill=(engine(**PREFILL),) * 8, decode=(engine(**DECODE),) * 4, **LINK),
}
RATES = (1.0, 2.0, 3.0)
"""Per device."""


def requests_per_s(system: System, num: int, rate: float, backend: Backend = "compiled") -> dict[str, float]:
    """Processor time of one run, prefix cache in use: every prompt begins with one of 20 system prompts."""
    drawn = make_workload(
        SURROGATES["sharegpt-like"], num_requests=num, rate=rate, shared_prefix_tokens=64, num_prefixes=20
    )
    workload = replace(drawn, source="benchmark")
    begin_s = time.process_time()
    outcome = simulate(system, workload, backend=backend)
    seconds = time.process_time() - begin_s
    return {
        "requests_per_s": num / seconds,
        "steps_per_s": outcome.num_steps / seconds,
        "attainment": outcome.attainment(TARGETS, skip=0.1),
    }


PLAN = """
import sys, time
begin_s = time.perf_counter()
from concurrent.futures import ThreadPoolExecutor
from vllm_disagg.core.slo import SLO
from vllm_disagg.planner.candidates import Resources, colocated, segmented
from vllm_disagg.planner.cluster import Cluster, EngineOptions, Pool
from vllm_disagg.planner.placement import Question, algorithm_1, algorithm_2
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.lengths import SURROGATES, make_workload

if __name__ == "__main__":
    name, ttft_s, tpot_s = sys.argv[1:]
    pool = Pool(profile=load_profile(name))
    resources = Resources(
        prefill=pool, decode=pool, cluster=Cluster(num_nodes=4), options=EngineOptions(), longest_tokens=2048
    )
    workloads = (make_workload(SURROGATES["sharegpt-like"], num_requests=20_000),)
    question = Question(resources=resources, workloads=workloads, slo=SLO(ttft_s=float(ttft_s), tpot_s=float(tpot_s)))
    with ThreadPoolExecutor(2) as pool:
        one = algorithm_1(question, pool.map)
        middle_s = time.perf_counter()
        two = algorithm_2(question, pool.map)
        end_s = time.perf_counter()
    candidates = sum(1 for _ in segmented(resources))
    print(middle_s - begin_s, end_s - middle_s, candidates, two[0].candidate.name, sep="|")
"""


def plan_seconds(profile: str, targets: tuple[str, str], cache: Path) -> dict[str, Any]:
    """One search in a new interpreter, wall-clock."""
    script = cache / "search.py"
    script.write_text(PLAN)
    begin_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), profile, *targets],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache / "numba"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    one_s, two_s, candidates, best = done.stdout.strip().split("|")
    return {
        "total_s": time.perf_counter() - begin_s,
        "algorithm_1_s": float(one_s),
        "algorithm_2_s": float(two_s),
        "candidates": int(candidates),
        "best": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--out", type=Path, help="also write PATH.md and PATH.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with OtherLoad() as other_load:
        requests_per_s(SYSTEMS["2P1D"], 10, 6.0)  # compiles
        for name, system in SYSTEMS.items():
            for rate in RATES:
                found = requests_per_s(system, arguments.requests, rate * system.num_devices)
                rows.append({"system": name, "rate_per_device": rate, **found})
        readable = requests_per_s(SYSTEMS["2P1D"], 3000, 6.0, backend="reference")
        growth = [{"requests": num, **requests_per_s(SYSTEMS["2P1D"], num, 6.0)} for num in (2_000, 20_000, 200_000)]
        plans = []
        for profile, targets in (("opt-13b-a100-80g", ("0.25", "0.1")), ("opt-66b-a100-80g", ("2.5", "0.15"))):
            with tempfile.TemporaryDirectory() as folder:
                for start in ("cold", "cache filled"):
                    plans.append({"profile": profile, "start": start, **plan_seconds(profile, targets, Path(folder))})
    found = facts("benchmarks.simulator", other_load)
    text = report(found, rows, readable, growth, plans)
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text + "\n")
        document = {"facts": found, "systems": rows, "readable": readable, "growth": growth, "plans": plans}
        arguments.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def report(
    found: dict[str, str], rows: list[dict[str, Any]], readable: dict[str, float], growth: list[dict[str, Any]],
    plans: list[dict[str, Any]],
) -> str:  # fmt: skip
    """All of it as Markdown."""
    speed = table(
        ["system", "requests/s per device", "attainment", "simulated requests/s", "simulated steps/s"],
        [
            [
                row["system"], f"{row['rate_per_device']:g}", f"{row['attainment']:.0%}",
                f"{row['requests_per_s']:,.0f}", f"{row['steps_per_s']:,.0f}",
            ]
            for row in rows
        ],
    )  # fmt: skip
    scale = table(
        ["requests", "simulated requests/s"],
        [[f"{row['requests']:,}", f"{row['requests_per_s']:,.0f}"] for row in growth],
    )
    search = table(
        ["profile", "start", "Algorithm 1 with start-up", "Algorithm 2", "all", "its candidates", "best of them"],
        [
            [
                row["profile"], row["start"], f"{row['algorithm_1_s']:.1f} s", f"{row['algorithm_2_s']:.1f} s",
                f"{row['total_s']:.1f} s", str(row["candidates"]), row["best"],
            ]
            for row in plans
        ],
    )  # fmt: skip
    return "\n\n".join(
        [
            "# Speed of the simulator and the planner",
            fact_list({name: value for name, value in found.items() if name != "UCX_TLS"}),
            "## Simulated requests per second of one core",
            "OPT-13B, ShareGPT-like lengths (a surrogate), 25 Gb/s between instances, host overheads, prefix cache.",
            speed,
            f"In plain Python, 2P1D at 2/s per device: {readable['requests_per_s']:,.0f} simulated requests/s.",
            "## Cost over the number of requests, 2P1D",
            scale,
            "## Algorithms 1 and 2 for 4 nodes of 8 devices, two threads",
            search,
        ]
    )


if __name__ == "__main__":
    main()
