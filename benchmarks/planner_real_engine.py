"""Does the simulator predict this machine's real engine? SmolLM2-135M, an engine per core, against the simulator.

    taskset -c 0,1 python -m benchmarks.planner_real_engine --keep FOLDER --out benchmarks/results/planner_real_engine
    python -m benchmarks.planner_real_engine --compare benchmarks/results/planner_real_engine  # report again

First `vllm-disagg profile` measures the engine on one core. Then the same steps are measured on the first core while an
engine on the second one rests, decodes, or computes prompts: engines of one host share its memory's bandwidth. Then
plain engines and a pair are served loads that the profile knows nothing of. The simulator gets the profile, what a
neighbour costs, what lone requests took beyond their steps, and the same requests at the same times.

A neighbour's cost enters as a factor on all steps of a kind: of each of its states the factor measured beforehand,
weighted with the share of the time that the simulation itself says it is in that state, found by repetition.

A virtual machine's pace changes within a minute by more than the simulator is wrong. So a cell is served in short
loads, each of which begins and ends with nothing to do, and before and after each of them every engine in turn gets a
few requests that are never compared: their steps over what the profile says are the pace that it is said to have had
meanwhile. The report has the prediction at that pace and the one with the profile alone.

What has been measured is written down after each load. A load that fails is left out, and its engines start anew.
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
import time
import traceback
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.load import LoadShape, Request, Times, drive, poisson
from benchmarks.machine import OtherLoad, Stolen, fact_list, facts, table
from benchmarks.step_residuals import seconds_of
from tests.e2e.engines import Server, core, engine, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import LatencyModel, Regime, StepWork, work_of
from vllm_disagg.core.link import Link
from vllm_disagg.core.profile import Profile, parse_profile
from vllm_disagg.core.slo import SLO
from vllm_disagg.demo.model import smollm2_path
from vllm_disagg.planner.fit import REGIONS, Region, has_mixed_lengths, region_of
from vllm_disagg.profiler.cells import Limits, Pace, Prompts, Rung, Streams
from vllm_disagg.profiler.drive import EngineClient, connected, run_cell
from vllm_disagg.profiler.engine import StepTail
from vllm_disagg.profiler.steps import STEPS_ENV, RecordedStep
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
"""Of all engines, as of the one that `vllm-disagg profile` starts."""

SHAPE = LoadShape(prompt_tokens=(16, 256), output_tokens=(8, 32))
LONE = (32, 64, 96, 128, 192, 256)
RESTING, DECODING, COMPUTING = "rests", "decodes", "computes prompts"
TURNS = (RESTING, DECODING, RESTING, COMPUTING, RESTING, DECODING, RESTING, COMPUTING, RESTING)
"""What the neighbour does in turn. A state's steps are compared with those of the rests before and after it."""

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
ROLES: Final[Mapping[str, tuple[str | None, ...]]] = {ONE: (None,), TWO: (None, None), PAIR: ("prefill", "decode")}
"""The engines of each system."""

SHARES = (0.6, 0.9, 1.2)
"""Rates of each system, of the highest one at which the simulator says that `KNEE` of the requests meet both targets:
below, at and above it."""

KNEE, KNEE_LOADS = 0.9, 20
TRIES = 3
"""So often the engines of a system are started, if loads fail."""

