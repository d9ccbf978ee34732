"""Emulated engines side by side at several dilations: from which one on the host's own time no longer shows.

    taskset -c 0,1 python -m benchmarks.emulation_dilation

Every engine gets a Poisson load of its own; the loads are the same at each dilation k, with arrivals k times as far
apart. Measured times are divided by k. All engines and the load generator share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.load import LoadShape, Request, Times, drive, poisson
from benchmarks.machine import OtherLoad, Stolen, busy_seconds, fact_list, facts, table
from tests.e2e.engines import EmulatedEngine, fork_host
from vllm_disagg.core.latency import LatencyModel, work_of
from vllm_disagg.launcher.machine import free_ports
from vllm_disagg.launcher.plan import FORKED_ENGINE_COMMAND
from vllm_disagg.profiler.steps import STEPS_ENV, cycles_s, read_steps
from vllm_disagg.profiles import load_profile

TOKEN_IDS = (300, 2000)
REST_S = 1.0
STOLEN, TRIES = 0.02, 3


@dataclass(frozen=True, kw_only=True)
class Result:
    """All engines of one dilation; times are converted."""

    num_engines: int
    dilation: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    errors: tuple[str, ...]
    late: float
    """`host_ms` as a share of the device's time for a step."""
    host_ms: float
    """What passed from launch to launch beyond the device's time, median of all steps, milliseconds of the host."""
    sent_late_s: float
    """The most by which the load generator was late, converted."""
    busy: float
    """Share of the used cores' time that was spent on anything."""
    stolen: float
    """Share of it that the hypervisor gave to others."""


@contextmanager
def engines(number: int, dilation: float, options: argparse.Namespace, folder: Path) -> Iterator[list[EmulatedEngine]]:
    """Emulated engines, ready and warm."""
    host = fork_host(folder)
    with ExitStack() as stack:
        stack.callback(host.kill)
        host.start()
        host.wait_until_ready()
        servers = [_engine(index, dilation, options, folder, str(host.socket)) for index in range(number)]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        for server in servers:
            server.wait_until_ready()
        warm = poisson(options.shape, rate_per_s=4.0, seconds=1.0, seed=(0,))
        for server in servers:
            for times in asyncio.run(drive([server.url], warm)):
                assert not times.error, f"{server.name} does not work: {times.error}"
        yield servers


def _engine(index: int, dilation: float, options: argparse.Namespace, folder: Path, socket: str) -> EmulatedEngine:
    name, port = f"engine-{index}", free_ports(1)[0]
    model = options.model or load_profile(options.profile).model.name
    argv = [
        *FORKED_ENGINE_COMMAND, socket, model, "--emulate", options.profile,
        "--dilation", str(dilation), "--port", str(port),
        "--host", "127.0.0.1", "--served-model-name", "model", "--no-enable-prefix-caching",
        "--distributed-executor-backend", "vllm_disagg.profiler.emulated.RecordingEmulatedExecutor",
    ]  # fmt: skip
    steps, faults = folder / f"{name}-{dilation:g}.steps", folder / f"{name}.faults.json"
    env = {"VLLM_NO_USAGE_STATS": "1", STEPS_ENV: str(steps)}
    return EmulatedEngine(name=name, argv=argv, log=folder / f"{name}.log", env=env, port=port, faults=faults)


async def loads(servers: Sequence[EmulatedEngine], dilation: float, options: argparse.Namespace) -> list[Times]:
    """Every engine's load at once."""

    def stretched(index: int) -> list[Request]:
        seconds = max(options.seconds, options.requests / options.rate / len(servers))
        requests = poisson(options.shape, rate_per_s=options.rate, seconds=seconds, seed=(options.seed, index))
        return [replace(request, at_s=request.at_s * dilation) for request in requests]

    answers = await asyncio.gather(*(drive([server.url], stretched(index)) for index, server in enumerate(servers)))
    return [times for of_server in answers for times in of_server]


