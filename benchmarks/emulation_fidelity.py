"""An emulated engine against the real engine that its profile was measured from.

    taskset -c 0,1 python -m benchmarks.emulation_fidelity

A real SmolLM2-135M computes on the first core; its API server, its EngineCore and the load generator have the second
one. Profiling loads alternate with loads that are compared later. Then an emulated engine, with the profile that was
fitted and the same places on the cores, gets exactly the requests of the compared loads at the same planned moments.
Profiling and compared loads differ in lengths, arrivals and prompts.

A virtual machine's pace changes within a minute by more than the emulation is wrong. So every compared load is short
and lies between two profiling loads, whose steps, over what the profile says for them, are the pace that the device is
said to have meanwhile; and the profile is fitted to steps from which the drift of the pace was taken. The emulated runs
come last: they wait, and do not care for memory bandwidth.

Emulated engines stand side by side: some at that pace, which is measured beside the compared runs and never in them,
with different jitter; and one at the pace that the real device had at each moment of each run, second by second. This
one is no prediction. It shows what the emulation itself adds: scheduling, queueing and the host's own time. Pace
travels as a `slow` fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.load import LoadShape, Request, Times, drive, poisson
from benchmarks.machine import OtherLoad, Stolen, fact_list, facts, table
from benchmarks.step_residuals import fit_through_drift, jitter, residuals, seconds_of
from tests.e2e.engines import Server
from vllm_disagg.core.latency import LatencyModel, work_of
from vllm_disagg.core.profile import ModelShape, ParallelEntry, Profile, profile_document
from vllm_disagg.demo.model import smollm2_path
from vllm_disagg.emulation.settings import FAULTS_ENV
from vllm_disagg.launcher.machine import free_ports
from vllm_disagg.profiler.steps import STEPS_ENV, RecordedStep, cycles_s, read_steps

REAL, EMULATED, PACED = "real", "emulated", "paced"
BACKEND = "--distributed-executor-backend"
BLOCK_SIZE, NUM_BLOCKS, KV_BYTES = 32, 400, 700_000_000
SHAPE = LoadShape(prompt_tokens=(16, 160), output_tokens=(8, 24))
"""Of the compared loads."""

PROFILING = LoadShape(prompt_tokens=(8, 320), output_tokens=(3, 32))
BURSTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 1, 2, 3, 4, 5, 6, 8, 10, 12)
"""Requests of each burst of the profiling loads; a load has one of them."""

STEADY_S, STEADY_SHARE = 6.0, 0.4
"""A profiling load ends with so many seconds of independent arrivals, at this share of the capacity: a steady load's
steps come one after the other without the pauses between bursts."""

SHARES = (0.35, 0.5, 0.65)
"""The compared rates, of the capacity: below, at and above the knee, from where requests queue for each other."""

WINDOW_S = 1.0
"""Over which the real device's pace is measured."""

LONE_PROMPTS = (8, 24, 40, 56, 72, 88, 104, 120, 144, 176, 240, 320)
"""Tokens of prompts that profiling loads send one after the other, a sixth of them each: steps that compute a prompt
alone."""

CAPACITY_REQUESTS = 60
"""Sent within a second to see how many requests per second the real engine can answer."""

BURST_STRIDE = 9
"""From one load's burst to the next one's, in `BURSTS`: small and large ones take turns."""

BURST_SPACING_S = (0.15, 0.45)
"""Mean time between the requests of a burst, in turn: some come while others are computed, so that there are mixed
steps, large ones and such as a steady load has."""

FREEZE_S, FROZEN = 5.0, 2.0
"""A real run in which the device was so many times slower than the profile for so long met a frozen machine, and is
left out."""