PACE_LONE, PACE_BURST, PACE_OUTPUT_TOKENS = (50, 180), (120, 90, 60, 30), 10
"""Prompts by which an engine's pace is seen: some one by one, then some at once that decode together."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A load as it was served.

    Attributes:
        share, block: which of its system's loads this is.
        ttft_s, tpot_s: of each request; NaN where it failed.
        errors: what failed.
        pace: of each engine beside this load, over the profile.
        own_pace: of each engine in it, whatever its neighbour did; nothing is predicted from this.
        off: steps in it over what the profile says at the pace beside, by kind.
        late_s: by how much a request was sent late at most.
    """

    system: str
    share: float
    rate: float
    block: int
    seconds: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    errors: tuple[str, ...]
    num_local: int
    pace: tuple[float, ...]
    own_pace: tuple[float, ...]
    off: Mapping[str, Sequence[float]]
    late_s: float
    stolen: float
    load_average: float

    @property
    def requests(self) -> list[Request]:
        """What was sent."""
        return load_of(self.system, self.rate, self.seconds, self.block)


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
def engines(system: str, folder: Path) -> Iterator[tuple[list[str], list[Server]]]:
    """A system that is ready, its steps recorded. Yields where it takes requests, and its engines."""
    folder.mkdir()
    key_file = folder / "key"
    create_key_file(key_file)

    def prepare(index: int, role: str | None) -> Server:
        flags = (*FLAGS, *RECORDER, *(("--kv-scheduling", "vllm") if role else ()))
        made = engine(
            f"engine-{index}", model=smollm2_path(), index=index, folder=folder, key_file=key_file, role=role,
            flags=flags,
        )  # fmt: skip
        env = {**made.env, STEPS_ENV: str(folder / f"engine-{index}.steps")}
        return replace(made, argv=["taskset", "-c", str(core(index)), *made.argv], env=env)

    servers = [prepare(index, role) for index, role in enumerate(ROLES[system])]
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
    turns: list[dict[Region, float]] = []
    pace = Pace(token_s=profile.entry(1).latency.step_s(work_of([(0, 256)])) / 256, step_s=0.05)
    async with connected(urls[0], "model") as measured, connected(urls[1], "model") as neighbour:
        for turn, state in enumerate(TURNS):
            samples: dict[Region, list[float]] = {}
            async with busy(neighbour, state):
                for cell in PROBES:
                    tail = StepTail(log)
                    rng = random.Random(f"{cell.name}{turn}")
                    await run_cell(measured, cell, pace=pace, limits=LIMITS, rng=rng)
                    for step in tail.new()[1:]:
                        work = work_of(step.requests)
                        if work != StepWork():
                            over = step.step_s / profile.entry(1).latency.step_s(work)
                            samples.setdefault(region_of(work), []).append(over)
            turns.append({region: statistics.median(values) for region, values in samples.items()})
            print(f"neighbour {state}:", {region: round(value, 3) for region, value in turns[-1].items()}, flush=True)
    return factors_of(turns), {
        region: statistics.median(turn[region] for turn, state in zip(turns, TURNS, strict=True) if state == RESTING)
        for region in REGIONS
    }


def factors_of(turns: Sequence[Mapping[Region, float]]) -> States:
    """The factor of each state: how much slower steps were than in the rests on either side, which the machine's own
    pace hardly moves."""
    found: dict[Region, dict[str, list[float]]] = {region: {DECODING: [], COMPUTING: []} for region in REGIONS}
    for index, state in enumerate(TURNS):
        if state != RESTING:
            for region in REGIONS:
                beside = (turns[index - 1][region] + turns[index + 1][region]) / 2
                found[region][state].append(turns[index][region] / beside)
    return {
        region: {RESTING: 1.0, **{state: statistics.mean(values) for state, values in of.items()}}
        for region, of in found.items()
    }


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


def load_of(system: str, rate: float, seconds: float, block: int) -> list[Request]:
    """What is served and simulated."""
    seed = (11, (ONE, TWO, PAIR).index(system), round(1000 * rate), block)
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


def pace_request(length: int, rng: np.random.Generator) -> Request:
    """One of those that are never compared."""
    prompt = tuple(rng.integers(*SHAPE.token_ids, length).tolist())
    return Request(at_s=0.0, prompt=prompt, num_output_tokens=PACE_OUTPUT_TOKENS)


