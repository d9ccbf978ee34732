"""Where a request's time to its first event went, as the standard `Server-Timing` header tells it."""

from __future__ import annotations

import asyncio

STAGES = {
    "admit": "From arrival to the first leg: reading the body, choosing instances.",
    "prefill_queue": "Waiting on the prefill instance, by its own account.",
    "prefill_run": "Computing the prompt there, by its own account.",
    "prefill_http": "The rest of the prefill leg: HTTP, rendering, tokenising.",
    "prefill_lost": "Prefill legs that came to nothing.",
    "handover": "From prefill's answer to decode's first event: transfer, queue, first step.",
    "local": "From sending the request to decode's first event when decode computes the prompt itself.",
}
"""Every stage that may appear, and what it covers. Those of one answer add up to its time to first event."""


class StageClock:
    """Splits the time since a request's arrival into stages, without gaps."""

    def __init__(self, arrived_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._since_s = arrived_s
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """The time since the last lap belongs to this stage."""
        self._add(stage, self._passed_s())

    def lap_prefill(self, queue_s: float, run_s: float) -> None:
        """The time since the last lap was a prefill leg that spent so much of it in the engine."""
        passed_s = self._passed_s()
        queue_s = min(queue_s, passed_s)
        run_s = min(run_s, passed_s - queue_s)
        self._add("prefill_queue", queue_s)
        self._add("prefill_run", run_s)
        self._add("prefill_http", passed_s - queue_s - run_s)

    def header(self) -> str:
        """The value of `Server-Timing`, in milliseconds."""
        return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in self._stages.items())

    def _passed_s(self) -> float:
        now_s = self._loop.time()
        passed_s, self._since_s = now_s - self._since_s, now_s
        return passed_s

    def _add(self, stage: str, seconds: float) -> None:
        self._stages[stage] = self._stages.get(stage, 0.0) + seconds