REST_S = 2.0
STOLEN, TRIES = 0.02, 4
"""An emulated run of which the hypervisor took more is made again, up to so many times; the least disturbed counts. A
host that is not there keeps no device's time."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One compared load on one engine."""

    engine: str
    rate_per_s: float
    block: int
    number: int
    start_s: float
    """On the engine's clock."""
    times: tuple[Times, ...]
    steps: tuple[RecordedStep, ...]
    load_average: float
    stolen: float
    """Share of the used cores' time that the hypervisor gave to others."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that was measured, and the profile that came of it."""

    runs: Sequence[Run]
    capacity_per_s: float
    """Requests per second that the real engine answered when they came at once."""
    left_out: int
    """Runs of the real engine that met a frozen machine."""
    profiling: Sequence[RecordedStep]
    latency: LatencyModel
    jitter: float
    profile: Profile


@contextmanager
def engine(name: str, flags: Sequence[str], folder: Path, cores: Sequence[int], *, number: int = 0) -> Iterator[Server]:
    """An engine that records its steps, ready; what does not compute is on the last core."""
    port, files = free_ports(1)[0], f"{name}{number or ''}"
    argv = [
        "taskset", "-c", ",".join(map(str, cores)),
        sys.executable, "-m", "vllm_disagg", "serve", str(smollm2_path()), "--port", str(port), "--host", "127.0.0.1",
        "--served-model-name", "model", "--enforce-eager", "--dtype", "float32", "--max-model-len", "2048",
        "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS),
        "--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-batched-tokens", "512", "--max-num-seqs", "64",
        "--no-enable-prefix-caching", *flags,
    ]  # fmt: skip
    env = {
        "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": str(cores[0]), "VLLM_NO_USAGE_STATS": "1",
        STEPS_ENV: str(folder / f"{files}.steps"), FAULTS_ENV: str(folder / f"{files}.faults"),
    }  # fmt: skip
    server = Server(name=name, argv=argv, log=folder / f"{files}.log", env=env, port=port)
    try:
        server.start()
        server.wait_until_ready()
        pin(server, cores[-1])
        asyncio.run(warm_up(server))
        yield server
    finally:
        server.kill()


def pin(server: Server, core: int) -> None:
    """Keep every thread but the worker's on one core."""
    for process in server.tree():
        if "Worker" not in process.name():
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {core})


async def warm_up(server: Server) -> None:
    """A few requests of every length."""
    for times in await drive([server.url], poisson(PROFILING, rate_per_s=1.5, seconds=10.0, seed=(0, 0))):
        assert not times.error, f"{server.name} does not work: {times.error}"