class Paces:
    """How fast each engine of a system is, seen before and after each load.

    Args:
        servers: the engines.
        latency: what the profile says.
        before: measured and modelled seconds of each engine when it was last looked at.
    """

    def __init__(self, servers: Sequence[Server], latency: LatencyModel) -> None:
        self._servers, self._latency = servers, latency
        self._tails = [StepTail(Path(server.env[STEPS_ENV])) for server in servers]
        self._number = 0
        self.before = self._look()

    def steps(self) -> list[list[RecordedStep]]:
        """Of each engine, since the last look."""
        return [tail.new() for tail in self._tails]

    def beside(self) -> tuple[float, ...]:
        """Look again. Of each engine the pace between the look before this one and now."""
        before, self.before = self.before, self._look()
        return tuple((a[0] + b[0]) / (a[1] + b[1]) for a, b in zip(before, self.before, strict=True))

    def _look(self) -> list[tuple[float, float]]:
        """Each engine works while the others rest."""
        found = []
        for server, tail in zip(self._servers, self._tails, strict=True):
            rng = np.random.default_rng((17, self._number))
            self._number += 1
            tail.new()
            for lengths in (*((length,) for length in PACE_LONE), PACE_BURST):
                failed = [
                    one.error
                    for one in asyncio.run(drive([server.url], [pace_request(length, rng) for length in lengths]))
                    if one.error
                ]
                if failed:
                    raise RuntimeError(f"{server.name} does not work: {failed[0]}")
            found.append(seconds_of(tail.new(), self._latency))
        return found


def serve(
    system: str, share: float, rate: float, block: int, seconds: float, urls: Sequence[str], paces: Paces,
    latency: LatencyModel, cores: Sequence[int],
) -> Run:  # fmt: skip
    """One load, and the pace beside it.

    Raises:
        RuntimeError: no request was answered, or an engine does not work afterwards.
    """
    paces.steps()
    stolen = Stolen(cores)
    times = asyncio.run(drive(urls, load_of(system, rate, seconds, block)))
    share_stolen, errors = stolen.share(), tuple(sorted({one.error for one in times if one.error}))
    if all(one.error for one in times):
        raise RuntimeError(f"no request was answered: {errors[0]}")
    steps = paces.steps()
    pace = paces.beside()
    sums = [seconds_of(own, latency) for own in steps]
    run = Run(
        system=system,
        share=share,
        rate=rate,
        block=block,
        seconds=seconds,
        ttft_s=tuple(float("nan") if one.error else one.ttft_s for one in times),
        tpot_s=tuple(float("nan") if one.error else one.tpot_s for one in times),
        errors=errors,
        num_local=sum(one.route == "local" for one in times),
        pace=pace,
        own_pace=tuple(measured / modelled if modelled else float("nan") for measured, modelled in sums),
        off=off_of(steps, latency, pace),
        late_s=max(one.sent_late_s for one in times),
        stolen=share_stolen,
        load_average=os.getloadavg()[0],
    )
    print(
        f"{system} at {rate:g}/s, load {block + 1}: {len(times)} requests, errors {errors}, pace beside "
        f"{', '.join(f'{one:.2f}' for one in run.pace)}, in it {', '.join(f'{one:.2f}' for one in run.own_pace)}",
        flush=True,
    )
    return run


KINDS = ("a prompt alone", "prompts of equal length", "prompts of mixed lengths", "decoding", "prompts beside decoding")


def off_of(
    steps: Iterable[Iterable[RecordedStep]], latency: LatencyModel, pace: Sequence[float]
) -> dict[str, list[float]]:
    """Each step over what the profile says at this pace, by kind."""
    found: dict[str, list[float]] = {}
    for own, factor in zip(steps, pace, strict=True):
        for step in own:
            work = work_of(step.requests)
            if work != StepWork():
                over = step.step_s / (factor * latency.step_s(work))
                found.setdefault(kind_of(work), []).append(round(over, 4))
    return found


def kind_of(work: StepWork) -> str:
    """Of `KINDS`."""
    if work.num_decodes:
        return KINDS[4] if work.num_prefills else KINDS[3]
    return KINDS[0] if work.num_prefills == 1 else KINDS[2] if has_mixed_lengths(work) else KINDS[1]


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


