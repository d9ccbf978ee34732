"""Does the simulator predict this machine's real engine? SmolLM2-135M, an engine per core, against the simulator.

    taskset -c 0,1 python -m benchmarks.planner_real_engine --out benchmarks/results/planner_real_engine
    python -m benchmarks.planner_real_engine --compare benchmarks/results/planner_real_engine  # report again

First `vllm-disagg profile` measures the engine on one core. Then the same steps are measured on the first core while an
engine on the second one rests, decodes, or computes prompts: engines of one host share its memory's bandwidth. Then
plain engines and a pair are served loads that the profile knows nothing of. The simulator gets the profile, what a
neighbour costs, what lone requests took beyond their steps, and the same requests at the same times.

A neighbour's cost enters as a factor on all steps of a kind: of each of its states the factor measured beforehand,
weighted with the share of the time that the simulation itself says it is in that state, found by repetition.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import LoadShape, Request, Times, drive, poisson
from benchmarks.machine import OtherLoad, Stolen, fact_list, facts, table
from tests.e2e.engines import Server, core, engine, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import LatencyModel, Regime, StepWork, work_of
from vllm_disagg.core.link import Link
from vllm_disagg.core.profile import Profile
from vllm_disagg.core.slo import SLO
from vllm_disagg.demo.model import smollm2_path
from vllm_disagg.planner.fit import REGIONS, Region, region_of
from vllm_disagg.profiler.cells import Limits, Pace, Prompts, Rung, Streams
from vllm_disagg.profiler.drive import EngineClient, connected, run_cell
from vllm_disagg.profiler.engine import StepTail
from vllm_disagg.profiler.steps import STEPS_ENV
from vllm_disagg.profiler.transfer import measure_transfer
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.outcome import STEP, Outcome
from vllm_disagg.sim.run import simulate
from vllm_disagg.sim.system import EngineSpec, System
from vllm_disagg.sim.workload import Workload, as_ints

BUDGET, MAX_SEQS, BLOCK_SIZE = 512, 64, 32
FLAGS = (
    "--max-num-batched-tokens", str(BUDGET), "--max-num-seqs", str(MAX_SEQS), "--no-enable-prefix-caching",
)  # fmt: skip
PROFILE_FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK_SIZE), "--max-model-len", "2048",
    "--kv-cache-memory-bytes", "700000000", "--max-num-batched-tokens", str(BUDGET), "--max-num-seqs", str(MAX_SEQS),
)  # fmt: skip
"""Of the measured engine: those that `tests/e2e/engines.py` starts, and `FLAGS`."""

RECORDER = (
    "--no-async-scheduling",
    "--distributed-executor-backend",
    "vllm_disagg.profiler.recorder.RecordingExecutor",
)
SHAPE = LoadShape(prompt_tokens=(16, 256), output_tokens=(8, 32))
LONE = (32, 64, 96, 128, 192, 256)
RESTING, DECODING, COMPUTING = "rests", "decodes", "computes prompts"
States = Mapping[str, Mapping[str, float]]
"""Region to the neighbour's state to the factor on step times."""

PROBES = (
    Prompts(lengths=(64,), repeats=4),
    Prompts(lengths=(200,), repeats=3),
    Prompts(lengths=(100, 60, 30), repeats=3),
    Streams(
        contexts=(200, 150, 120, 100, 80, 60, 40, 30),
        rungs=tuple(Rung(num_streams=n, prompts=((64,), (128,))) for n in (8, 4, 2, 1)),
    ),
)
"""What is measured beside each kind of neighbour."""

LIMITS = Limits(step_tokens=BUDGET, max_seqs=MAX_SEQS, max_model_len=2048, kv_tokens=10_000)