async def profiling_load(server: Server, size: int, rate_per_s: float, seed: Sequence[int]) -> None:
    """Prompts one by one, then a burst of this size, then independent arrivals, each until its last answer."""
    random = np.random.default_rng(list(seed))

    def request(num_prompt_tokens: int, num_output_tokens: int, at_s: float = 0.0) -> Request:
        prompt = tuple(random.integers(*PROFILING.token_ids, num_prompt_tokens).tolist())
        return Request(at_s=at_s, prompt=prompt, num_output_tokens=num_output_tokens)

    lone = random.permutation(LONE_PROMPTS)[: len(LONE_PROMPTS) // 6].tolist()
    spacing_s = BURST_SPACING_S[seed[-1] % len(BURST_SPACING_S)]
    burst = [
        request(
            int(random.integers(*PROFILING.prompt_tokens)),
            int(random.integers(*PROFILING.output_tokens)),
            float(random.uniform(0, spacing_s * size)),
        )
        for _ in range(size)
    ]
    steady = poisson(PROFILING, rate_per_s=rate_per_s, seconds=STEADY_S, seed=(*seed, 1))
    loads = [*([request(num_tokens, 2)] for num_tokens in lone), burst, steady]
    for requests in loads:
        for times in await drive([server.url], requests):
            assert not times.error, f"{server.name}: {times.error}"


async def capacity_per_s(server: Server) -> float:
    """Requests per second that the engine answers when many of the compared shape come at once."""
    requests = poisson(SHAPE, rate_per_s=CAPACITY_REQUESTS, seconds=1.0, seed=(0, 1))
    start_s = time.monotonic()
    for times in await drive([server.url], requests):
        assert not times.error, f"{server.name}: {times.error}"
    return len(requests) / (time.monotonic() - start_s)


class Log:
    """A server's steps since the last look."""

    def __init__(self, server: Server) -> None:
        self._path, self._seen = Path(server.env[STEPS_ENV]), 0
        self.new()

    def new(self) -> list[RecordedStep]:
        """What was written since."""
        steps = read_steps(self._path)
        found, self._seen = steps[self._seen :], len(steps)
        return found


@dataclass(frozen=True, kw_only=True)
class Load:
    """One compared load."""

    rate_per_s: float
    block: int
    number: int
    requests: Sequence[Request]

    def of(self, run: Run) -> bool:
        return (self.rate_per_s, self.block, self.number) == (run.rate_per_s, run.block, run.number)


def compared_loads(options: argparse.Namespace) -> list[Load]:
    """All of them, in their order. Those of one rate and block are the same in every repetition."""
    return [
        Load(
            rate_per_s=rate,
            block=block,
            number=number,
            requests=poisson(
                SHAPE, rate_per_s=rate, seconds=options.requests / rate, seed=(options.seed, round(100 * rate), block)
            ),
        )
        for number in range(options.repetitions)
        for block in range(options.blocks)
        for rate in (options.rates if number % 2 == 0 else options.rates[::-1])
    ]


async def compare(server: Server, log: Log, load: Load, cores: Sequence[int], *, pace: Sequence[float] = ()) -> Run:
    """One run."""
    log.new()
    stolen, start_s = Stolen(cores), time.monotonic()
    pacing = asyncio.create_task(keep_pace(Path(server.env[FAULTS_ENV]), pace))
    times = await drive([server.url], load.requests)
    pacing.cancel()
    await asyncio.sleep(REST_S)
    run = Run(
        engine=server.name,
        rate_per_s=load.rate_per_s,
        block=load.block,
        number=load.number,
        start_s=start_s,
        times=tuple(times),
        steps=tuple(log.new()),
        load_average=os.getloadavg()[0],
        stolen=stolen.share(),
    )
    print(progress_line(run), flush=True)
    return run


async def undisturbed(server: Server, log: Log, load: Load, cores: Sequence[int], *, pace: Sequence[float]) -> Run:
    """One run of an emulated engine, repeated while the hypervisor takes too much of it."""
    tries: list[Run] = []
    while len(tries) < TRIES and not (tries and tries[-1].stolen <= STOLEN):
        tries.append(await compare(server, log, load, cores, pace=pace))
    return min(tries, key=lambda run: run.stolen)


def pace_of(run: Run, latency: LatencyModel, *, window_s: float = WINDOW_S) -> list[float]:
    """How much slower than the profile the device was, window after window. Windows without steps are as the last."""
    measured: dict[int, float] = {}
    modelled: dict[int, float] = {}
    for step in run.steps:
        window = int((step.at_s - run.start_s) / window_s)
        measured[window] = measured.get(window, 0.0) + step.step_s
        modelled[window] = modelled.get(window, 0.0) + latency.step_s(work_of(step.requests))
    pace: list[float] = []
    for window in range(max(measured) + 1):
        before = pace[-1] if pace else 1.0
        pace.append(measured[window] / modelled[window] if window in measured else before)
    return pace


async def keep_pace(file: Path, pace: Sequence[float]) -> None:
    """Have the emulated device go at that pace, window after window, the last one until this is cancelled."""
    try:
        for factor in pace:
            set_pace(file, factor)
            await asyncio.sleep(WINDOW_S)
        await asyncio.Event().wait()
    finally:
        set_pace(file, 1.0)


def set_pace(file: Path, factor: float) -> None:
    """From the next step on."""
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"faults": [{"kind": "slow", "factor": factor}]}))
    draft.rename(file)


