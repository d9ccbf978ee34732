"""What our schedulers cost the host, per step, beside vLLM's own: planning, and the log of steps.

    taskset -c 0 python -m benchmarks.scheduler_cost --out benchmarks/results

Decode engines of vLLM in this process, whose device takes no time (`tests/vllm/emulated.py`), generate for as many
streams each: one without a role, that is vLLM's own scheduler, and two with one. They take turns of some steps, and
who begins alternates. In the first load the same streams run all the time; in the second, one ends with about every
step, and another comes. `Scheduler.schedule` and `Scheduler.update_from_output` are timed, and the two calls that note
a step. What counts is the processor time of the calling thread, so that other work on the machine shows only through
the caches.
"""

from __future__ import annotations

import argparse
import json
import logging
import operator
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

STEPS = 40
"""Of an engine's turn."""

WARM_STEPS = 20
SIDES = ("stock", "vllm", "phase")
"""vLLM without this project, then `--kv-scheduling`."""

LOADS = ("the same streams", "one ends with every step")
CALLS = ("schedule", "update_from_output", "_after", "measure.done")
MEAN = "mean of schedule and update_from_output"
Costs = dict[str, float]


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


class Side:
    """One engine, with as many streams as it has slots.

    Args:
        name: one of `SIDES`.
        streams: how many.
        load: one of `LOADS`.
        folder: for its key and its log of steps.
    """

    def __init__(self, name: str, streams: int, load: str, folder: Path) -> None:
        folder.mkdir()
        self.engine = Engine(
            [
                "--emulate", "llama-3-8b-a100-80g", "--dilation", "0", "--max-model-len", "1024",
                "--max-num-seqs", str(streams), *(_role_flags(name, folder) if name != "stock" else ()),
            ]
        )  # fmt: skip
        self._costs: dict[str, list[float]] = {call: [] for call in CALLS}
        self._rng = random.Random(streams)
        self._length = 900 if load == LOADS[0] else streams
        self._comes_and_goes = load != LOADS[0]
        self._names = [self._add(self._length - place * self._comes_and_goes) for place in range(streams)]
        self.engine.run_until(lambda: all(self.engine.answers[name].tokens for name in self._names))
        for call in CALLS[:2] if name == "stock" else CALLS:
            owner, _, method = f"scheduler.{call}".rpartition(".")
            timed(operator.attrgetter(owner)(self.engine), method, self._costs[call])

    def turn(self, steps: int) -> Costs:
        """Microseconds per step, medians of so many steps, and one mean."""
        for found in self._costs.values():
            found.clear()
        for _ in range(steps):
            self.engine.step()
            if self._comes_and_goes:
                self._names = [name if self._runs(name) else self._add(self._length) for name in self._names]
        costs = {call: 1e6 * statistics.median(found) if found else 0.0 for call, found in self._costs.items()}
        costs[MEAN] = 1e6 * sum(statistics.fmean(self._costs[call]) for call in CALLS[:2])
        return costs

    def _add(self, length: int) -> str:
        wish = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        return self.engine.add([self._rng.randrange(5000, 27000) for _ in range(32)], wish)

    def _runs(self, name: str) -> bool:
        return self.engine.answers[name].finish_reason is None

    def stop(self) -> None:
        """End it."""
        self.engine.core.abort_requests(self._names)
        self.engine.settle()
        self.engine.stop()


def _role_flags(scheduling: str, folder: Path) -> list[str]:
    create_key_file(folder / "key")
    flags = [
        "--kv-role", "decode", "--kv-key-file", str(folder / "key"), "--kv-control-port", str(_free_port()),
        "--kv-scheduling", scheduling,
    ]  # fmt: skip
    return [*flags, "--kv-step-log", str(folder / "steps")] if scheduling == "phase" else flags


def costs_of(streams: int, load: str, repetitions: int) -> list[dict[str, Costs]]:
    """Each side's costs, of each repetition."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(name, streams, load, Path(folder) / name) for name in SIDES}
        for side in sides.values():
            side.turn(WARM_STEPS)
        for repetition in range(repetitions):
            line = SIDES if repetition % 2 == 0 else SIDES[::-1]
            turns = {name: sides[name].turn(STEPS) for name in line}
            found.append({name: turns[name] for name in SIDES})
        for side in sides.values():
            side.stop()
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def report(found: dict[str, dict[int, list[dict[str, Costs]]]], about: dict[str, str]) -> str:
    """As Markdown."""
    text = (
        "Processor time per step of a decode engine's scheduler: medians over the steps of a turn, then over turns, "
        "least and most in brackets; the last two columns are of pairs of turns, and the very last one of the means of "
        "turns. `phase` plans, notes each step, writes it to `--kv-step-log` and learns from it; `vllm` notes it and "
        "learns."
    )
    parts = ["# What the schedulers cost the host", "", text, ""]
    for load, by_streams in found.items():
        parts += [f"## Load: {load}", "", _table(by_streams), ""]
    return "\n".join([*parts, fact_list(about), ""])


def _table(found: dict[int, list[dict[str, Costs]]]) -> str:
    lines = []
    for streams, turns in found.items():
        for side in SIDES:
            costs = [turn[side] for turn in turns]
            more = [_whole(turn[side]) - _whole(turn["stock"]) for turn in turns]
            mean = [turn[side][MEAN] - turn["stock"][MEAN] for turn in turns]
            lines.append(
                (
                    str(streams),
                    "none: stock vLLM" if side == "stock" else f"`{side}`",
                    _spread([cost["schedule"] for cost in costs]),
                    _spread([cost["update_from_output"] for cost in costs]),
                    _spread([cost["_after"] + cost["measure.done"] for cost in costs]) if side != "stock" else "",
                    _spread(more) if side != "stock" else "",
                    _spread(mean) if side != "stock" else "",
                )
            )
    head = (
        "streams", "`--kv-scheduling`", "schedule, µs", "update, µs", "of these, noting steps, µs",
        "both, more than stock, µs", "means, more than stock, µs",
    )  # fmt: skip
    return table(head, lines)


def _whole(costs: Costs) -> float:
    return costs["schedule"] + costs["update_from_output"]


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--loads", choices=LOADS, nargs="+", default=list(LOADS))
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; nothing is written without it")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with OtherLoad() as other_load:
        found = {
            load: {streams: costs_of(streams, load, options.repetitions) for streams in options.streams}
            for load in options.loads
        }
    about = facts("benchmarks.scheduler_cost", other_load)
    text = report(found, about)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scheduler_cost.md").write_text(text)
        (options.out / "scheduler_cost.json").write_text(json.dumps({"facts": about, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