def predict(
    system: str, requests: Sequence[Request], known: Known, *, pace: Sequence[float] = (1.0, 1.0),
    interference: bool = True,
) -> Any:  # fmt: skip
    """Simulate a load on a system. Its engines' shares of the time and their steps' lengths follow from each other."""
    others = [ALONE, ALONE][: len(ROLES[system])]
    for _ in range(5 if interference and system != ONE else 1):
        specs = [
            spec(known, {region: own * factor for region, factor in mixed_factor(known.factors, other).items()})
            for other, own in zip(others, pace, strict=False)
        ]
        outcomes = _simulated(system, requests, specs, known)
        own = (
            [shares_of(outcomes[0], 0), shares_of(outcomes[0], 1)]
            if system == PAIR
            else [shares_of(outcome, 0) for outcome in outcomes]
        )
        others = [*own, ALONE][: len(ROLES[system])][::-1]
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
        for index in range(min(number, len(requests)))
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


def knee(system: str, known: Known, seconds: float) -> float:
    """The rate up to which the simulator says that `KNEE` of the requests of such loads meet both targets."""
    slo = slo_of(known.profile)
    low, high = 0.1, 12.0
    while high / low > 1.03:
        rate = (low * high) ** 0.5
        loads = [load_of(system, rate, seconds, 1000 + number) for number in range(KNEE_LOADS)]
        met = np.concatenate([_met(predict(system, load, known), slo) for load in loads])
        low, high = (rate, high) if met.mean() >= KNEE else (low, rate)
    return low


# All of it.


