"""What our schedulers cost the host, per step, beside vLLM's own: planning, and the log of steps.

    taskset -c 0 python -m benchmarks.scheduler_cost --out benchmarks/results

A decode engine of vLLM in this process, whose device takes no time (`tests/vllm/emulated.py`), generates for many
streams. `Scheduler.schedule` and `Scheduler.update_from_output` are timed, and the two calls that note a step. Both
schedulers take turns, and who begins alternates. What counts is the processor time of the calling thread, so that other
work on the machine shows only through the caches.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.sampling_params import SamplingParams

from benchmarks.machine import OtherLoad, fact_list, facts, table
from tests.vllm.emulated import Engine
from vllm_disagg.core.keys import create_key_file

STEPS = 300
WARM_STEPS = 40
Costs = dict[str, list[float]]


def timed(owner: Any, name: str, costs: list[float]) -> None:
    """Have a method note how much processor time each call takes."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begun_s = time.thread_time()
        try:
            return original(*args, **kwargs)
        finally:
            costs.append(time.thread_time() - begun_s)

    setattr(owner, name, call)


def costs_of(side: str, streams: int, seed: int) -> dict[str, float]:
    """Microseconds per step, medians of one engine's steps."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        create_key_file(folder / "key")
        engine = Engine(
            [
                "--emulate", "llama-3-8b-a100-80g", "--dilation", "0", "--max-model-len", "1024",
                "--max-num-seqs", str(streams), "--kv-role", "decode", "--kv-key-file", str(folder / "key"),
                "--kv-control-port", str(_free_port()), "--kv-scheduling", side,
                *(("--kv-step-log", str(folder / "steps")) if side == "phase" else ()),
            ]
        )  # fmt: skip
        wish = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
        names = [engine.add([rng.randrange(5000, 27000) for _ in range(32)], wish) for _ in range(streams)]
        engine.run_until(lambda: all(engine.answers[name].tokens for name in names))
        for _ in range(WARM_STEPS):
            engine.step()
        costs: Costs = {"schedule": [], "update": [], "note a step": [], "write and learn": []}
        scheduler = engine.scheduler
        timed(scheduler, "schedule", costs["schedule"])
        timed(scheduler, "update_from_output", costs["update"])
        timed(scheduler, "_after", costs["note a step"])
        timed(scheduler.measure, "done", costs["write and learn"])
        for _ in range(STEPS):
            engine.step()
        engine.core.abort_requests(names)
        engine.settle()
        engine.stop()
    return {name: 1e6 * statistics.median(found) for name, found in costs.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(found: dict[int, dict[str, list[dict[str, float]]]], about: dict[str, str]) -> str:
    """As Markdown."""
    lines = []
    for streams, sides in found.items():
        for side, runs in sides.items():
            cells = [_spread([run[name] for run in runs]) for name in ("schedule", "update")]
            noted = [run["note a step"] + run["write and learn"] for run in runs]
            lines.append((str(streams), f"`{side}`", *cells, _spread(noted)))
    head = ("streams", "`--kv-scheduling`", "schedule, µs", "update, µs", "of these, the step log, µs")
    text = (
        "Processor time per step of a decode engine's scheduler: medians over steps, then over repetitions, least and "
        "most in brackets. `phase` plans, notes each step, writes it to `--kv-step-log` and learns from it; `vllm` "
        "notes it and learns."
    )
    return "\n".join(
        ["# What the schedulers cost the host", "", text, "", table(head, lines), "", fact_list(about), ""]
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; nothing is written without it")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[int, dict[str, list[dict[str, float]]]] = {
        streams: {"vllm": [], "phase": []} for streams in options.streams
    }
    with OtherLoad() as other_load:
        for repetition in range(options.repetitions):
            for streams, sides in found.items():
                for side in sorted(sides, reverse=repetition % 2 == 0):
                    sides[side].append(costs_of(side, streams, repetition))
    about = facts("benchmarks.scheduler_cost", other_load)
    text = report(found, about)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scheduler_cost.md").write_text(text)
        (options.out / "scheduler_cost.json").write_text(json.dumps({"facts": about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
