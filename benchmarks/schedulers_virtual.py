"""The comparison of `benchmarks.schedulers` without waiting: the device's time is a number that is added up.

    python -m benchmarks.schedulers_virtual --out benchmarks/results

vLLM's own EngineCore, scheduler and block pool and this project's connector and schedulers run in one process, a step
at a time (`tests/vllm/emulated.py`). A step takes what the profile says of the work that the scheduler put into it; the
host and the network take nothing, besides 5 ms for each hand-over. So a run depends on nothing but its requests, and a
busy machine does not show. What it cannot show is HTTP, the proxy and the host's time: for that is
`benchmarks.schedulers`.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import logging
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams

from benchmarks.load import Request, Times
from benchmarks.machine import OtherLoad, facts
from benchmarks.schedulers import BLOCK_SIZE, LATENCY, PROFILE, ROWS, SIDES, Figures, Row, report
from tests.vllm.emulated import Engine
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import work_of
from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.scheduler import planned

HANDOFF_S = 0.005
_SETTLE_S = 5.0


class Clock:
    """The device's time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """As `time.monotonic`, for the schedulers."""
        return self.now_s


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A step, and how its engine stood when it was made.

    Args:
        at_s: when it began.
        step_s: how long it took.
        tokens: request and how many tokens it computes.
        preempted: who lost its KV for it.
        kv_here: who waits with its KV in this engine's cache.
        waiting: who waits without.
        used_blocks: of the cache, while it runs.
    """

    at_s: float
    step_s: float
    tokens: tuple[tuple[str, int], ...]
    preempted: tuple[str, ...]
    kv_here: tuple[str, ...]
    waiting: tuple[str, ...]
    used_blocks: int


@dataclass(eq=False)
class Device:
    """One engine, and until when it is busy."""

    engine: Engine
    clock: Clock
    free_s: float = 0.0
    steps: list[RecordedStep] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    ended: list[tuple[str, int, bool]] = field(default_factory=list)
    """Of the step under way: request, new tokens, whether it ends."""

    def __post_init__(self) -> None:
        self._work: tuple[tuple[int, int], ...] = ()
        measure = self.engine.scheduler.measure
        measure.scheduled = self._scheduled
        measure.done = lambda *args, **kwargs: None
        self.engine.scheduler.connector.scheduler_stats.reset = lambda: None

    def _scheduled(self, step: Any, requests: tuple[tuple[int, int], ...], *, now_s: float) -> None:
        self._work = requests
        if requests:
            self._note(step, LATENCY.step_s(work_of(requests)))

    def _note(self, step: Any, step_s: float) -> None:
        scheduler = self.engine.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        self.moments.append(
            Moment(
                at_s=self.clock.now_s,
                step_s=step_s,
                tokens=tuple(step.num_scheduled_tokens.items()),
                preempted=tuple(step.preempted_req_ids or ()),
                kv_here=tuple(request.request_id for request in scheduler.kv_holding_waiting),
                waiting=tuple(request.request_id for request in scheduler.waiting),
                used_blocks=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            )
        )

    def begin(self) -> bool:
        """Make a step at this moment if there is something to compute. Its tokens come at `free_s`."""
        deadline_s = time.monotonic() + _SETTLE_S
        while self.engine.scheduler.has_requests():
            before = {name: len(answer.tokens) for name, answer in self.engine.answers.items()}
            self._work = ()
            self.engine.step()
            if self._work:
                step_s = LATENCY.step_s(work_of(self._work))
                self.steps.append(RecordedStep(at_s=self.clock.now_s, step_s=step_s, requests=self._work))
                self.free_s = self.clock.now_s + step_s
                self.ended = [
                    (name, len(answer.tokens) - before[name], answer.finish_reason is not None)
                    for name, answer in self.engine.answers.items()
                    if len(answer.tokens) > before[name]
                ]
                return True
            if not self._is_fetching() or time.monotonic() > deadline_s:
                return False
            time.sleep(0.0002)
            self.settle()  # all that was parked together comes together
        return False

    def settle(self) -> None:
        """Wait until what is being fetched is here: that takes no time of the device."""
        control = getattr(self.engine.scheduler.connector._decode, "_control", None)
        deadline_s = time.monotonic() + _SETTLE_S
        while control is not None and time.monotonic() < deadline_s:
            states = [
                request.status.name == "WAITING_FOR_REMOTE_KVS"
                or self.engine.scheduler.connector.outlook(request) == "unknown"
                for request in self.engine.scheduler.requests.values()
                if request.status.name != "RUNNING"
                and request.request_id not in self.engine.scheduler.finished_recving_kv_req_ids
            ]
            if sum(states) <= len(control._reports):
                return
            time.sleep(0.0002)

    def _is_fetching(self) -> bool:
        """Whether KV is on its way, which takes no time here."""
        scheduler = self.engine.scheduler
        return any(
            request.status.name == "WAITING_FOR_REMOTE_KVS"
            or scheduler.connector.outlook(request) in ("unknown", "fetch")
            for request in scheduler.requests.values()
            if request.status.name != "RUNNING"
        )


class Deployment:
    """A prefill and a decode engine on one clock.

    Args:
        row: the comparison.
        side: `--kv-scheduling`.
        folder: for the deployment's key.
        more_flags: by role, after all others.
        early: whether decode's connector hears of a request when it arrives, as from vLLM's input thread.
    """

    def __init__(
        self,
        row: Row,
        side: str,
        folder: Path,
        more_flags: Mapping[str, Sequence[str]] = MappingProxyType({}),
        *,
        early: bool = False,
    ) -> None:
        self.clock = Clock()
        create_key_file(folder / "key")
        shared = [
            "--emulate", PROFILE, "--dilation", "0", "--block-size", str(BLOCK_SIZE), "--max-model-len", "2048",
            "--kv-key-file", str(folder / "key"), "--kv-control-port", str(_free_port()), "--kv-scheduling", side,
            "--no-kv-back-pressure",
            "--kv-lease-s", "600", "--kv-pull-timeout-s", "60",
        ]  # fmt: skip
        ours = ["--kv-profile", PROFILE] if side == "phase" else []

        def device(role: str) -> Device:
            flags = [*shared, *(row.both_flags if role == "decode" else ())]
            flags += [*ours, *row.flags(role, 1.0)] if side == "phase" else []
            return Device(Engine([*flags, *more_flags.get(role, ()), "--kv-role", role]), self.clock)

        self._real_time = planned.time
        planned.time = SimpleNamespace(monotonic=self.clock.monotonic)  # type: ignore[assignment]
        self.prefill, self.decode = device("prefill"), device("decode")
        self.place: dict[str, tuple[int, str]] = {}
        """Of each engine's request: the client's number and the transfer."""
        if early:
            _tell_of_arrivals(self.decode.engine)

    def run(self, requests: Sequence[Request], *, split: bool) -> list[Times]:
        """Serve these requests. Returns what their clients would have seen."""
        clock, begun_s = self.clock, self.clock.now_s
        numbers = itertools.count()
        events: list[tuple[float, int, Any]] = []
        due_s = [begun_s + request.at_s for request in requests]
        seen: list[list[float]] = [[] for _ in requests]
        self.place = place = dict[str, tuple[int, str]]()
        for index in range(len(requests)):
            heapq.heappush(events, (due_s[index], next(numbers), ("arrive", index, None)))
        left = len(requests)
        while left:
            clock.now_s = events[0][0]
            while events and events[0][0] == clock.now_s:
                kind, index, what = heapq.heappop(events)[2]
                if kind == "step":
                    for name, number, ends in what.ended:
                        if name not in place:
                            continue
                        index, transfer_id = place[name]
                        if what is self.decode:
                            seen[index] += [clock.now_s - due_s[index]] * number
                            left -= ends
                        elif ends:
                            event = ("handed", index, (transfer_id, what.engine.answers[name].kv_transfer_params))
                            heapq.heappush(events, (clock.now_s + HANDOFF_S, next(numbers), event))
                    what.ended = []
                    continue
                request = requests[index]
                hints = _hints(request, clock.now_s - due_s[index])
                transfer_id = new_transfer_id() if kind == "arrive" else what[0]
                to_prefill = kind == "arrive" and split
                params = None
                if to_prefill:
                    params = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
                elif split:
                    params = {"do_remote_prefill": True, "transfer_id": transfer_id, "handoff": what[1]["handoff"]}
                sampling = SamplingParams(
                    temperature=0.0,
                    max_tokens=1 if to_prefill else request.num_output_tokens,
                    ignore_eos=to_prefill or not request.may_end,
                    extra_args=hints or None,
                )
                device = self.prefill if to_prefill else self.decode
                name = device.engine.add(list(request.prompt), sampling, kv_params=params)
                place[name] = (index, transfer_id)
            for device in (self.prefill, self.decode, self.prefill):  # what decode has fetched makes room on prefill
                self.decode.settle()
                if device.free_s <= clock.now_s and device.begin():
                    heapq.heappush(events, (device.free_s, next(numbers), ("step", -1, device)))
            if not events and left:
                raise SystemExit(f"nothing happens any more, and {left} requests are not answered")
        return [
            Times(
                num_prompt_tokens=len(request.prompt),
                num_output_tokens=request.num_output_tokens,
                sent_late_s=0.0,
                token_times_s=tuple(times),
            )
            for request, times in zip(requests, seen, strict=True)
        ]

    def counters(self) -> dict[str, float]:
        """What decode has counted."""
        data = self.decode.engine.scheduler.connector.scheduler_stats.data
        return {name: float(value) for name, value in data.items() if not isinstance(value, list)}

    def stop(self) -> None:
        """Come to rest, with empty pools, and end. Schedulers that come later have the real time again."""
        for device in (self.decode, self.prefill):
            device.engine.settle()
            device.engine.stop()
        planned.time = self._real_time


def _tell_of_arrivals(engine: Engine) -> None:
    """What `scheduler/arrivals.py` does to an engine in a process of its own."""
    prepare = engine.core.preprocess_add_request

    def prepared(request: Any) -> Any:
        found = prepare(request)
        engine.scheduler.connector.on_arrival(found[0])
        return found

    engine.core.preprocess_add_request = prepared


def run_side(row: Row, side: str, repetition: int, out: Path | None) -> Figures:
    """One side of one repetition."""
    with tempfile.TemporaryDirectory() as name:
        deployment = Deployment(row, side, Path(name))
        deployment.run(row.warm(repetition), split=row.split)
        before, steps = deployment.counters(), len(deployment.decode.steps)
        prefill_steps, begun_s = len(deployment.prefill.steps), deployment.clock.now_s
        requests = row.requests(repetition)
        times = deployment.run(requests, split=row.split)
        after = deployment.counters()
        if out is not None and repetition == 0:
            for role, device, first in (
                ("decode", deployment.decode, steps),
                ("prefill", deployment.prefill, prefill_steps),
            ):
                if device.steps[first:]:
                    _write(out / f"schedulers_{row.name}_{side}_{role}.steps", device.steps[first:], begun_s)
        deployment.stop()
    return row.figures(times, {key: value - before.get(key, 0.0) for key, value in after.items()}, requests)


def _write(file: Path, steps: Sequence[RecordedStep], begun_s: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        RecordedStep(at_s=step.at_s - begun_s, step_s=step.step_s, requests=step.requests).line() for step in steps
    )
    file.write_text("".join(lines))


def _hints(request: Request, elapsed_s: float) -> dict[str, float]:
    """What the proxy would hand on: of the time to the first token what is left."""
    hints = {}
    if "slo" in request.extra:
        hints["slo_ttft_ms"] = 1e3 * max(0.001, request.extra["slo"] - elapsed_s)
    if "tpot" in request.extra:
        hints["slo_tpot_ms"] = 1e3 * request.extra["tpot"]
    return hints


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], choices=[row.name for row in ROWS])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; nothing is written without it")
    parser.add_argument("--steps", type=Path, default=None, help="folder for step logs of the first repetition")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results: dict[str, list[dict[str, Figures]]] = {}
    with OtherLoad() as other_load:
        for row in (row for row in ROWS if row.name in options.rows):
            for repetition in range(options.repetitions):
                found = {side: run_side(row, side, repetition, options.steps) for side in SIDES}
                results.setdefault(row.name, []).append(found)
                print(row.name, repetition, json.dumps(found), flush=True)
    about = (
        f"**Emulated, in virtual time**: {PROFILE}, step times a guess (see its `source`). vLLM's scheduler, block "
        "pool and our connector are real; a step takes what the profile says, the host nothing, a hand-over "
        f"{1e3 * HANDOFF_S:g} ms. {options.repetitions} repetitions, each with requests of its own, the same on both "
        "sides. Medians, least and most in brackets."
    )
    text = report(results, facts("benchmarks.schedulers_virtual", other_load), about)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "schedulers_virtual.md").write_text(text)
        (options.out / "schedulers_virtual.json").write_text(json.dumps({"rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