class Kept:
    """What has been measured so far, written down whenever something is added.

    Args:
        paths: files to which it goes.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.document: dict[str, Any] = {
            "step_s": 0.0, "factors": NO_FACTORS, "drift": {}, "dispatch_s": 0.0, "handoff_s": 0.0,
            "link": {"bytes_per_s": 1e9, "latency_s": 0.01}, "runs": [], "failed": [], "seconds": {},
        }  # fmt: skip

    def add(self, **found: Any) -> None:
        """Add or replace entries."""
        self.document.update(found)
        self._write()

    def run(self, run: Run) -> None:
        """One load more."""
        self.document["runs"].append(asdict(run))
        self._write()

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """A part that the others can do without: what goes wrong is told and noted, and the next one is tried."""
        begin_s = time.monotonic()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.document["failed"].append({"what": what, "error": f"{type(error).__name__}: {str(error)[:500]}"})
        self.document["seconds"][what] = round(time.monotonic() - begin_s, 1)
        self._write()

    def _write(self) -> None:
        for path in self._paths:
            draft = path.with_name(f".{path.name}.draft")
            draft.write_text(json.dumps(self.document) + "\n")
            draft.replace(path)


NO_FACTORS: States = {region: {RESTING: 1.0, DECODING: 1.0, COMPUTING: 1.0} for region in REGIONS}


def measure(options: argparse.Namespace, folder: Path, kept: Kept) -> None:
    """Everything that takes an engine."""
    path = folder / "profile.json"
    begin_s = time.monotonic()
    if options.profile:
        path.write_text(options.profile.read_text())
    profile = load_profile(str(path)) if options.profile else measure_profile(path, options.budget_min)
    kept.document["seconds"]["profile"] = round(time.monotonic() - begin_s, 1)
    measurement = profile.entry(1).measurement
    kept.add(profile=json.loads(path.read_text()), step_s=measurement.get("between_steps_s") or 0.0)
    with kept.part("neighbours"), engines(TWO, folder / "neighbours") as (urls, _):
        asyncio.run(drive(urls, poisson(SHAPE, rate_per_s=1.0, seconds=6, seed=(0, 1))))
        log = folder / "neighbours" / "engine-0.steps"
        factors, drift = asyncio.run(measure_factors(urls, log, profile))
        kept.add(factors=factors, drift=drift)
    for system in options.systems:
        measure_system(system, profile, options, folder, kept)


def measure_system(system: str, profile: Profile, options: argparse.Namespace, folder: Path, kept: Kept) -> None:
    """What lone requests take, and then all loads."""
    latency, cores = profile.entry(1).latency, sorted(os.sched_getaffinity(0))
    left = list(product(range(options.blocks), options.shares))
    rates: dict[float, float] = {}
    for number in range(TRIES):
        name = f"{system}, start {number + 1}"
        at = folder / f"{system.replace(' ', '-')}-{number + 1}"
        with kept.part(name), engines(system, at) as (urls, servers):
            asyncio.run(drive(urls, poisson(SHAPE, rate_per_s=1.5, seconds=6, seed=(0, 2))))
            paces = Paces(servers, latency)
            if not rates:
                with kept.part(f"{system}, lone requests"):
                    measure_lone(system, urls, servers, paces, profile, at / "key", kept)
                found = knee(system, known_of(kept.document), options.seconds)
                rates = {share: round(share * found, 2) for share in options.shares}
                paces.beside()  # the last look is old by now
            while left:
                block, share = left.pop(0)
                rate = rates[share]
                try:
                    run = serve(system, share, rate, block, options.seconds, urls, paces, latency, cores)
                except Exception as error:
                    raise RuntimeError(f"load {block + 1} at {rate:g}/s: {type(error).__name__} {error}") from error
                kept.run(run)
        if not left:
            return


def measure_lone(
    system: str, urls: Sequence[str], servers: Sequence[Server], paces: Paces, profile: Profile, key_file: Path,
    kept: Kept,
) -> None:  # fmt: skip
    """What lone requests take beyond their steps, at the pace beside them."""
    if system not in (ONE, PAIR):
        return
    latency, step_s = profile.entry(1).latency, kept.document["step_s"]
    times = asyncio.run(drive(urls, lone_requests()))
    if failed := [one.error for one in times if one.error]:
        raise RuntimeError(failed[0])
    pace = paces.beside()
    lone_s = [pace[0] * latency.step_s(work_of([(0, length)])) + step_s for length in LONE]
    if system == ONE:
        kept.add(dispatch_s=beyond(times, lone_s))
        return
    last_s = [pace[1] * latency.step_s(work_of([(length - 1, 1)])) + step_s for length in LONE]
    both_s = [prefill_s + decode_s for prefill_s, decode_s in zip(lone_s, last_s, strict=True)]
    kept.add(handoff_s=max(0.0, beyond(times, both_s) - kept.document["dispatch_s"]))
    page = profile.model.kv_bytes_per_token * BLOCK_SIZE // profile.model.num_layers
    kept.add(link=measure_transfer(servers[0].url, servers[1].url, key_file=str(key_file), page_bytes=page))


def known_of(document: Mapping[str, Any]) -> Known:
    """What was measured, for the simulator."""
    return Known(
        profile=parse_profile(document["profile"], origin="the measured profile"),
        step_s=document["step_s"],
        host=Host(dispatch_s=document["dispatch_s"], handoff_s=document["handoff_s"]),
        link=Link(bytes_per_s=document["link"]["bytes_per_s"], latency_s=document["link"]["latency_s"]),
        factors=document["factors"],
    )


# The report.

PREDICTIONS: Final[Mapping[str, Mapping[str, bool]]] = {
    "at the pace beside": {"paced": True, "interference": True},
    "profile alone": {"paced": False, "interference": True},
    "without neighbours": {"paced": True, "interference": False},
}

HEAD = (
    "system", "requests/s", "requests", "failed", "attainment measured", *PREDICTIONS, "TTFT p50 ms", "predicted",
    "p90", "predicted", "TPOT p50 ms", "predicted", "p90", "predicted",
)  # fmt: skip
RUN_HEAD = (
    "system", "requests/s", "load", "requests", "failed", "computed on decode", "pace beside", "pace in it",
    "sent late at most, ms", "load average", "cores stolen",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All loads of a system at a rate: what was measured and what is predicted, of those requests that were answered.

    Attributes:
        points: measured attainment, and that of each of `PREDICTIONS`, in per cent.
    """

    runs: Sequence[Run]
    real: _Times
    predicted: Sequence[_Times]
    points: Sequence[float]

    @property
    def errors(self) -> list[float]:
        """Of each prediction, in points."""
        return [one - self.points[0] for one in self.points[1:]]


