"""One prefill and one decode instance behind the proxy, against two plain vLLM instances on the same two cores.

    taskset -c 0,1 python -m benchmarks.split_vs_colocated

Both sides get the same requests at the same planned moments: seeded Poisson arrivals that do not wait for answers. Only
one side exists at a time, and which goes first alternates by repetition. The plain instances are given the requests in
turn by the load generator, without a proxy. Every engine has one core, for all its processes; the proxy and the load
generator run on both.

Times are counted from the planned arrival of a request, not from when it was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.load import LoadShape, Times, drive, poisson
from benchmarks.machine import OtherLoad, busy_seconds, fact_list, facts, table
from tests.e2e.engines import Server, core, engine, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.demo.model import smollm2_path

SPLIT, COLOCATED = "split", "colocated"
REST_S = 2.0
"""Between two runs, so that metrics settle and nothing of one run is left in the next."""

MEMORY_NEEDED = 6 << 30
"""Two engines. A machine that runs out of memory measures its disk."""

COUNTERS = (
    "vllm_disagg_proxy_requests_total",
    "vllm_disagg_proxy_leg_failures_total",
    "vllm_disagg_proxy_releases_total",
    "vllm_disagg_kv_failures_total",
    "vllm_disagg_kv_holds_total",
    "vllm_disagg_kv_tokens_received_total",
    "vllm_disagg_kv_transfer_seconds_sum",
    "vllm_disagg_kv_transfer_seconds_count",
    "vllm_disagg_kv_read_seconds_sum",
    "vllm_disagg_kv_held_requests",
    "vllm_disagg_kv_draining_requests",
    "vllm:num_preemptions_total",
)
"""What is compared before and after each run."""


@dataclass(frozen=True, kw_only=True)
class Slo:
    """A request meets it if both hold."""

    ttft_s: float
    tpot_s: float

    def met_by(self, times: Times) -> bool:
        return not times.error and times.ttft_s <= self.ttft_s and times.tpot_s <= self.tpot_s


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two deployments."""

    name: str
    urls: tuple[str, ...]
    servers: tuple[Server, ...]
    cores: frozenset[int]

    def client_cpu_s(self) -> float:
        times = psutil.Process().cpu_times()
        return float(times.user + times.system) if os.sched_getaffinity(0) <= self.cores else 0.0

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for server in self.servers:
            for prefix in COUNTERS:
                for key, value in server.metrics(prefix).items():
                    found[key] = found.get(key, 0.0) + value
        return found

    def cpu_seconds(self) -> float:
        """Processor time of all its processes, and of this one where it shares their cores, so far."""
        spent = [process.cpu_times() for server in self.servers for process in server.tree()]
        return float(sum(times.user + times.system for times in spent)) + self.client_cpu_s()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One load on one side."""

    side: str
    rate_per_s: float
    repetition: int
    times: tuple[Times, ...]
    counters: dict[str, float]
    """How much they grew."""
    cpu_s: float
    """Processor time of the side's processes, and of the load generator where it shares their cores."""
    foreign_cpu_s: float
    """Processor time that the used cores spent on anything else."""
    wall_s: float

    @property
    def answered(self) -> list[Times]:
        return [times for times in self.times if not times.error]


@contextmanager
def deployment(name: str, options: argparse.Namespace, folder: Path) -> Iterator[Side]:
    """One side, ready and warm."""
    if psutil.virtual_memory().available < MEMORY_NEEDED:
        sys.exit(f"error: two engines need {MEMORY_NEEDED >> 30} GiB of free memory")
    folder.mkdir()
    key_file = folder / "key"
    create_key_file(key_file)
    model = smollm2_path()

    def prepare(server: str, index: int, role: str | None, flags: Sequence[str] = ()) -> Server:
        made = engine(
            server,
            model=model,
            index=index,
            folder=folder,
            key_file=key_file,
            role=role,
            flags=("--dtype", options.dtype, *flags),
        )
        # All of it on its core: vLLM's scheduler process spins while a step runs, and must not do so on the other's.
        return replace(made, argv=["taskset", "-c", str(core(index)), *made.argv])

    if name == SPLIT:
        engines = [prepare("prefill", 0, "prefill"), prepare("decode", 1, "decode")]
    else:
        engines = [prepare(f"plain-{index}", index, None, options.colocated_flags.split()) for index in range(2)]
    with ExitStack() as stack:
        for server in engines:
            stack.callback(server.kill)
            server.start()
        for server in engines:
            server.wait_until_ready()
        if name == SPLIT:
            front = proxy(prefill=engines[:1], decode=engines[1:], folder=folder)
            stack.callback(front.kill)
            front.start()
            front.wait_until_ready("/ready")
            urls, servers = [front.url], [*engines, front]
        else:
            urls, servers = [server.url for server in engines], engines
        yield Side(name=name, urls=tuple(urls), servers=tuple(servers), cores=frozenset(options.cores))