def quietest(number: int, dilation: float, options: argparse.Namespace, folder: Path) -> Result:
    """Of a few tries the one from which the hypervisor took least."""
    tries: list[Result] = []
    while len(tries) < TRIES and not (tries and tries[-1].stolen <= STOLEN):
        place = folder / str(len(tries))
        place.mkdir()
        tries.append(measure(number, dilation, options, place))
    return min(tries, key=lambda result: result.stolen)


def measure(number: int, dilation: float, options: argparse.Namespace, folder: Path) -> Result:
    """One dilation."""
    latency = load_profile(options.profile).entry(1).latency
    with engines(number, dilation, options, folder) as servers:
        before = [len(read_steps(Path(server.env[STEPS_ENV]))) for server in servers]
        stolen, start_s, busy_s = Stolen(options.cores), time.perf_counter(), busy_seconds(options.cores)
        times = asyncio.run(loads(servers, dilation, options))
        wall_s, busy_s = time.perf_counter() - start_s, busy_seconds(options.cores) - busy_s
        time.sleep(REST_S)
        late = [
            _late(Path(server.env[STEPS_ENV]), first, latency, dilation)
            for server, first in zip(servers, before, strict=True)
        ]
    answered = [item for item in times if not item.error]
    device_s, extra_s = (float(np.median(np.concatenate(column))) for column in zip(*late, strict=True))
    return Result(
        num_engines=number,
        dilation=dilation,
        ttft_s=tuple(item.ttft_s / dilation for item in answered),
        tpot_s=tuple(item.tpot_s / dilation for item in answered),
        errors=tuple(item.error for item in times if item.error),
        late=extra_s / device_s,
        host_ms=extra_s * 1e3,
        sent_late_s=max(item.sent_late_s for item in times) / dilation,
        busy=busy_s / (wall_s * len(options.cores)),
        stolen=stolen.share(),
    )


def _late(path: Path, first: int, latency: LatencyModel, dilation: float) -> tuple[list[float], list[float]]:
    """Of the steps that another followed at once: device seconds, and what they took beyond these."""
    cycles = cycles_s(read_steps(path)[first:])
    device_s = [dilation * latency.step_s(work_of(step.requests)) for step, _ in cycles]
    return device_s, [cycle_s - own_s for (_, cycle_s), own_s in zip(cycles, device_s, strict=True)]


Figure = Callable[[Result], float]


def _percentile(values: Callable[[Result], Sequence[float]], percent: float) -> Figure:
    return lambda result: float(np.percentile(values(result), percent)) * 1e3


FIGURES: dict[str, Figure] = {
    f"{name} p{percent}": _percentile(values, percent)
    for name, values in (("TTFT", lambda result: result.ttft_s), ("TPOT", lambda result: result.tpot_s))
    for percent in (50, 90)
}
AGREE = 0.03


def distance(result: Result, reference: Result) -> float:
    """The largest relative difference of any figure."""
    return max(abs(figure(result) / figure(reference) - 1) for figure in FIGURES.values())


def references(results: Sequence[Result]) -> dict[int, Result]:
    """For each number of engines the result of the highest dilation."""
    return {result.num_engines: result for result in sorted(results, key=lambda result: result.dilation)}


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A row for each number of engines and dilation."""
    highest = references(results)
    return [
        (
            str(result.num_engines), f"{result.dilation:g}", str(len(result.ttft_s)), str(len(result.errors)),
            *(
                f"{figure(result):.1f} ({figure(result) / figure(highest[result.num_engines]) - 1:+.1%})"
                for figure in FIGURES.values()
            ),
            f"{result.host_ms:.2f}", f"{result.late:.1%}", f"{result.busy:.0%}", f"{result.stolen:.1%}",
        )
        for result in results
    ]  # fmt: skip


def verdicts(results: Sequence[Result]) -> str:
    """From which dilation on every figure agrees with the highest one's."""
    lines = []
    for number, reference in sorted(references(results).items()):
        good = None
        for result in sorted((item for item in results if item.num_engines == number), key=lambda item: -item.dilation):
            if distance(result, reference) > AGREE:
                break
            good = result.dilation
        lines.append(f"- {number} engine{'s' if number > 1 else ''}: from k = {good:g} on")
    return "\n".join(lines)


