"""Does the simulator predict what engines do? vLLM's engines on emulated A100s against the simulator.

    taskset -c 0,1 python -m benchmarks.planner_reality --out benchmarks/results/planner_reality
    python -m benchmarks.planner_reality --compare benchmarks/results/planner_reality   # predict and report again

Every cell, a system at a rate, is served by real engines with emulated devices (`docs/emulation.md`) and simulated with
identical requests and arrival times. What a host adds to a step, to an arrival and to a handoff is measured beforehand
on loads of its own (`calibrate`), not adjusted to the cells.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emulated_goodput import late_steps
from benchmarks.load import Request, Times, drive
from benchmarks.machine import OtherLoad, fact_list, facts, table
from tests.e2e.engines import EmulatedEngine, ForkHost, emulated_engine, fork_host, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import StepWork, work_of
from vllm_disagg.core.link import LINKS
from vllm_disagg.core.scheduling.pace import critical_length
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.core.slo import SLO
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.lengths import SURROGATES, make_workload
from vllm_disagg.sim.outcome import Outcome
from vllm_disagg.sim.run import Backend, simulate
from vllm_disagg.sim.system import EngineSpec, Policy, System
from vllm_disagg.sim.workload import Workload, as_ints

BLOCK_SIZE = 16
MAX_NUM_SEQS = 256
LINK = "nvlink"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of deployment: its instances, and how its engines form steps."""

    name: str
    prefill: int
    decode: int
    budget: int
    chunked: bool = True