def cells_of(runs: Sequence[Run], known: Known) -> list[Cell]:
    """In the order in which they were begun."""
    slo, found = slo_of(known.profile), []
    for key in dict.fromkeys((run.system, run.share) for run in runs):
        own = [run for run in runs if (run.system, run.share) == key]
        real = _pooled([_Times(np.array(run.ttft_s), np.array(run.tpot_s)) for run in own])
        good = ~np.isnan(real.ttft_s)
        predicted = [
            _pooled(
                [
                    predict(
                        run.system, run.requests, known, pace=run.pace if how["paced"] else (1.0, 1.0),
                        interference=how["interference"],
                    )
                    for run in own
                ]
            )
            for how in PREDICTIONS.values()
        ]  # fmt: skip
        points = [100 * float(_met(times, slo)[good].mean()) for times in (real, *predicted)]
        answered = [_Times(times.ttft_s[good], times.tpot_s[good]) for times in (real, *predicted)]
        found.append(Cell(runs=own, real=answered[0], predicted=answered[1:], points=points))
    return found


def _pooled(times: Sequence[Any]) -> _Times:
    return _Times(*(np.concatenate([getattr(one, name) for one in times]) for name in ("ttft_s", "tpot_s")))


def cell_row(cell: Cell) -> tuple[str, ...]:
    """As `HEAD`."""
    first = cell.runs[0]
    figures: list[str] = []
    for name in ("ttft_s", "tpot_s"):
        for percent in (50, 90):
            measured, predicted = (
                np.percentile(getattr(times, name), percent) * 1e3 for times in (cell.real, cell.predicted[0])
            )
            figures += [f"{measured:.0f}", f"{predicted:.0f} ({predicted / measured - 1:+.0%})"]
    return (
        first.system, f"{first.rate:g}", str(len(cell.real.ttft_s)), str(_failed(cell.runs)),
        *(f"{share:.1f}%" for share in cell.points), *figures,
    )  # fmt: skip


def _failed(runs: Sequence[Run]) -> int:
    return sum(int(np.isnan(run.ttft_s).sum()) for run in runs)


def run_row(run: Run) -> tuple[str, ...]:
    """As `RUN_HEAD`."""
    return (
        run.system, f"{run.rate:g}", str(run.block + 1), str(len(run.ttft_s)), str(_failed([run])), str(run.num_local),
        ", ".join(f"{one:.2f}" for one in run.pace), ", ".join(f"{one:.2f}" for one in run.own_pace),
        f"{1e3 * run.late_s:.0f}", f"{run.load_average:.1f}", f"{run.stolen:.1%}",
    )  # fmt: skip


