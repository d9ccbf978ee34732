"""The first row of `benchmarks.schedulers` on real engines: SmolLM2-135M on a CPU.

    taskset -c 0,1 python -m benchmarks.schedulers_real --out benchmarks/results

Two decode instances, one with `--kv-scheduling phase`, one with `--kv-scheduling vllm`, otherwise the same. They take
turns with the same requests, and who begins alternates; whoever is not asked sleeps. The model computes on one core,
everything else (HTTP, both schedulers, the client) shares the other one. Nobody has a profile: ours learns how long its
steps take while it warms up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.load import Request, drive
from benchmarks.machine import OtherLoad, facts
from benchmarks.schedulers import SIDES, Figures, Row, metrics_of, report, stream_figures, words
from tests.e2e.engines import Server, core, engine
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import work_of
from vllm_disagg.core.steps import RecordedStep, read_steps
from vllm_disagg.demo.model import smollm2_path
from vllm_disagg.planner.fit import Fit, Point, fit_latency

STREAMS, RECOMPUTES, RECOMPUTED_TOKENS = 8, 5, 1500
OUTPUT_TOKENS = 160
SETTLED_S = 2.0
REST_S = 2.0
"""Between two runs, so that nothing of one is left in the next."""


def stream_requests(repetition: int) -> list[Request]:
    """Streams that begin at once, and prompts that come while they generate."""
    rng = np.random.default_rng([11, repetition])
    streams = [Request(at_s=0.0, prompt=words(rng, 64), num_output_tokens=OUTPUT_TOKENS) for _ in range(STREAMS)]
    late = [
        Request(
            at_s=SETTLED_S + 1.0 + 2.0 * number + float(rng.uniform(0, 0.5)),
            prompt=words(rng, RECOMPUTED_TOKENS),
            num_output_tokens=2,
        )
        for number in range(RECOMPUTES)
    ]
    return [*streams, *late]


def warm_requests(repetition: int) -> list[Request]:
    """Steps of all kinds, for whoever learns from them: prompts alone, streams alone, both."""
    rng = np.random.default_rng([12, repetition])
    alone, at_s = [], 0.0
    for length in (64, 300, 128, 500, 200, 32, 100, 400, 250, 150):
        alone.append(Request(at_s=at_s, prompt=words(rng, length), num_output_tokens=1))
        at_s += 0.3 + 0.006 * length  # one core may need so long
    streams = [Request(at_s=at_s, prompt=words(rng, 64), num_output_tokens=150) for _ in range(STREAMS)]
    beside = [
        Request(at_s=at_s + 3.0 + 0.6 * number, prompt=words(rng, rng.integers(16, 257)), num_output_tokens=1)
        for number in range(40)
    ]
    return [*alone, *streams, *beside]


def brief_requests() -> list[Request]:
    """For whoever learns nothing: what a first request costs more than others."""
    rng = np.random.default_rng(13)
    return [Request(at_s=0.0, prompt=words(rng, 64), num_output_tokens=10) for _ in range(STREAMS)]


def row(target_s: float) -> Row:
    """What is compared."""
    return Row(
        name="pace, real engines",
        what=f"{STREAMS} streams of {OUTPUT_TOKENS} tokens on a decode instance, {RECOMPUTES} prompts of "
        f"{RECOMPUTED_TOKENS} tokens are computed beside them; TPOT target {1e3 * target_s:g} ms",
        requests=stream_requests,
        figures=lambda times, metrics, requests: stream_figures(
            times, metrics, requests, streams=STREAMS, settled_s=SETTLED_S
        ),
        warm=warm_requests,
        split=False,
        flags=lambda role, k: ["--kv-slo-tpot-s", str(target_s)],
    )


def start(stack: ExitStack, side: str, model: Path, folder: Path, options: argparse.Namespace) -> Server:
    """One decode instance; `start` does not wait for it."""
    folder.mkdir()
    key_file = folder / "key"
    create_key_file(key_file)
    flags = ["--dtype", options.dtype, "--kv-scheduling", side, "--kv-step-log", str(folder / "steps")]
    flags += row(options.target_s).flags("decode", 1.0) if side == "phase" else []
    made = engine(side, model=model, index=0, folder=folder, key_file=key_file, role="decode", flags=flags)
    # What an earlier run has learned is not known.
    made = replace(made, env={**made.env, "XDG_CACHE_HOME": str(folder / "cache")})
    stack.callback(made.kill)
    made.start()
    return made


def leave_alone_the_worker(server: Server) -> None:
    """The worker has bound itself to the first core; keep all other processes of the engine off it, above all the
    scheduler's, which spins while a step runs."""
    for process in server.tree():
        if not process.name().startswith("VLLM::Worker"):
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, {core(1)})