CHUNKED = Kind(name="colocated, chunks of 512", prefill=0, decode=1, budget=512)
WHOLE = Kind(name="colocated, whole prompts", prefill=0, decode=1, budget=8192, chunked=False)
SPLIT_1 = Kind(name="1P1D", prefill=1, decode=1, budget=2048)
SPLIT_2 = Kind(name="2P1D", prefill=2, decode=1, budget=2048)
KINDS = {kind.name: kind for kind in (CHUNKED, WHOLE, SPLIT_1, SPLIT_2)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A deployment of a model under a load."""

    profile: str
    workload: str
    kind: str
    rate: float
    num_requests: int

    @property
    def name(self) -> str:
        return f"{self.profile.split('-a100')[0]}, {self.workload.split('-')[0]}, {self.kind}, {self.rate:g}/s"


TARGETS = {
    ("opt-13b-a100-80g", "sharegpt-like"): SLO(ttft_s=0.25, tpot_s=0.1),
    ("opt-13b-a100-80g", "humaneval-like"): SLO(ttft_s=0.125, tpot_s=0.04),
    ("opt-13b-a100-80g", "longbench-like"): SLO(ttft_s=0.6, tpot_s=0.1),
    ("llama-3-8b-a100-80g", "sharegpt-like"): SLO(ttft_s=0.2, tpot_s=0.03),
    ("llama-3-8b-a100-80g", "longbench-like"): SLO(ttft_s=0.4, tpot_s=0.05),
}


def _cells(profile: str, workload: str, *loads: tuple[Kind, float, int]) -> list[Cell]:
    return [
        Cell(profile=profile, workload=workload, kind=kind.name, rate=rate, num_requests=num)
        for kind, rate, num in loads
    ]


CELLS = [
    *_cells(
        "opt-13b-a100-80g", "sharegpt-like",
        (CHUNKED, 1.0, 80), (CHUNKED, 2.5, 120), (WHOLE, 1.5, 80), (WHOLE, 3.0, 120),
        (SPLIT_1, 1.0, 80), (SPLIT_1, 2.0, 100), (SPLIT_2, 2.0, 100), (SPLIT_2, 3.5, 140),
    ),
    *_cells(
        "opt-13b-a100-80g", "humaneval-like",
        (CHUNKED, 9.0, 200), (WHOLE, 11.0, 250), (SPLIT_1, 6.0, 150), (SPLIT_2, 10.0, 250),
    ),
    *_cells("opt-13b-a100-80g", "longbench-like", (CHUNKED, 1.5, 80), (SPLIT_1, 2.0, 80), (SPLIT_2, 4.0, 120)),
    *_cells(
        "llama-3-8b-a100-80g", "sharegpt-like",
        (CHUNKED, 4.0, 160), (WHOLE, 5.0, 200), (SPLIT_1, 5.0, 200), (SPLIT_2, 8.0, 250),
    ),
    *_cells("llama-3-8b-a100-80g", "longbench-like", (CHUNKED, 2.5, 100), (SPLIT_2, 8.0, 200)),
]  # fmt: skip
"""Around the rates at which the simulator had expected 90 % attainment, before anything was measured."""

LONE_PROMPTS = (40, 80, 120, 160, 200, 240)
BURST = 32


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the host adds, in its own seconds. In the devices' time that is divided by the dilation.

    Args:
        dispatch_s: from a request's arrival to the engine's queue, and from its token back to the client.
        step_s: per step.
        request_s: per request in a step.
        handoff_s: from the end of a prompt to the request's arrival at the decode instance.
    """

    dispatch_s: float = 0.0
    step_s: float = 0.0
    request_s: float = 0.0
    handoff_s: float = 0.0

    def dilated(self, k: float) -> Host:
        """In the devices' time."""
        return Host(**{name: value / k for name, value in asdict(self).items()})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A cell as it was served, in the devices' time.

    Args:
        ttft_s, tpot_s: of each request; NaN where it failed.
        num_local: requests that were not split.
        late_steps: for which the host took longer than the device would have; None where that was not noted.
        sent_late_s: by how much the client sent the latest request late, in the host's time; likewise.
        failed_transfers: of KV, after which decode computed the prompt; likewise.
        disturbed: why the run says nothing about the simulator; it is kept, but not compared.
    """

    cell: Cell
    seed: int
    dilation: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    num_local: int = 0
    late_steps: int | None = None
    sent_late_s: float | None = None
    failed_transfers: int | None = None
    disturbed: str = ""
    errors: tuple[str, ...] = ()


def workload_of(cell: Cell, seed: int) -> Workload:
    """What is served and simulated."""
    drawn = make_workload(SURROGATES[cell.workload], num_requests=cell.num_requests, rate=cell.rate, seed=seed)
    output = np.maximum(2, drawn.output_tokens)
    prompt = np.minimum(drawn.prompt_tokens, 2047 - output)
    return Workload(
        arrival_s=drawn.arrival_s, prompt_tokens=as_ints(prompt), output_tokens=as_ints(output), rate=cell.rate,
        source=drawn.source,
    )  # fmt: skip


def calibration_load() -> Workload:
    """Lone prompts, a second and a half apart, then a burst of short ones."""
    num = len(LONE_PROMPTS)
    arrival = np.concatenate([np.arange(num) * 1.5, np.full(BURST, num * 1.5)])
    return Workload(
        arrival_s=arrival,
        prompt_tokens=as_ints([*LONE_PROMPTS, *[16] * BURST]),
        output_tokens=as_ints([30] * (num + BURST)),
        rate=1.0,
        source="calibration",
    )


def requests_of(workload: Workload, dilation: float, seed: int) -> list[Request]:
    tokens = np.random.default_rng([seed, 99])
    return [
        Request(
            at_s=float(at_s) * dilation,
            prompt=tuple(tokens.integers(5000, 27000, int(prompt)).tolist()),
            num_output_tokens=int(output),
        )
        for at_s, prompt, output in zip(workload.arrival_s, workload.prompt_tokens, workload.output_tokens, strict=True)
    ]


# Measuring.


def start(stack: ExitStack, cell: Cell, host: ForkHost, folder: Path, k: float) -> str:
    """Bring a system up. Returns where it takes requests."""
    folder.mkdir()
    key_file, kind = folder / "key", KINDS[cell.kind]
    create_key_file(key_file)
    flags = ["--dilation", str(k), "--max-num-batched-tokens", str(kind.budget), "--max-num-seqs", str(MAX_NUM_SEQS)]
    if not kind.chunked:
        flags.append("--no-enable-chunked-prefill")
    split_flags = [
        *flags, "--emulate-link", LINK, "--emulate-link-ledger", str(folder / "links"),
        "--kv-lease-s", str(30 * k), "--kv-pull-timeout-s", str(10 * k),
    ]  # fmt: skip

    def engine(name: str, role: str | None) -> EmulatedEngine:
        made = emulated_engine(
            name, host=host, folder=folder, key_file=key_file, role=role, profile=cell.profile, block_size=BLOCK_SIZE,
            flags=flags if role is None else split_flags,
        )  # fmt: skip
        stack.callback(made.kill)
        made.start()
        return made

    if not kind.prefill:
        plain = engine("plain", None)
        plain.wait_until_ready()
        return plain.url
    prefill = [engine(f"prefill-{index}", "prefill") for index in range(kind.prefill)]
    decode = [engine(f"decode-{index}", "decode") for index in range(kind.decode)]
    for server in (*prefill, *decode):
        server.wait_until_ready()
    patience = ["--prefill-timeout-s", str(600 * k), "--first-event-timeout-s", str(600 * k)]
    front = proxy(prefill=prefill, decode=decode, folder=folder, flags=patience)
    stack.callback(front.kill)
    front.start()
    front.wait_until_ready("/ready")
    return front.url


async def measure(
    cell: Cell, seed: int, load: Workload, host: ForkHost, folder: Path, options: argparse.Namespace
) -> Measured:
    """Serve a load."""
    k = options.dilation
    with ExitStack() as stack:
        url = await asyncio.to_thread(start, stack, cell, host, folder, k)
        warm = requests_of(load, k, 777 + seed)[: 2 + KINDS[cell.kind].prefill]
        await drive([url], warm, timeout_s=options.timeout_s)
        times = await drive([url], requests_of(load, k, seed), timeout_s=options.timeout_s)
    late, failed = await asyncio.to_thread(lambda: (late_steps(folder), failed_transfers(folder)))
    return Measured(
        cell=cell,
        seed=seed,
        dilation=k,
        ttft_s=tuple(float("nan") if one.error else one.ttft_s / k for one in times),
        tpot_s=tuple(float("nan") if one.error else one.tpot_s / k for one in times),
        num_local=sum(one.route == "local" for one in times),
        late_steps=late,
        sent_late_s=max(one.sent_late_s for one in times),
        failed_transfers=failed,
        disturbed=f"{failed} transfers of KV failed" if failed else "",
        errors=tuple(sorted({_short(one) for one in times if one.error})),
    )


def failed_transfers(folder: Path) -> int:
    """Transfers after which decode computed the prompt."""
    return sum(log.read_text(errors="replace").count("transfer.failed request=") for log in folder.glob("*.log"))


def _short(one: Times) -> str:
    return one.error[:120]


async def measure_all(options: argparse.Namespace) -> list[Measured]:
    """The calibrations and all cells, some at a time."""
    gate = asyncio.Semaphore(options.at_once)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    chosen = [cell for cell in CELLS if all(word in cell.name for word in options.only)]
    kinds = (CHUNKED, SPLIT_1)
    jobs: list[tuple[Cell, int, Workload]] = []
    for seed in seeds:
        jobs += [(_calibration(kind), seed, calibration_load()) for kind in kinds]
        jobs += [(cell, seed, workload_of(cell, seed)) for cell in chosen]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        host = fork_host(Path(name))
        stack.callback(host.kill)
        host.start()
        await asyncio.to_thread(host.wait_until_ready)

        async def one(number: int, cell: Cell, seed: int, load: Workload) -> Measured:
            async with gate:
                found = await measure(cell, seed, load, host, Path(name) / str(number), options)
            print(
                f"{cell.name}, seed {seed}: {found.late_steps} late steps, sent up to {found.sent_late_s:.2f} s late, "
                f"errors {found.errors}",
                flush=True,
            )
            if options.out:
                append(options.out.with_suffix(".jsonl"), found)
            return found

        return list(await asyncio.gather(*(one(number, *job) for number, job in enumerate(jobs))))


def _calibration(kind: Kind) -> Cell:
    return Cell(profile="opt-13b-a100-80g", workload="calibration", kind=kind.name, rate=1.0, num_requests=0)


def append(path: Path, found: Measured) -> None:
    """Keep a run as soon as it has ended."""
    rounded = {name: [round(value, 6) for value in getattr(found, name)] for name in ("ttft_s", "tpot_s")}
    with path.open("a") as file:
        file.write(json.dumps(asdict(found) | rounded) + "\n")


def read(path: Path) -> list[Measured]:
    """The runs of a file."""
    runs = []
    for line in path.read_text().splitlines():
        document = json.loads(line)
        document["cell"] = Cell(**document["cell"])
        runs.append(Measured(**{name: tuple(v) if isinstance(v, list) else v for name, v in document.items()}))
    return runs


# Predicting.


def calibrate(runs: Sequence[Measured]) -> Host:
    """The host's shares, from runs without queues. Medians, so that a hiccup does not count."""
    plain = [run for run in runs if (run.cell.workload, run.cell.kind) == ("calibration", CHUNKED.name)]
    split = [run for run in runs if (run.cell.workload, run.cell.kind) == ("calibration", SPLIT_1.name)]
    if not plain or not split:
        return Host()
    latency, num = load_profile("opt-13b-a100-80g").entry(1).latency, len(LONE_PROMPTS)
    prompts_s = [latency.step_s(work_of([(0, length)])) for length in LONE_PROMPTS]
    last_s = [latency.step_s(StepWork(num_decodes=1, decode_context=length)) for length in LONE_PROMPTS]
    steps_s = [latency.step_s(StepWork(num_decodes=1, decode_context=length + 15)) for length in LONE_PROMPTS]
    batch_s = latency.step_s(StepWork(num_decodes=BURST, decode_context=BURST * (16 + 15)))

    def beyond(some: Sequence[Measured], figure: str, model_s: Sequence[float]) -> float:
        """The median of what lone requests took beyond the model, in the host's seconds."""
        return statistics.median(
            (getattr(run, figure)[i] - model_s[i]) * run.dilation for run in some for i in range(num)
        )

    step_s = beyond(plain, "tpot_s", steps_s)
    burst_s = statistics.median((tpot - batch_s) * run.dilation for run in plain for tpot in run.tpot_s[num:])
    dispatch_s = beyond(plain, "ttft_s", prompts_s) - step_s
    both_s = beyond(split, "ttft_s", [a + b for a, b in zip(prompts_s, last_s, strict=True)])
    return Host(
        dispatch_s=max(0.0, dispatch_s),
        step_s=max(0.0, step_s),
        request_s=max(0.0, (burst_s - step_s) / (BURST - 1)),
        handoff_s=max(0.0, both_s - 2 * step_s - dispatch_s),
    )


def system_of(cell: Cell, host: Host) -> System:
    """The deployment as the simulator knows it."""
    profile, kind = load_profile(cell.profile), KINDS[cell.kind]
    latency = profile.entry(1).latency
    plain: Policy = "chunked" if kind.chunked else "whole"
    l_m = critical_length(latency, longest=min(kind.budget, profile.model.max_model_len))

    def engine(policy: Policy) -> EngineSpec:
        return EngineSpec(
            latency=latency,
            kv_tokens=profile.kv_capacity_tokens(1, 1),
            block_size=BLOCK_SIZE,
            policy=policy,
            rules=Rules(batch_tokens=l_m, backlog=True),
            max_num_batched_tokens=kind.budget,
            max_num_seqs=MAX_NUM_SEQS,
            step_overhead_s=host.step_s,
            request_overhead_s=host.request_s,
        )

    return System(
        prefill=(engine("prefill"),) * kind.prefill,
        decode=(engine("decode" if kind.prefill else plain),) * kind.decode,
        link=LINKS[LINK],
        kv_bytes_per_token=profile.model.kv_bytes_per_token,
        dispatch_s=host.dispatch_s,
        handoff_s=host.handoff_s,
    )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A cell, all seeds together: measured and predicted."""

    cell: Cell
    dilation: float
    attainment: tuple[float, float]
    ttft_s: tuple[tuple[float, float], tuple[float, float]]
    tpot_s: tuple[tuple[float, float], tuple[float, float]]
    num_requests: int
    num_failed: int
    num_local: int
    spread: float
    """Of the measured attainment over seeds: greatest minus least."""


QUANTILES = (0.5, 0.9)


def compare(runs: Sequence[Measured], host: Host, backend: Backend = "auto") -> list[Compared]:
    """Simulate what was measured. A request that failed is left out on both sides, and counted. Of a cell that was
    served at several dilations the highest counts, where the host's share is least."""
    found = []
    runs = [run for run in runs if not run.disturbed]
    cells = {run.cell for run in runs if run.cell.workload in SURROGATES}
    for cell in sorted(cells, key=lambda cell: (cell.profile, cell.workload, cell.kind, cell.rate)):
        most = max(run.dilation for run in runs if run.cell == cell)
        own = [run for run in runs if run.cell == cell and run.dilation == most]
        outcomes = [
            simulate(system_of(cell, host.dilated(run.dilation)), workload_of(cell, run.seed), backend=backend)
            for run in own
        ]
        found.append(_compared(cell, own, outcomes))
    return found


def _compared(cell: Cell, runs: Sequence[Measured], outcomes: Sequence[Outcome]) -> Compared:
    real = np.array([np.concatenate([getattr(run, name) for run in runs]) for name in ("ttft_s", "tpot_s")])
    model = np.array([np.concatenate([getattr(one, name) for one in outcomes]) for name in ("ttft_s", "tpot_s")])
    good = ~np.isnan(real[0])
    slo = TARGETS[cell.profile, cell.workload]

    def met(times: Any) -> Any:
        return (times[0] <= slo.ttft_s) & (times[1] <= slo.tpot_s)

    per_run = [float(np.mean(met(np.array([run.ttft_s, run.tpot_s])))) for run in runs]
    pairs = [
        (tuple(np.quantile(real[i][good], QUANTILES).tolist()), tuple(np.quantile(model[i][good], QUANTILES).tolist()))
        for i in range(2)
    ]
    return Compared(
        cell=cell,
        dilation=runs[0].dilation,
        attainment=(float(met(real[:, good]).mean()), float(met(model[:, good]).mean())),
        ttft_s=pairs[0],
        tpot_s=pairs[1],
        num_requests=int(good.sum()),
        num_failed=int((~good).sum()),
        num_local=sum(run.num_local for run in runs),
        spread=max(per_run) - min(per_run),
    )


# Reporting.


def report(runs: Sequence[Measured], found: dict[str, str]) -> tuple[str, list[Compared]]:
    """The comparison as Markdown."""
    host = calibrate(runs)
    cells = compare(runs, host)
    points = [100 * (cell.attainment[1] - cell.attainment[0]) for cell in cells]
    errors: dict[str, list[float]] = {}
    for name, get in _FIGURES.items():
        errors[name] = [get(cell)[1] / get(cell)[0] - 1 for cell in cells]
    seeds = len({run.seed for run in runs})
    dilations = ", ".join(f"{k:g}" for k in sorted({run.dilation for run in runs}))
    hit = {
        name: sum(abs(value) <= (0.05 if "p50" in name else 0.10) for value in values)
        for name, values in errors.items()
    }
    lines = [
        "# Predicted and measured: the simulator against engines on emulated A100s",
        "",
        f"{len(cells)} cells, {seeds} seed(s), {sum(cell.num_requests for cell in cells)} requests; vLLM's own engines "
        f"on emulated devices, dilation k = {dilations}; the simulator got the same requests at the same times. "
        "Error is predicted over measured.",
        "",
        f"- attainment: off by {statistics.mean(map(abs, points)):.1f} points on average, "
        f"{max(map(abs, points)):.1f} at most",
        *(
            f"- {name}: off by {statistics.mean(map(abs, values)):.1%} on average, "
            f"{max(map(abs, values), default=0):.1%} at most; within "
            f"{'5' if 'p50' in name else '10'} % in {hit[name]} of {len(cells)} cells"
            for name, values in errors.items()
        ),
        f"- the host's shares, measured on lone requests and a burst: {host.step_s * 1e3:.2f} ms per step, "
        f"{host.request_s * 1e6:.0f} µs per request in it, {host.dispatch_s * 1e3:.2f} ms per arrival, "
        f"{host.handoff_s * 1e3:.2f} ms per handoff in the host's time, of which the devices see the k-th part",
        f"- failed requests: {sum(cell.num_failed for cell in cells)}, left out on both sides",
        *(
            f"- not compared: {run.cell.name}, k = {run.dilation:g}, seed {run.seed}: {run.disturbed}"
            for run in runs
            if run.disturbed
        ),
        "",
        table(
            ("cell", "k", "attainment measured", "predicted", "TTFT p50 ms", "predicted", "p90", "predicted",
             "TPOT p50 ms", "predicted", "p90", "predicted", "failed", "local"),
            [_row(cell) for cell in cells],
        ),
        "",
        fact_list(found),
        "",
    ]  # fmt: skip
    return "\n".join(lines), cells


_FIGURES: dict[str, Callable[[Compared], tuple[float, float]]] = {
    "TTFT p50": lambda cell: (cell.ttft_s[0][0], cell.ttft_s[1][0]),
    "TTFT p90": lambda cell: (cell.ttft_s[0][1], cell.ttft_s[1][1]),
    "TPOT p50": lambda cell: (cell.tpot_s[0][0], cell.tpot_s[1][0]),
    "TPOT p90": lambda cell: (cell.tpot_s[0][1], cell.tpot_s[1][1]),
}


def _row(cell: Compared) -> list[str]:
    pairs = [get(cell) for get in _FIGURES.values()]
    times = [
        text for real, model in pairs for text in (f"{real * 1e3:.1f}", f"{model * 1e3:.1f} ({model / real - 1:+.0%})")
    ]
    return [
        cell.cell.name, f"{cell.dilation:g}", f"{cell.attainment[0]:.1%}", f"{cell.attainment[1]:.1%}", *times,
        str(cell.num_failed), str(cell.num_local),
    ]  # fmt: skip


def draw(cells: Sequence[Compared], path: Path) -> None:
    """Predicted over measured."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-disagg"
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.6))
    ordered = sorted(cells, key=lambda cell: cell.cell.kind)
    for (kind, own), marker in zip(groupby(ordered, key=lambda cell: cell.cell.kind), "oD^sv", strict=False):
        group = list(own)
        left.plot(
            *zip(*[[100 * v for v in cell.attainment] for cell in group], strict=True), marker, label=kind, alpha=0.7
        )
        for axes, names in ((middle, ("TTFT p50", "TTFT p90")), (right, ("TPOT p50", "TPOT p90"))):
            values = [[1e3 * v for v in _FIGURES[name](cell)] for name in names for cell in group]
            axes.plot(*zip(*values, strict=True), marker, alpha=0.7)
    for axes, title, band in ((left, "attainment, %", None), (middle, "TTFT p50 and p90, ms", 0.1),
                              (right, "TPOT p50 and p90, ms", 0.1)):  # fmt: skip
        low, high = axes.get_xlim()
        if band is None:
            axes.fill_between([low, high], [low - 2, high - 2], [low + 2, high + 2], color="0.85")
        else:
            axes.set_xscale("log")
            axes.set_yscale("log")
            low, high = axes.get_xlim()
            axes.fill_between([low, high], [low * 0.9, high * 0.9], [low * 1.1, high * 1.1], color="0.85")
        axes.plot([low, high], [low, high], color="0.5", linewidth=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("measured")
    left.set_ylabel("predicted")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dilation", type=float, default=8.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="cells whose names contain all of these")
    parser.add_argument("--at-once", type=int, default=7, help="cells that run at a time")
    parser.add_argument("--timeout-s", type=float, default=3000.0, help="of a request, in the host's time")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.svg; runs are added to PATH.jsonl as they end")
    parser.add_argument("--compare", type=Path, help="measure nothing: report on PATH.jsonl")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    with OtherLoad() as other_load:
        runs = read(options.compare.with_suffix(".jsonl")) if options.compare else asyncio.run(measure_all(options))
    found = facts("benchmarks.planner_reality", other_load)
    text, cells = report(runs, found)
    print(text)
    out = options.out or options.compare
    if out:
        out.with_suffix(".md").write_text(text)
        draw(cells, out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