async def one_run(side: Side, options: argparse.Namespace, rate_per_s: float, repetition: int) -> Run:
    """Drive one side and see what its counters say."""
    seed = (options.seed, round(rate_per_s * 1000), repetition)
    requests = poisson(LoadShape(), rate_per_s=rate_per_s, seconds=options.seconds, seed=seed)
    before, start_s, busy_s, cpu_s = (
        side.counters(),
        time.perf_counter(),
        busy_seconds(options.cores),
        side.cpu_seconds(),
    )
    times = await drive(side.urls, requests)
    wall_s, busy_s, cpu_s = (
        time.perf_counter() - start_s,
        busy_seconds(options.cores) - busy_s,
        side.cpu_seconds() - cpu_s,
    )
    await asyncio.sleep(REST_S)
    after = side.counters()
    return Run(
        side=side.name,
        rate_per_s=rate_per_s,
        repetition=repetition,
        times=tuple(times),
        counters={key: after[key] - before.get(key, 0.0) for key in after if after[key] != before.get(key, 0.0)},
        cpu_s=cpu_s,
        foreign_cpu_s=max(0.0, busy_s - cpu_s),
        wall_s=wall_s,
    )


async def warm_up(side: Side, seed: int) -> None:
    """Let each engine run prompts of every length once, and the pair shake hands."""
    requests = poisson(LoadShape(), rate_per_s=1.0, seconds=8.0, seed=(seed, 0, 0, 0))
    for times in await drive(side.urls, requests):
        assert not times.error, f"{side.name} does not work: {times.error}"


async def run_all(side: Side, options: argparse.Namespace, repetitions: Sequence[int]) -> list[Run]:
    """Every rate of some repetitions on one side."""
    await warm_up(side, options.seed)
    runs = []
    for repetition in repetitions:
        for rate_per_s in options.rates:
            runs.append(await one_run(side, options, rate_per_s, repetition))
            print(progress_line(runs[-1]), flush=True)
    return runs


def phases(num_repetitions: int) -> list[tuple[str, list[int]]]:
    """Which side runs which repetitions, in order: split, colocated, colocated, split, and so on. Neighbours that are
    the same side are one phase, for which engines are started once."""
    found: list[tuple[str, list[int]]] = []
    for repetition in range(num_repetitions):
        for side in (SPLIT, COLOCATED) if repetition % 2 == 0 else (COLOCATED, SPLIT):
            if found and found[-1][0] == side:
                found[-1][1].append(repetition)
            else:
                found.append((side, [repetition]))
    return found


def measure(options: argparse.Namespace, folder: Path) -> list[Run]:
    """All runs of all phases."""
    runs: list[Run] = []
    for number, (name, repetitions) in enumerate(phases(options.repetitions)):
        with deployment(name, options, folder / f"{number}-{name}") as side:
            os.sched_setaffinity(0, options.client_cores or options.cores)
            runs += asyncio.run(run_all(side, options, repetitions))
        os.sched_setaffinity(0, options.cores)
    return runs


def progress_line(run: Run) -> str:
    """What a run says at once, to see that all is well."""
    errors = [times.error for times in run.times if times.error]
    late_s = max(times.sent_late_s for times in run.times)
    return (
        f"{run.side} at {run.rate_per_s:g}/s, repetition {run.repetition + 1}: {len(run.times)} requests, "
        f"errors {errors}, sent at most {late_s * 1e3:.0f} ms late, processor time {run.cpu_s:.0f} s "
        f"of {run.wall_s:.0f} s, other processes {run.foreign_cpu_s:.0f} s, {run.counters}"
    )