HEAD = (
    "engines", "k", "requests", "failed", *(f"{name}, ms" for name in FIGURES), "host per step, ms", "of device time",
    "cores busy", "stolen",
)  # fmt: skip


def report(results: Sequence[Result], options: argparse.Namespace, found: dict[str, str]) -> str:
    """The result as Markdown."""
    return (
        "# Emulated engines side by side, at several dilations\n\n"
        f"{fact_list(found)}\n"
        f"- profile: {options.profile}; load per engine: Poisson, {options.rate:g} requests per second for "
        f"{options.seconds:g} s or until all engines have {options.requests}, prompts of "
        f"{_span(options.shape.prompt_tokens)} tokens, {_span(options.shape.output_tokens)} output tokens, seed "
        f"{options.seed}\n\n"
        "Emulated. Times are divided by k; in brackets the difference to the highest k with as many engines. Host per\n"
        "step: what passed from a step's launch to the next one's beyond the device's own time, where the engine had\n"
        "work all the while; the median, and its share of a step on the device. A run of which the hypervisor stole\n"
        f"more than {STOLEN:.0%} was repeated, up to {TRIES} runs in all; the least disturbed one is shown.\n\n"
        f"{table(HEAD, rows(results))}\n\n"
        f"Every figure is within {AGREE:.0%} of the highest dilation's:\n\n{verdicts(results)}\n"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.emulation_dilation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", default="opt-13b-a100-80g", help="of the emulated device (default: %(default)s)")
    parser.add_argument("--model", help="a model's folder (default: the shape named in the profile)")
    parser.add_argument("--prompt-tokens", type=_whole, default=(64, 768), help="least and most (default: 64,768)")
    parser.add_argument("--output-tokens", type=_whole, default=(32, 128), help="least and most (default: 32,128)")
    parser.add_argument("--engines", type=_whole, default=(1, 4, 8), help="side by side (default: 1,4,8)")
    parser.add_argument("--dilations", type=_numbers, default=(1.0, 2.0, 3.0, 10.0), help="default: 1,2,3,10")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second and engine (default: 4)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals, on the device's clock (default: 10)")
    parser.add_argument("--requests", type=int, default=100, help="at least so many, over all engines (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="of the loads (default: 1)")
    parser.add_argument("--beside", type=Path, help="PATH.json of an earlier run whose results to show as well")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    options = parser.parse_args()
    options.cores = tuple(sorted(os.sched_getaffinity(0)))
    options.shape = LoadShape(
        prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens, token_ids=TOKEN_IDS
    )
    return options


def earlier(path: Path) -> list[Result]:
    """What another run has written, with the same loads."""
    return [Result(**result) for result in json.loads(path.read_text())["results"]]


def _span(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]}-{bounds[1]}"


def _whole(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main() -> None:
    """Measure, print, and write the result if asked to."""
    options = parse()
    results = earlier(options.beside) if options.beside else []
    with OtherLoad() as other_load, tempfile.TemporaryDirectory() as folder:
        for number in options.engines:
            for dilation in options.dilations:
                place = Path(folder) / f"{number}-{dilation:g}"
                place.mkdir()
                results.append(quietest(number, dilation, options, place))
                print(
                    rows(results)[-1], f"load generator at most {results[-1].sent_late_s * 1e3:.1f} ms late", flush=True
                )
    found = facts("benchmarks.emulation_dilation", other_load)
    results.sort(key=lambda result: (result.num_engines, result.dilation))
    text = report(results, options, found)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
        options.out.with_suffix(".json").write_text(
            json.dumps({"facts": found, "results": [dataclasses.asdict(result) for result in results]}) + "\n"
        )


if __name__ == "__main__":
    main()