def progress_line(run: Run) -> str:
    """What a run says at once."""
    errors = [times.error for times in run.times if times.error]
    figures = ", ".join(f"{name} {figure([run]):.1f}" for name, figure in FIGURES.items())
    what = f"{run.engine} at {run.rate_per_s:g}/s, block {run.block + 1}, repetition {run.number + 1}"
    return f"{what}: {len(run.times)} requests, errors {errors}, {figures}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the real engine did."""

    runs: Sequence[Run]
    profiling: Sequence[Sequence[RecordedStep]]
    """Of each profiling load: one before each run, and one after the last."""
    capacity_per_s: float

    @property
    def profiling_steps(self) -> list[RecordedStep]:
        """All of them."""
        return list(chain.from_iterable(self.profiling))

    def pace_beside(self, index: int, latency: LatencyModel) -> float:
        """How much slower than the profile the device was before and after a run."""
        return slowness([*self.profiling[index], *self.profiling[index + 1]], latency)


def measure_real(options: argparse.Namespace, folder: Path) -> Measured:
    """The capacity, the rates where they are not given, and then profiling and compared loads in turn."""
    runs: list[Run] = []
    profiling: list[list[RecordedStep]] = []
    flags = (BACKEND, "vllm_disagg.profiler.recorder.RecordingExecutor")
    with engine(REAL, flags, folder, options.cores) as server:
        log = Log(server)
        capacity = asyncio.run(capacity_per_s(server))
        print(f"{REAL}: answers {capacity:.2f} requests/s when they come at once", flush=True)
        options.rates = options.rates or tuple(round(share * capacity, 2) for share in SHARES)
        for index, load in enumerate((*compared_loads(options), None)):
            log.new()
            size, seed = BURSTS[index * BURST_STRIDE % len(BURSTS)], (options.seed, 7, index)
            asyncio.run(profiling_load(server, size, STEADY_SHARE * capacity, seed))
            profiling.append(log.new())
            if load is not None:
                runs.append(asyncio.run(compare(server, log, load, options.cores)))
    return Measured(runs=runs, profiling=profiling, capacity_per_s=capacity)


def slowness(steps: Sequence[RecordedStep], latency: LatencyModel) -> float:
    """What steps took, over what the profile says for them."""
    took_s, told_s = seconds_of(steps, latency)
    return took_s / told_s


def is_undisturbed(run: Run, latency: LatencyModel) -> bool:
    """Whether it did not meet a frozen machine."""
    return max(pace_of(run, latency, window_s=FREEZE_S)) <= FROZEN


def emulate(measured: Measured, options: argparse.Namespace, folder: Path) -> Result:
    """Fit, and repeat the compared loads on emulated engines."""
    steps = measured.profiling_steps
    latency = fit_through_drift(measured.profiling)
    profile, noise = profile_of(latency, steps), jitter(latency, steps)
    path = folder / "profile.json"
    path.write_text(json.dumps(profile_document(profile), indent=1))
    flags = (
        "--emulate",
        str(path),
        "--emulate-host",
        "shown",
        BACKEND,
        "vllm_disagg.profiler.emulated.RecordingEmulatedExecutor",
    )
    paces = {id(run): [measured.pace_beside(index, latency)] for index, run in enumerate(measured.runs)}
    real = [run for run in measured.runs if is_undisturbed(run, latency)]
    with ExitStack() as engines:
        paced = engines.enter_context(engine(PACED, flags, folder, options.cores))
        emulated = [
            engines.enter_context(
                engine(
                    EMULATED,
                    (*flags, "--emulate-jitter", f"{noise:.4f}", "--emulate-seed", str(seed)),
                    folder,
                    options.cores,
                    number=seed,
                )
            )
            for seed in range(options.emulations)
        ]
        sides = [(paced, Log(paced)), *((server, Log(server)) for server in emulated)]

        async def at_once(run: Run, load: Load) -> list[Run]:
            """One load on all of them."""
            all_paces = [pace_of(run, latency), *(paces[id(run)] for _ in emulated)]
            return await asyncio.gather(
                *(
                    undisturbed(server, log, load, options.cores, pace=pace)
                    for (server, log), pace in zip(sides, all_paces, strict=True)
                )
            )

        pairs = [(run, load) for run in real for load in compared_loads(options) if load.of(run)]
        made = [found for run, load in pairs for found in asyncio.run(at_once(run, load))]
    runs = [*real, *of_engine(made, PACED), *of_engine(made, EMULATED)]
    left_out = len(measured.runs) - len(real)
    return Result(
        runs=runs,
        capacity_per_s=measured.capacity_per_s,
        left_out=left_out,
        profiling=steps,
        latency=latency,
        jitter=noise,
        profile=profile,
    )