Figure = Callable[[Sequence[Run]], float]


def percentile(which: Callable[[Times], float | list[float]], percent: float) -> Figure:
    """Of all answered requests of some runs, in milliseconds."""

    def figure(runs: Sequence[Run]) -> float:
        values = [which(times) for run in runs for times in run.answered]
        flat = np.concatenate([np.atleast_1d(value) for value in values]) if values else np.array([np.nan])
        return float(np.percentile(flat, percent)) * 1e3

    return figure


def attainment(meets: Callable[[Times], bool]) -> Figure:
    """Percent of all requests; one that failed does not meet anything."""

    def figure(runs: Sequence[Run]) -> float:
        return statistics.mean(meets(times) for run in runs for times in run.times) * 100

    return figure


def figures(slo: Slo) -> dict[str, Figure]:
    """The rows of the table."""
    only_ttft, only_tpot = Slo(ttft_s=slo.ttft_s, tpot_s=np.inf), Slo(ttft_s=np.inf, tpot_s=slo.tpot_s)
    return {
        "TTFT p50, ms": percentile(lambda times: times.ttft_s, 50),
        "TTFT p90, ms": percentile(lambda times: times.ttft_s, 90),
        "TPOT p50, ms": percentile(lambda times: times.tpot_s, 50),
        "TPOT p90, ms": percentile(lambda times: times.tpot_s, 90),
        "gaps between tokens p99, ms": percentile(lambda times: times.gaps_s, 99),
        "whole answer p50, ms": percentile(lambda times: times.token_times_s[-1], 50),
        "attainment of both, %": attainment(slo.met_by),
        f"attainment of TTFT <= {slo.ttft_s:g} s, %": attainment(only_ttft.met_by),
        f"attainment of TPOT <= {slo.tpot_s * 1e3:g} ms, %": attainment(only_tpot.met_by),
    }


def of_side(runs: Sequence[Run], side: str, rate_per_s: float, repetition: int | None = None) -> list[Run]:
    """The runs of one side at one rate, of one repetition or of all."""
    return [
        run for run in runs if (run.side, run.rate_per_s) == (side, rate_per_s) and repetition in (None, run.repetition)
    ]


def with_spread(values: Sequence[float], whole: float, digits: int) -> str:
    """The figure over all repetitions, and the least and the most of one repetition."""
    return f"{whole:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def rows_at(runs: Sequence[Run], rate_per_s: float, slo: Slo) -> list[tuple[str, ...]]:
    """A row for each figure: both sides and their ratio."""
    repetitions = sorted({run.repetition for run in runs})
    rows = []
    for name, figure in figures(slo).items():
        whole = {side: figure(of_side(runs, side, rate_per_s)) for side in (SPLIT, COLOCATED)}
        each = {
            side: [figure(of_side(runs, side, rate_per_s, repetition)) for repetition in repetitions]
            for side in (SPLIT, COLOCATED)
        }
        ratios = [ratio(one, two) for one, two in zip(each[SPLIT], each[COLOCATED], strict=True)]
        rows.append(
            (
                f"{rate_per_s:g}", name,
                *(with_spread(each[side], whole[side], 0) for side in (SPLIT, COLOCATED)),
                with_spread(ratios, ratio(whole[SPLIT], whole[COLOCATED]), 2),
            )
        )  # fmt: skip
    return rows


def ratio(one: float, two: float) -> float:
    """`one / two`, where nothing over nothing is 1."""
    return one / two if two else 1.0 if not one else float("inf")


def run_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A row for each run, in the order they were made: whether it can be believed."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        late_ms = np.percentile([times.sent_late_s for times in run.times], (50, 100)) * 1e3
        rows.append(
            (
                run.side, f"{run.rate_per_s:g}", str(run.repetition + 1), str(len(run.times)),
                str(sum(bool(times.error) for times in run.times)), f"{late_ms[0]:.0f} / {late_ms[1]:.0f}",
                f"{run.wall_s * 2:.0f}", f"{run.cpu_s:.0f}", f"{run.foreign_cpu_s:.0f}",
            )
        )  # fmt: skip
    return rows


RUN_HEAD = (
    "side", "requests/s", "repetition", "requests", "not answered in full", "sent late, ms, p50 / most",
    "core-seconds", "of them ours", "of them others'",
)  # fmt: skip