def slo_of(profile: Profile) -> SLO:
    """Targets of this engine's own size: four times a lone prompt of mean length, and half again as long as a step that
    decodes eight requests."""
    latency = profile.entry(1).latency
    lone_s = latency.step_s(work_of([(0, sum(SHAPE.prompt_tokens) // 2)]))
    return SLO(ttft_s=4 * lone_s, tpot_s=1.5 * latency.step_s(work_of([(150, 1)] * 8)))


ONE, TWO, PAIR = "colocated x1", "colocated x2", "1P1D"
SHARES = {ONE: (0.4, 0.6, 0.8), TWO: (0.4, 0.6, 0.8), PAIR: (0.4, 0.6, 0.8)}
"""Rates of each system, of what the simulator says that it can serve."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A load as it was served. Times of each request in seconds; NaN where it failed."""

    system: str
    rate: float
    seconds: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    num_local: int
    stolen: float
    load_average: float


@dataclass(frozen=True, kw_only=True)
class Host:
    """What lone requests took beyond their steps: every request, and a hand-over."""

    dispatch_s: float
    handoff_s: float


@dataclass(frozen=True, kw_only=True)
class Known:
    """All that the simulator gets."""

    profile: Profile
    step_s: float
    host: Host
    link: Link
    factors: States


# Engines.


@contextmanager
def engines(system: str, folder: Path, *, recording: bool = False) -> Iterator[tuple[list[str], list[Server]]]:
    """A system that is ready. Yields where it takes requests, and its engines."""
    folder.mkdir()
    key_file = folder / "key"
    create_key_file(key_file)
    roles: dict[str, list[str | None]] = {ONE: [None], TWO: [None, None], PAIR: ["prefill", "decode"]}

    def prepare(index: int, role: str | None) -> Server:
        flags = (
            *FLAGS,
            *(RECORDER if recording and index == 0 else ()),
            *(("--kv-scheduling", "vllm") if role else ()),
        )
        made = engine(
            f"engine-{index}", model=smollm2_path(), index=index, folder=folder, key_file=key_file, role=role,
            flags=flags,
        )  # fmt: skip
        env = {**made.env, STEPS_ENV: str(folder / f"engine-{index}.steps")}
        return replace(made, argv=["taskset", "-c", str(core(index)), *made.argv], env=env)

    servers = [prepare(index, role) for index, role in enumerate(roles[system])]
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
            server.start()
        for server in servers:
            server.wait_until_ready()
        if system != PAIR:
            yield [server.url for server in servers], servers
            return
        front = proxy(prefill=servers[:1], decode=servers[1:], folder=folder)
        stack.callback(front.kill)
        front.start()
        front.wait_until_ready("/ready")
        yield [front.url], servers


def measure_profile(path: Path, minutes: float) -> Profile:
    """Have `vllm-disagg profile` measure the engine on one core."""
    argv = [
        sys.executable, "-m", "vllm_disagg", "profile", str(smollm2_path()), *PROFILE_FLAGS,
        "--cores", "1", "--budget-min", str(minutes), "--out", str(path),
    ]  # fmt: skip
    subprocess.run(argv, check=True, stdout=sys.stdout, stderr=sys.stderr)
    return load_profile(str(path))


# What a neighbour costs.


async def measure_factors(urls: Sequence[str], log: Path, profile: Profile) -> tuple[States, dict[str, float]]:
    """Step times of the first engine while the second one is in each state, over those while it rests; and, for
    comparison, what steps took beside a resting one over what the profile says."""
    order = (RESTING, DECODING, COMPUTING, RESTING)
    samples: dict[tuple[Region, str], list[float]] = {}
    pace = Pace(token_s=profile.entry(1).latency.step_s(work_of([(0, 256)])) / 256, step_s=0.05)
    async with connected(urls[0], "model") as measured, connected(urls[1], "model") as neighbour:
        for turn, state in enumerate(order):
            async with busy(neighbour, state):
                for cell in PROBES:
                    tail = StepTail(log)
                    rng = random.Random(f"{cell.name}{turn}")
                    await run_cell(measured, cell, pace=pace, limits=LIMITS, rng=rng)
                    for step in tail.new()[1:]:
                        work = work_of(step.requests)
                        if work != StepWork():
                            over = step.step_s / profile.entry(1).latency.step_s(work)
                            samples.setdefault((region_of(work), state), []).append(over)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    print({f"{region} while the neighbour {state}": round(value, 3) for (region, state), value in medians.items()})
    factors = {
        region: {state: medians[region, state] / medians[region, RESTING] for state in (RESTING, DECODING, COMPUTING)}
        for region in REGIONS
    }
    return factors, {region: medians[region, RESTING] for region in REGIONS}


@asynccontextmanager
async def busy(client: EngineClient, state: str) -> AsyncIterator[None]:
    """An engine in a state."""
    rng = random.Random(1)

    async def keep(num_prompts: int, length: int, tokens: int) -> None:
        while True:
            await client.generate([rng.choices(range(10, 250), k=length) for _ in range(num_prompts)], tokens)

    jobs = {RESTING: [], DECODING: [keep(8, 60, 400)], COMPUTING: [keep(1, 500, 1), keep(1, 500, 1)]}
    tasks = [asyncio.create_task(job) for job in jobs.pop(state)]
    for unused in (job for left in jobs.values() for job in left):
        unused.close()
    try:
        if tasks:
            await asyncio.sleep(1.5)  # until it is in that state
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.fence()


# Loads.


def lone_requests() -> list[Request]:
    """One after the other, none beside another."""
    tokens = np.random.default_rng(5)
    return [
        Request(at_s=2.5 * index, prompt=tuple(tokens.integers(1000, 40000, length).tolist()), num_output_tokens=8)
        for index, length in enumerate(LONE)
    ]


def load_of(system: str, rate: float, seconds: float) -> list[Request]:
    """What is served and simulated."""
    seed = (11, (ONE, TWO, PAIR).index(system), round(1000 * rate))
    return poisson(SHAPE, rate_per_s=rate, seconds=seconds, seed=seed)


def workload_of(requests: Sequence[Request]) -> Workload:
    """The same for the simulator."""
    return Workload(
        arrival_s=np.array([request.at_s for request in requests]),
        prompt_tokens=as_ints([len(request.prompt) for request in requests]),
        output_tokens=as_ints([request.num_output_tokens for request in requests]),
        rate=1.0,
        source="this benchmark's own",
    )


async def serve(system: str, rate: float, seconds: float, urls: Sequence[str], cores: Sequence[int]) -> Run:
    """One load."""
    stolen, load = Stolen(cores), load_of(system, rate, seconds)
    times = await drive(urls, load)
    run = Run(
        system=system,
        rate=rate,
        seconds=seconds,
        ttft_s=tuple(float("nan") if one.error else one.ttft_s for one in times),
        tpot_s=tuple(float("nan") if one.error else one.tpot_s for one in times),
        num_local=sum(one.route == "local" for one in times),
        stolen=stolen.share(),
        load_average=os.getloadavg()[0],
    )
    print(
        f"{system} at {rate:g}/s: {len(times)} requests, {sorted({one.error for one in times if one.error})}",
        flush=True,
    )
    return run


def beyond(times: Sequence[Times], steps_s: Sequence[float]) -> float:
    """What lone requests took beyond their steps until their first token, at the median."""
    return max(0.0, statistics.median(one.ttft_s - step_s for one, step_s in zip(times, steps_s, strict=True)))


# Predicting.


def scaled(latency: LatencyModel, factor: Mapping[str, float]) -> LatencyModel:
    """All steps of a kind so many times longer."""

    def times(regimes: Sequence[Regime], by: float) -> tuple[Regime, ...]:
        return tuple(
            Regime(up_to=one.up_to, **{name: value * by for name, value in asdict(one).items() if name != "up_to"})
            for one in regimes
        )

    return LatencyModel(**{region: times(getattr(latency, region), factor[region]) for region in REGIONS})


def shares_of(outcome: Outcome, instance: int) -> dict[str, float]:
    """Of the time of a run that an instance is in each state."""
    log = outcome.log
    steps = log[(log[:, 0] == STEP) & (log[:, 3] == instance)]
    lasting = steps[:, 2] - steps[:, 1]
    whole = float(np.nanmax(outcome.finish_s) - outcome.arrival_s[0])
    computing, decoding = float(lasting[steps[:, 5] > 0].sum()) / whole, float(lasting[steps[:, 5] == 0].sum()) / whole
    return {COMPUTING: computing, DECODING: decoding, RESTING: max(0.0, 1 - computing - decoding)}


def mixed_factor(factors: States, neighbour: Mapping[str, float]) -> dict[str, float]:
    """The factor on each kind of step beside a neighbour with these shares."""
    return {
        region: sum(of[state] * share for state, share in neighbour.items()) / sum(neighbour.values())
        for region, of in factors.items()
    }


ALONE = {RESTING: 1.0, DECODING: 0.0, COMPUTING: 0.0}


def predict(system: str, requests: Sequence[Request], known: Known, *, interference: bool = True) -> Outcome:
    """Simulate a load on a system. Its engines' shares of the time and their steps' lengths follow from each other."""
    others = [ALONE, ALONE]
    for _ in range(5 if interference and system != ONE else 1):
        specs = [spec(known, mixed_factor(known.factors, other)) for other in others]
        outcomes = _simulated(system, requests, specs, known)
        own = (
            [shares_of(outcomes[0], 0), shares_of(outcomes[0], 1)]
            if system == PAIR
            else [shares_of(outcome, 0) for outcome in outcomes]
        )
        others = own[::-1]
    return _joined(outcomes)


def spec(known: Known, factor: Mapping[str, float]) -> EngineSpec:
    """One engine."""
    entry = known.profile.entry(1)
    return EngineSpec(
        latency=scaled(entry.latency, factor),
        kv_tokens=known.profile.kv_capacity_tokens(1, 1),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=MAX_SEQS,
        prefix_cache=False,
        step_overhead_s=known.step_s,
    )


def _simulated(system: str, requests: Sequence[Request], specs: Sequence[EngineSpec], known: Known) -> list[Outcome]:
    host = {"dispatch_s": known.host.dispatch_s, "kv_bytes_per_token": known.profile.model.kv_bytes_per_token}
    if system == PAIR:
        pair = System(prefill=(specs[0],), decode=(specs[1],), link=known.link, handoff_s=known.host.handoff_s, **host)
        return [simulate(pair, workload_of(requests), log=True, backend="reference")]
    number = 1 if system == ONE else 2
    # The load generator sends to the plain engines in turn.
    return [
        simulate(
            System(decode=(specs[index],), **host), workload_of(requests[index::number]), log=True, backend="reference"
        )
        for index in range(number)
    ]


@dataclass(frozen=True)
class _Times:
    ttft_s: Any
    tpot_s: Any


def _joined(outcomes: Sequence[Outcome]) -> Any:
    """All requests in the order of their arrival."""
    if len(outcomes) == 1:
        return _Times(outcomes[0].ttft_s, outcomes[0].tpot_s)
    order = np.argsort(np.concatenate([outcome.arrival_s for outcome in outcomes]), kind="stable")
    return _Times(
        *(np.concatenate([getattr(outcome, name) for outcome in outcomes])[order] for name in ("ttft_s", "tpot_s"))
    )


def capacity(system: str, known: Known) -> float:
    """The rate up to which the simulator says that 90 % of the requests meet both targets."""
    low, high = 0.02, 60.0
    while high / low > 1.03:
        rate = (low * high) ** 0.5
        found = predict(system, load_of(system, rate, 300 / rate), known)
        low, high = (rate, high) if _met(found, slo_of(known.profile)).mean() >= 0.9 else (low, rate)
    return low


# All of it.


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that takes an engine."""
    path = folder / "profile.json"
    if options.profile:
        path.write_text(options.profile.read_text())
    profile = load_profile(str(path)) if options.profile else measure_profile(path, options.budget_min)
    measurement, cores = profile.entry(1).measurement, sorted(os.sched_getaffinity(0))
    found: dict[str, Any] = {"profile": json.loads(path.read_text()), "step_s": measurement["between_steps_s"] or 0.0}
    with engines(TWO, folder / "neighbours", recording=True) as (urls, _):
        asyncio.run(drive(urls, poisson(SHAPE, rate_per_s=1.0, seconds=6, seed=(0, 1))))
        log = folder / "neighbours" / "engine-0.steps"
        found["factors"], found["drift"] = asyncio.run(measure_factors(urls, log, profile))
    known = known_of({**found, "dispatch_s": 0.0, "handoff_s": 0.0, "link": {"bytes_per_s": 1e9, "latency_s": 0.01}})
    runs: list[Run] = []
    latency = profile.entry(1).latency
    lone_s = [latency.step_s(work_of([(0, length)])) + known.step_s for length in LONE]
    last_s = [latency.step_s(work_of([(length - 1, 1)])) + known.step_s for length in LONE]
    for system in (ONE, TWO, PAIR):
        with engines(system, folder / system.replace(" ", "-")) as (urls, servers):
            asyncio.run(drive(urls, poisson(SHAPE, rate_per_s=1.5, seconds=6, seed=(0, 2))))
            if system == ONE:
                found["dispatch_s"] = beyond(asyncio.run(drive(urls, lone_requests())), lone_s)
            if system == PAIR:
                both = [a + b for a, b in zip(lone_s, last_s, strict=True)]
                found["handoff_s"] = max(
                    0.0, beyond(asyncio.run(drive(urls, lone_requests())), both) - found["dispatch_s"]
                )
                page = profile.model.kv_bytes_per_token * BLOCK_SIZE // profile.model.num_layers
                found["link"] = measure_transfer(
                    servers[0].url, servers[1].url,
                    key_file=str(folder / system.replace(" ", "-") / "key"), page_bytes=page,
                )  # fmt: skip
            known = known_of({"handoff_s": 0.0, "link": {"bytes_per_s": 1e9, "latency_s": 0.01}, **found})
            most = capacity(system, known)
            for share in SHARES[system]:
                rate = round(share * most / 0.9, 2)
                runs.append(asyncio.run(serve(system, rate, options.seconds, urls, cores)))
    return {**found, "runs": [asdict(run) for run in runs]}


def known_of(document: Mapping[str, Any]) -> Known:
    """What was measured, for the simulator."""
    from vllm_disagg.core.profile import parse_profile

    return Known(
        profile=parse_profile(document["profile"], origin="the measured profile"),
        step_s=document["step_s"],
        host=Host(dispatch_s=document["dispatch_s"], handoff_s=document["handoff_s"]),
        link=Link(bytes_per_s=document["link"]["bytes_per_s"], latency_s=document["link"]["latency_s"]),
        factors=document["factors"],
    )


HEAD = (
    "system", "requests/s", "requests", "attainment measured", "predicted", "without neighbours", "TTFT p50 ms",
    "predicted", "p90", "predicted", "TPOT p50 ms", "predicted", "p90", "predicted", "cores stolen",
)  # fmt: skip


def report(document: Mapping[str, Any], found: dict[str, str]) -> str:
    """The comparison as Markdown."""
    known = known_of(document)
    slo = slo_of(known.profile)
    rows, points, blind = [], [], []
    for one in document["runs"]:
        run = Run(**{name: tuple(value) if isinstance(value, list) else value for name, value in one.items()})
        requests = load_of(run.system, run.rate, run.seconds)
        real = _Times(np.array(run.ttft_s), np.array(run.tpot_s))
        good = ~np.isnan(real.ttft_s)
        models = [predict(run.system, requests, known, interference=flag) for flag in (True, False)]
        shares = [100 * _met(times, slo)[good].mean() for times in (real, *models)]
        points.append(shares[1] - shares[0])
        blind.append(shares[2] - shares[0])
        cells: list[str] = []
        for name in ("ttft_s", "tpot_s"):
            for percent in (50, 90):
                a, b = (np.nanpercentile(getattr(times, name)[good], percent) * 1e3 for times in (real, models[0]))
                cells += [f"{a:.0f}", f"{b:.0f} ({b / a - 1:+.0%})"]
        rows.append(
            (run.system, f"{run.rate:g}", str(int(good.sum())), *(f"{share:.1f}%" for share in shares), *cells,
             f"{run.stolen:.1%}")
        )  # fmt: skip
    entry = known.profile.entry(1)
    factors = [
        (region, *(f"{known.factors[region][state]:.2f}" for state in (RESTING, DECODING, COMPUTING)),
         f"{document['drift'][region]:.2f}", f"{entry.residuals[f'{region}_median_relative_error']:.1%}")
        for region in REGIONS
    ]  # fmt: skip
    return "\n".join(
        [
            "# Predicted and measured: the simulator against this machine's real engine",
            "",
            f"SmolLM2-135M-Instruct, float32, one core for each engine with all its processes; {len(rows)} cells, "
            f"{sum(int(row[2]) for row in rows)} requests; a request meets the targets with TTFT <= {slo.ttft_s:.2f} s "
            f"and TPOT <= {slo.tpot_s * 1e3:.0f} ms. Prompts of {SHAPE.prompt_tokens[0]}-{SHAPE.prompt_tokens[1]} "
            f"random tokens, {SHAPE.output_tokens[0]}-{SHAPE.output_tokens[1]} output tokens, Poisson arrivals.",
            "",
            f"- attainment: off by {statistics.mean(map(abs, points)):.1f} points on average, "
            f"{max(map(abs, points)):.1f} at most; without the neighbours' cost {statistics.mean(map(abs, blind)):.1f} "
            f"and {max(map(abs, blind)):.1f}",
            f"- profile: {entry.measurement['seconds']:.0f} s of measuring; errors on held-out points below",
            f"- beside the steps: {1e3 * known.step_s:.2f} ms between steps, {1e3 * known.host.dispatch_s:.1f} ms for "
            f"a request, {1e3 * known.host.handoff_s:.1f} ms for a hand-over; KV at "
            f"{known.link.bytes_per_s / 1e9:.2f} GB/s",
            "",
            table(HEAD, rows),
            "",
            "Step times of an engine by what the engine on the other core does meanwhile, over those while it rests. "
            "Drift: steps beside a resting neighbour over what the profile says, measured right after it and used "
            "nowhere.",
            "",
            table(("steps", *(f"neighbour {state}" for state in (RESTING, DECODING, COMPUTING)), "drift", "held out"),
                  factors),
            "",
            fact_list(found),
            "",
        ]
    )  # fmt: skip


def _met(times: Any, slo: SLO) -> Any:
    return (times.ttft_s <= slo.ttft_s) & (np.isnan(times.tpot_s) | (times.tpot_s <= slo.tpot_s))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planner_real_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget-min", type=float, default=4.0, help="of the profile (default: 4)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each load (default: 40)")
    parser.add_argument("--profile", type=Path, help="take this profile instead of measuring one")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    parser.add_argument("--compare", type=Path, help="measure nothing: predict again and report on PATH.json")
    return parser.parse_args()


def main() -> None:
    """Measure, predict, print, and write the result if asked to."""
    options = read_options()
    with OtherLoad() as other_load:
        if options.compare:
            document = json.loads(options.compare.with_suffix(".json").read_text())
        else:
            with tempfile.TemporaryDirectory() as name:
                document = measure(options, Path(name))
            document["facts"] = facts("benchmarks.planner_real_engine", other_load)
    out = options.out or options.compare
    if options.out:  # kept before anything can go wrong with the report
        options.out.with_suffix(".json").write_text(json.dumps(document) + "\n")
    text = report(document, document["facts"])
    print(text)
    if out:
        out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