async def once(which: Row, server: Server, requests: Sequence[Request]) -> Figures:
    """One run of one side."""
    before = await asyncio.to_thread(metrics_of, server)
    times = await drive([server.url], requests)
    failed = [one.error for one in times if one.error]
    if failed:
        raise SystemExit(f"{server.name}: {len(failed)} requests failed: {failed[0]}")
    after = await asyncio.to_thread(metrics_of, server)
    return which.figures(times, {name: value - before.get(name, 0.0) for name, value in after.items()}, requests)


async def run(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Figures]], list[RecordedStep]]:
    """All repetitions, and the steps that ours has noted."""
    which, results = row(options.target_s), list[dict[str, Figures]]()
    with ExitStack() as stack:
        model = smollm2_path()
        servers = {side: start(stack, side, model, folder / side, options) for side in SIDES}
        for server in servers.values():
            await asyncio.to_thread(server.wait_until_ready)
            leave_alone_the_worker(server)
        os.sched_setaffinity(0, {core(1)})  # the client too
        for repetition in range(options.warm_ups):
            for server in servers.values():
                begun_s = time.monotonic()
                await drive([server.url], warm_requests(repetition) if server.name == "phase" else brief_requests())
                print(f"{server.name}: warm after {time.monotonic() - begun_s:.0f} s", flush=True)
        for repetition in range(options.repetitions):
            found: dict[str, Figures] = {}
            for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
                await asyncio.sleep(REST_S)
                found[side] = await once(which, servers[side], stream_requests(repetition))
            results.append({side: found[side] for side in SIDES})
            print(which.name, repetition, json.dumps(results[-1]), flush=True)
        steps = read_steps(folder / "phase" / "steps")
    return results, steps


def fitted(steps: Sequence[RecordedStep]) -> Fit:
    """What the planner makes of a scheduler's step log."""
    return fit_latency([Point(work=work_of(step.requests), seconds=step.step_s) for step in steps])


def about(options: argparse.Namespace, steps: Sequence[RecordedStep]) -> str:
    """What was run, and what the step log is good for."""
    errors = "; ".join(
        f"{region} {error.num_points} steps, off by {error.median:.1%} at the median and {error.p90:.1%} at the 90th "
        "percentile"
        for region, error in fitted(steps).errors.items()
    )
    return (
        f"**Real engines**, SmolLM2-135M-Instruct in {options.dtype} on one CPU core, not a GPU. "
        f"{options.repetitions} repetitions; both instances took turns with the same requests. Medians, least and most "
        "in brackets.\n\n"
        f"`vllm_disagg.planner.fit` over the step log of `phase`, on steps that were left out of the fit: {errors}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--target-s", type=float, default=0.6, help="TPOT target of ours")
    parser.add_argument("--dtype", default="float32", help="float32 is fastest where a core has no bfloat16")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; nothing is written without it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the engines end with us
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name, OtherLoad() as other_load:
        results, steps = asyncio.run(run(options, Path(name)))
    os.sched_setaffinity(0, cores)
    found = facts("benchmarks.schedulers_real", other_load)
    which = row(options.target_s)
    text = report({which.name: results}, found, about(options, steps), rows=(which,))
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "schedulers_real.md").write_text(text)
        (options.out / "schedulers_real.json").write_text(
            json.dumps({"facts": found, "rows": {which.name: results}}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