def events(runs: Sequence[Run]) -> str:
    """What the counters say about fallbacks, failures and transfers."""
    lines = []
    for side in (SPLIT, COLOCATED):
        total: dict[str, float] = {}
        for run in runs:
            for key, value in run.counters.items() if run.side == side else ():
                total[key] = total.get(key, 0.0) + value
        lines += [f"- {side}: `{key}` {value:.6g}" for key, value in sorted(total.items())] or [f"- {side}: none"]
    return "\n".join(lines)


def report(runs: Sequence[Run], options: argparse.Namespace, found: dict[str, str]) -> str:
    """The result as Markdown."""
    slo = Slo(ttft_s=options.slo_ttft_s, tpot_s=options.slo_tpot_s)
    shape = LoadShape()
    counts = ", ".join(
        f"{sum(len(run.times) for run in of_side(runs, SPLIT, rate))} at {rate:g}/s" for rate in options.rates
    )
    head = ("requests/s", "figure", "split (1P1D)", "colocated (2 replicas)", "split/colocated")
    rows = [row for rate in options.rates for row in rows_at(runs, rate, slo)]
    colocated = f"with `{options.colocated_flags}`" if options.colocated_flags else "with vLLM's own settings"
    return (
        "# 1P1D against two colocated replicas\n\n"
        f"{fact_list(found)}\n"
        f"- model: SmolLM2-135M-Instruct, {options.dtype}, `--enforce-eager`, blocks of 32 tokens; "
        f"colocated {colocated}\n"
        f"- load: Poisson arrivals for {options.seconds:g} s, {options.repetitions} repetitions, each with prompts of "
        f"its own; {counts} on each side; prompts of {shape.prompt_tokens[0]}-{shape.prompt_tokens[1]} random tokens, "
        f"{shape.output_tokens[0]}-{shape.output_tokens[1]} output tokens, seed {options.seed}\n"
        f"- SLOs: TTFT <= {slo.ttft_s:g} s and TPOT <= {slo.tpot_s * 1e3:g} ms, both by one request\n\n"
        "A figure is over the requests of all repetitions; in brackets the least and the most of single repetitions.\n"
        "Below 1 in the last column is better for the split side, except for attainment.\n\n"
        f"{table(head, rows)}\n\n"
        "Each run, in the order they were made. Others' time is that of processes that are no part of this benchmark,\n"
        f"on its cores:\n\n{table(RUN_HEAD, run_rows(runs))}\n\n"
        f"Counters of the proxy and the engines that grew, over all runs:\n\n{events(runs)}\n"
    )


def rates(text: str) -> tuple[float, ...]:
    """Of a flag's value."""
    return tuple(float(rate) for rate in text.split(","))


def cores(text: str) -> tuple[int, ...]:
    """Of a flag's value."""
    return tuple(int(index) for index in text.split(","))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.split_vs_colocated",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rates", type=rates, default=(0.4, 1.0), help="requests per second, with commas")
    parser.add_argument("--seconds", type=float, default=50.0, help="length of one load")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--slo-ttft-s", type=float, default=2.0)
    parser.add_argument("--slo-tpot-s", type=float, default=0.1)
    parser.add_argument("--colocated-flags", default="", help="more flags for the plain instances, in one string")
    parser.add_argument(
        "--client-cores", type=cores, default=(), help="other cores for the load generator, with commas"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    return parser.parse_args()


def main() -> None:
    """Start everything, measure, print, and write the result if asked to."""
    options = parse()
    options.cores = tuple(sorted(os.sched_getaffinity(0)))
    if len(options.cores) != 2:
        sys.exit(f"error: {len(options.cores)} cores are allowed: give two, as in `taskset -c 0,1 ...`")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the engines end with us
    with tempfile.TemporaryDirectory() as folder, OtherLoad() as other_load:
        runs = measure(options, Path(folder))
    found = facts("benchmarks.split_vs_colocated", other_load)
    text = report(runs, options, found)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        data: dict[str, Any] = {"facts": found, "runs": [asdict(run) for run in runs]}
        options.out.with_suffix(".json").write_text(json.dumps(data, default=float) + "\n")


if __name__ == "__main__":
    main()
