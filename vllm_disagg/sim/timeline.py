"""What happened in a simulated run, for eyes: a trace in Chrome's JSON format, which ui.perfetto.dev opens.

Each instance is a process with a row per pipeline stage that its steps may occupy at once, a row for transfers into it
and a counter of its KV blocks. Requests are a process of their own, a row for each that is under way, with the phases
of its first token.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.outcome import PHASES, PREEMPTION, STEP, TRANSFER, Outcome
from vllm_disagg.sim.system import System

_TRANSFERS: Final = 1000
_REQUESTS: Final = 10_000


def chrome_trace(system: System, outcome: Outcome, *, window_s: tuple[float, float]) -> dict[str, Any]:
    """The trace document.

    Args:
        system: what was simulated.
        outcome: its run, with a log.
        window_s: what overlaps this span is in it, seconds since the workload's start.

    Raises:
        ConfigError: the run has no log, or the window is empty.
    """
    begin_s, end_s = window_s
    if not (math.isfinite(begin_s) and begin_s < end_s):
        raise ConfigError(f"a timeline needs a window that ends after it begins, not {begin_s:g} to {end_s:g} s")
    if len(outcome.log) == 0:
        raise ConfigError("a timeline needs the run's log: simulate with log=True")
    events = [
        *_names(system),
        *_engine_events(outcome, begin_s, end_s),
        *_request_events(outcome, begin_s, end_s),
    ]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _names(system: System) -> Iterator[dict[str, Any]]:
    num_prefill = len(system.prefill)
    for number in range(len(system.engines)):
        if number < num_prefill:
            name = f"prefill {number}"
        else:
            name = f"{'decode' if num_prefill else 'colocated'} {number - num_prefill}"
        yield _named("process_name", number, 0, name)
        for stage in range(system.engines[number].pp):
            yield _named("thread_name", number, stage, "steps" if stage == 0 else f"steps under way, {stage + 1}")
        if num_prefill and number >= num_prefill:
            yield _named("thread_name", number, _TRANSFERS, "KV transfers")
    yield _named("process_name", _REQUESTS, 0, "requests, to their first decoded token")


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _engine_events(outcome: Outcome, begin_s: float, end_s: float) -> Iterator[dict[str, Any]]:
    rows: dict[tuple[int, int], _Rows] = {}
    for kind, start_s, stop_s, instance, request, a, b, c in outcome.log.tolist():
        if stop_s < begin_s or start_s > end_s:
            continue
        pid = int(instance)
        if kind == STEP:
            row = rows.setdefault((pid, 0), _Rows()).take(start_s, stop_s)
            yield _span(_step_name(int(a), int(b)), pid, row, start_s, stop_s, prompt_tokens=a, decoding=b)
            yield {
                "ph": "C", "name": "KV blocks in use", "pid": pid, "ts": start_s * 1e6, "args": {"blocks": c},
            }  # fmt: skip
        elif kind == TRANSFER:
            row = _TRANSFERS + rows.setdefault((pid, _TRANSFERS), _Rows()).take(start_s, stop_s)
            name = f"request {request:.0f}" + ("" if c else ", failed")
            yield _span(name, pid, row, start_s, stop_s, blocks=b, sender=a)
        elif kind == PREEMPTION:
            yield {
                "ph": "i", "s": "p", "name": f"request {request:.0f} loses its blocks", "pid": pid, "tid": 0,
                "ts": start_s * 1e6, "args": {"tokens": a},
            }  # fmt: skip


def _request_events(outcome: Outcome, begin_s: float, end_s: float) -> Iterator[dict[str, Any]]:
    phases, rows = outcome.phases(), _Rows()
    for index in range(len(outcome)):
        start_s = float(outcome.arrival_s[index])
        lengths = [float(phases[name][index]) for name in PHASES]
        if any(math.isnan(length) for length in lengths):
            continue
        stop_s = start_s + sum(lengths)
        if stop_s < begin_s or start_s > end_s:
            continue
        row, at_s = rows.take(start_s, stop_s), start_s
        for name, length in zip(PHASES, lengths, strict=True):
            if length > 0:
                yield _span(f"{index}: {name.replace('_', ' ')}", _REQUESTS, row, at_s, at_s + length, request=index)
            at_s += length


def _step_name(prompt_tokens: int, decoding: int) -> str:
    parts = [f"{prompt_tokens} prompt tokens"] if prompt_tokens else []
    return ", ".join([*parts, f"{decoding} decoding"] if decoding else parts)


def _span(name: str, pid: int, tid: int, start_s: float, stop_s: float, **details: float) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start_s * 1e6, "dur": (stop_s - start_s) * 1e6,
        "args": details,
    }  # fmt: skip


class _Rows:
    """Rows for spans of which some overlap: each goes into the first row that is free. Spans come by their start."""

    def __init__(self) -> None:
        self._busy: list[tuple[float, int]] = []
        self._free: list[int] = []
        self._num = 0

    def take(self, start_s: float, stop_s: float) -> int:
        while self._busy and self._busy[0][0] <= start_s + 1e-9:
            heapq.heappush(self._free, heapq.heappop(self._busy)[1])
        if self._free:
            row = heapq.heappop(self._free)
        else:
            row, self._num = self._num, self._num + 1
        heapq.heappush(self._busy, (stop_s, row))
        return row


def parse_window(text: str) -> tuple[float, float]:
    """`FROM,TO` in seconds.

    Raises:
        ConfigError: it is something else.
    """
    parts: Sequence[str] = text.split(",")
    try:
        begin_s, end_s = (float(part) for part in parts)
    except ValueError:
        begin_s = end_s = math.nan
    if not 0 <= begin_s < end_s:
        raise ConfigError(f"expected a window as FROM,TO in seconds, such as 60,90, not {text!r}")
    return begin_s, end_s