def profile_of(latency: LatencyModel, steps: Sequence[RecordedStep]) -> Profile:
    """A profile of the real engine."""
    config = json.loads((smollm2_path() / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads, head_size = config["num_key_value_heads"], config.get("head_dim") or hidden // heads
    shape = ModelShape(
        name="SmolLM2-135M-Instruct",
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        hidden_size=hidden,
        weight_bytes=4 * 134_515_008,
        kv_bytes_per_token=2 * 4 * config["num_hidden_layers"] * kv_heads * head_size,
        max_model_len=config["max_position_embeddings"],
    )
    left = {f"{phase}_log_spread": values["log_spread"] for phase, values in residuals(latency, steps).items()}
    entry = ParallelEntry(tp=1, latency=latency, kv_capacity_tokens={1: NUM_BLOCKS * BLOCK_SIZE}, residuals=left)
    return Profile(
        model=shape,
        device="one CPU core",
        device_memory_bytes=4 << 30,
        kind="measured",
        source=f"benchmarks.emulation_fidelity, {len(steps)} steps",
        entries={1: entry},
    )


Figure = Callable[[Sequence[Run]], float]


def percentile(which: Callable[[Times], float], percent: float) -> Figure:
    """Over all requests of some runs, in milliseconds."""

    def figure(runs: Sequence[Run]) -> float:
        return (
            float(np.percentile([which(times) for run in runs for times in run.times if not times.error], percent))
            * 1e3
        )

    return figure


FIGURES: dict[str, Figure] = {
    f"{name} p{percent}": percentile(which, percent)
    for name, which in (("TTFT", lambda times: times.ttft_s), ("TPOT", lambda times: times.tpot_s))
    for percent in (50, 90)
}


TARGETS = {"p50": 0.05, "p90": 0.10}
"""What the emulation is meant to reach."""


def of_engine(runs: Sequence[Run], engine: str, rate: float | None = None) -> list[Run]:
    """The runs on one engine, of one rate or of all, in their order."""
    return [run for run in runs if run.engine == engine and rate in (None, run.rate_per_s)]


def rows(runs: Sequence[Run], rate: float) -> list[tuple[str, ...]]:
    """A row for each figure: the three engines, their differences, and what the real one differs from itself by."""
    found = []
    real, emulated, paced = (of_engine(runs, engine, rate) for engine in (REAL, EMULATED, PACED))
    for name, figure in FIGURES.items():
        target = TARGETS[name.split()[-1]]
        found.append(
            (
                f"{rate:g}", name, with_each(real, figure), f"{figure(emulated):.0f}", f"{figure(paced):.0f}",
                spread(real, figure), verdict(figure(emulated) / figure(real) - 1, target),
                verdict(figure(paced) / figure(real) - 1, target), f"{target:.0%}",
            )
        )  # fmt: skip
    return found


HEAD = (
    "requests/s", "figure", "real, ms", "emulated, ms", "paced, ms", "real against itself", "emulated - real",
    "paced - real", "target",
)  # fmt: skip


def verdict(difference: float, target: float) -> str:
    """The difference, marked where it is larger than it should be."""
    return f"{difference:+.1%}" + ("" if abs(difference) <= target else " (missed)")


def repetitions(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of each repetition."""
    return [[run for run in runs if run.number == number] for number in sorted({run.number for run in runs})]


def with_each(runs: Sequence[Run], figure: Figure) -> str:
    """The figure over all repetitions, and that of each."""
    return f"{figure(runs):.0f} ({', '.join(f'{figure(each):.0f}' for each in repetitions(runs))})"


def spread(runs: Sequence[Run], figure: Figure) -> str:
    """By how much the highest repetition is above the lowest one, over the loads that all repetitions have."""
    shared = set.intersection(*({run.block for run in each} for each in repetitions(runs)))
    values = [figure(both) for both in repetitions([run for run in runs if run.block in shared])]
    return f"{max(values) / min(values) - 1:.1%}" if len(values) > 1 else "-"


def run_rows(runs: Sequence[Run], latency: LatencyModel) -> list[tuple[str, ...]]:
    """A row for each run: what its steps were like, and whether it can be believed."""
    found = []
    for run in runs:
        left = residuals(latency, run.steps)
        gaps = [cycle_s - step.step_s for step, cycle_s in cycles_s(run.steps)]
        late_ms = max(times.sent_late_s for times in run.times) * 1e3
        found.append(
            (
                run.engine, f"{run.rate_per_s:g}", str(run.block + 1), str(run.number + 1), str(len(run.times)),
                str(sum(bool(times.error) for times in run.times)), str(len(run.steps)),
                f"{slowness(run.steps, latency):.3f}",
                *(f"{left[phase]['sum_ratio']:.3f}" if phase in left else "-" for phase in PHASES),
                f"{np.mean(gaps) * 1e3:.2f}", f"{late_ms:.0f}", f"{run.load_average:.1f}", f"{run.stolen:.1%}",
            )
        )  # fmt: skip
    return found


PHASES = ("prefill", "decode", "mixed")
RUN_HEAD = (
    "engine", "requests/s", "block", "repetition", "requests", "failed", "steps", "step time / profile", *PHASES,
    "between steps, ms", "sent late at most, ms", "load average", "cores stolen",
)  # fmt: skip


def report(result: Result, options: argparse.Namespace, found: dict[str, str]) -> str:
    """The result as Markdown."""
    left = residuals(result.latency, result.profiling)
    fitted = [
        (phase, f"{values['num_steps']:.0f}", f"{values['sum_ratio']:.3f}", f"{values['log_spread']:.1%}")
        for phase, values in left.items()
    ]
    return (
        "# Emulated against real: time\n\n"
        f"{fact_list(found)}\n"
        f"- engine: SmolLM2-135M-Instruct, float32, `--enforce-eager`, {NUM_BLOCKS} blocks of {BLOCK_SIZE} tokens, "
        "512 tokens per step, no prefix cache; computes on the first core, everything else is on the second\n"
        f"- load: Poisson, about {options.requests} requests per run, {options.blocks} different runs per rate, "
        f"prompts of {SHAPE.prompt_tokens[0]}-{SHAPE.prompt_tokens[1]} random tokens, {SHAPE.output_tokens[0]}-"
        f"{SHAPE.output_tokens[1]} output tokens, seed {options.seed}; the same requests in every repetition and "
        "on every engine\n"
        f"- capacity: {result.capacity_per_s:.2f} requests/s when they come at once; the rates are "
        f"{', '.join(f'{rate / result.capacity_per_s:.0%}' for rate in options.rates)} of it\n"
        f"- profile: {len(result.profiling)} steps of the real engine under other loads, between the compared ones; "
        f"jitter {result.jitter:.3f}, as the spread from each of them to the next\n"
        f"- emulated: each real run {options.emulations} times with different jitter, beside the paced one\n"
        f"- left out: {result.left_out} of {result.left_out + len(of_engine(result.runs, REAL))} runs of the real "
        f"engine, which for {FREEZE_S:g} s were more than {FROZEN:g} times slower than the profile\n"
        f"- made again, up to {TRIES} times: emulated runs of which the hypervisor took more than {STOLEN:.0%}\n\n"
        'A figure is over the requests of all runs; in brackets that of each repetition. "Real against itself" is by\n'
        "how much its highest repetition is above its lowest: the same requests, the same arrivals, the same engine.\n"
        "Emulated: at the pace that the real device had in the profiling loads before and after each of its runs.\n"
        f"Paced: at the pace that it had in the run itself, in windows of {WINDOW_S:g} s; no jitter.\n\n"
        f"{table(HEAD, [row for rate in options.rates for row in rows(result.runs, rate)])}\n\n"
        'Each run, in the order they were made. "Step time / profile": seconds of all steps, over what the profile\n'
        "says for the same steps.\n\n"
        f"{table(RUN_HEAD, run_rows(result.runs, result.latency))}\n\n"
        "The fit:\n\n"
        f"{table(('steps', 'number', 'measured / modelled', 'spread'), fitted)}\n"
    )


def document(result: Result, found: dict[str, str]) -> dict[str, Any]:
    """What is written as JSON: the profile, and TTFT and TPOT of each request."""
    runs = [
        {
            "engine": run.engine, "rate_per_s": run.rate_per_s, "repetition": run.number + 1,
            "ttft_s": [round(times.ttft_s, 4) for times in run.times if not times.error],
            "tpot_s": [round(times.tpot_s, 4) for times in run.times if not times.error],
            "load_average": run.load_average, "stolen": run.stolen,
        }
        for run in result.runs
    ]  # fmt: skip
    return {"facts": found, "runs": runs, "jitter": result.jitter, "profile": profile_document(result.profile)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emulation_fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rates", type=_rates, help="requests per second, as 1.2,1.8,2.4 (default: shares of what the engine can)"
    )
    parser.add_argument("--requests", type=int, default=9, help="about how many per run (default: 9)")
    parser.add_argument("--blocks", type=int, default=14, help="different loads of each rate (default: 14)")
    parser.add_argument("--repetitions", type=int, default=2, help="of each load on each engine (default: 2)")
    parser.add_argument("--emulations", type=int, default=2, help="of each real run, by jitter (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the loads (default: 1)")
    parser.add_argument("--out", type=Path, help="write PATH.md, PATH.json and PATH.profile.json")
    parser.add_argument("--keep", type=Path, help="folder in which the engines' logs, steps and the profile stay")
    parser.add_argument("--real", type=Path, help="do not measure the real engine, but take a kept real.json")
    options = parser.parse_args()
    options.cores = tuple(sorted(os.sched_getaffinity(0)))
    if len(options.cores) != 2:
        parser.error("needs two cores: start it with taskset -c 0,1")
    return options


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(rate) for rate in text.split(","))


def main() -> None:
    """Measure, print, and write the result if asked to."""
    options = parse()
    with OtherLoad() as other_load, tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        os.sched_setaffinity(0, {options.cores[-1]})
        if options.real:
            measured = msgspec.json.decode(options.real.read_bytes(), type=Measured)
            options.rates = tuple(sorted({run.rate_per_s for run in measured.runs}))
        else:
            measured = measure_real(options, folder)
            (folder / "real.json").write_bytes(msgspec.json.encode(measured))
        result = emulate(measured, options, folder)
    os.sched_setaffinity(0, options.cores)
    found = facts("benchmarks.emulation_fidelity", other_load)
    text = report(result, options, found)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(document(result, found)) + "\n")
        options.out.with_suffix(".profile.json").write_text(
            json.dumps(profile_document(result.profile), indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