def step_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Steps of an engine without a neighbour, by kind, against the profile at the pace beside them."""
    found = []
    for kind in KINDS:
        off = [abs(over - 1) for run in runs if run.system == ONE for over in run.off.get(kind, ())]
        if off:
            found.append((kind, str(len(off)), f"{np.median(off):.1%}", f"{np.percentile(off, 90):.1%}"))
    return found


def runs_of(document: Mapping[str, Any]) -> list[Run]:
    """All loads."""
    return [
        Run(**{name: tuple(value) if isinstance(value, list) else value for name, value in one.items()})
        for one in document["runs"]
    ]


def report(document: Mapping[str, Any], found: Mapping[str, str]) -> str:
    """The comparison as Markdown."""
    known, runs = known_of(document), runs_of(document)
    slo, entry = slo_of(known.profile), known.profile.entry(1)
    cells = cells_of(runs, known)
    errors = {name: [abs(cell.errors[index]) for cell in cells] for index, name in enumerate(PREDICTIONS)}
    held_out = {
        name.removesuffix("_median_relative_error"): f"{value:.1%}"
        for name, value in entry.residuals.items()
        if name.endswith("_median_relative_error")
    }
    factors = [
        (region, *(f"{known.factors[region][state]:.2f}" for state in (RESTING, DECODING, COMPUTING)),
         f"{document['drift'][region]:.2f}" if region in document["drift"] else "-")
        for region in REGIONS
    ]  # fmt: skip
    return "\n".join(
        [
            "# Predicted and measured: the simulator against this machine's real engine",
            "",
            f"SmolLM2-135M-Instruct, float32, one core for each engine with all its processes; {len(cells)} cells, "
            f"{sum(len(cell.real.ttft_s) for cell in cells)} requests; a request meets the targets with "
            f"TTFT <= {slo.ttft_s:.2f} s and TPOT <= {slo.tpot_s * 1e3:.0f} ms. Prompts of {SHAPE.prompt_tokens[0]}-"
            f"{SHAPE.prompt_tokens[1]} random tokens, {SHAPE.output_tokens[0]}-{SHAPE.output_tokens[1]} output tokens, "
            "Poisson arrivals.",
            "",
            *(
                f"- attainment, {name}: off by {statistics.mean(values):.1f} points on average, "
                f"{max(values):.1f} at most"
                for name, values in errors.items()
                if values
            ),
            f"- profile: {entry.measurement.get('seconds', 0):.0f} s of measuring, "
            f"{document['seconds'].get('profile', 0):.0f} s with the engine's start; medians on held-out points: "
            + ", ".join(f"{name} {value}" for name, value in held_out.items()),
            f"- beside the steps: {1e3 * known.step_s:.2f} ms between steps, {1e3 * known.host.dispatch_s:.1f} ms for "
            f"a request, {1e3 * known.host.handoff_s:.1f} ms for a hand-over; KV at "
            f"{known.link.bytes_per_s / 1e9:.2f} GB/s",
            *(f"- failed: {one['what']}: {one['error']}" for one in document["failed"]),
            "",
            table(HEAD, [cell_row(cell) for cell in cells]),
            "",
            "TTFT and TPOT are predicted at the pace beside.",
            "",
            "Steps of the loads of one engine without a neighbour, which no fit has seen, against the profile at the "
            "pace beside them:",
            "",
            table(("steps", "number", "off by, median", "p90"), step_rows(runs)),
            "",
            "Step times of an engine by what the engine on the other core does meanwhile, over those while it rests. "
            "Drift: steps beside a resting neighbour over what the profile says, measured right after it and used "
            "nowhere.",
            "",
            table(("steps", *(f"neighbour {state}" for state in (RESTING, DECODING, COMPUTING)), "drift"), factors),
            "",
            "Each load. Pace: steps over what the profile says, of each engine; beside the load while the others rest, "
            "in it whatever they do.",
            "",
            table(RUN_HEAD, [run_row(run) for run in runs]),
            "",
            fact_list(dict(found)),
            "",
        ]
    )


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
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load (default: 12)")
    parser.add_argument("--blocks", type=int, default=5, help="different loads of each cell (default: 5)")
    parser.add_argument("--shares", type=_numbers, default=SHARES, help="rates, of the knee (default: 0.6,0.9,1.2)")
    parser.add_argument(
        "--systems", type=lambda text: text.split(","), default=[*ROLES], help=f"of {','.join(ROLES)} (default: all)"
    )
    parser.add_argument("--profile", type=Path, help="take this profile instead of measuring one")
    parser.add_argument("--keep", type=Path, help="new folder for the profile, steps, logs, and measured.json")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    parser.add_argument("--compare", type=Path, help="measure nothing: predict again and report on PATH.json")
    options = parser.parse_args()
    if unknown := set(options.systems) - set(ROLES):
        parser.error(f"--systems: no {', '.join(unknown)}; known are {', '.join(ROLES)}")
    if options.keep and options.keep.exists():
        parser.error(f"--keep {options.keep} exists: name a new folder")
    return options


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def main() -> None:
    """Measure, predict, print, and write the result if asked to."""
    options = read_options()
    if options.compare:
        document = json.loads(options.compare.with_suffix(".json").read_text())
    else:
        other_load = OtherLoad()
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            out = [options.out.with_suffix(".json")] if options.out else []
            kept = Kept([folder / "measured.json", *out])
            try:
                with other_load:
                    measure(options, folder, kept)
            finally:  # what was measured until now can be looked at whatever happens
                kept.add(facts=facts("benchmarks.planner_real_engine", other_load))
        document = kept.document
    text = report(document, document["facts"])
    print(text)
    if out_path := options.out or options.compare:
        out_path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
