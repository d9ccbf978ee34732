"""What a simulated run gives: when each request passed each point, and what the engines did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vllm_disagg.core.slo import SLO
from vllm_disagg.sim.workload import Floats, Ints

PHASES: Final = ("prefill_queue", "prefill_run", "kv_transfer", "decode_queue", "first_decode_step")
"""The stages of a request's life up to its first decoded token, in order. For a request that one instance served alone
only the first two are not 0, and its first token ends the second."""

STEP, TRANSFER, PREEMPTION, FINISH, DISPATCH = range(5)
"""What a row of `Outcome.log` is about; its first column."""

LOG_COLUMNS: Final = ("kind", "start_s", "end_s", "instance", "request", "a", "b", "c")
"""Columns of `Outcome.log`. `a`, `b`, `c` are for a step its new prompt tokens, its decoding requests and the blocks in
use on its instance; for a transfer the sending instance, the blocks and whether it succeeded; for a preemption the
tokens thrown away; for a dispatch the prefill instance or -1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """One run. An array entry per request, in the workload's order; times in seconds since the workload's start, NaN
    where a request never got there.

    Args:
        arrival_s: when it arrived.
        prefill_start_s, prefill_end_s: its prompt's first step began, its last one ended.
        transfer_start_s, transfer_end_s: its KV moved.
        decode_start_s, first_decode_s: its first step on the decode instance began and ended, where it was split.
        first_token_s, finish_s: its client got its first token and its last one.
        longest_gap_s: between two of its tokens.
        output_tokens: it was asked for.
        prefill_instance, decode_instance: who served it; -1 for none. Numbers are positions in `System.engines`.
        cached_tokens: prompt tokens that were found in a cache where its prompt was computed.
        num_preemptions: how often it lost its blocks.
        refused: no instance could ever hold it.
        num_steps: engine steps of the run.
        num_events: events of the run, in its own count.
        log: rows of `LOG_COLUMNS`, in the order in which things began; empty unless asked for.
    """

    arrival_s: Floats
    prefill_start_s: Floats
    prefill_end_s: Floats
    transfer_start_s: Floats
    transfer_end_s: Floats
    decode_start_s: Floats
    first_decode_s: Floats
    first_token_s: Floats
    finish_s: Floats
    longest_gap_s: Floats
    output_tokens: Ints
    prefill_instance: Ints
    decode_instance: Ints
    cached_tokens: Ints
    num_preemptions: Ints
    refused: NDArray[np.bool_]
    num_steps: int
    num_events: int
    log: Floats = field(default_factory=lambda: np.empty((0, len(LOG_COLUMNS))))

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ttft_s(self) -> Floats:
        """Arrival to first token; infinite for a refused request."""
        return np.where(self.refused, np.inf, self.first_token_s - self.arrival_s)

    @property
    def tpot_s(self) -> Floats:
        """(last token - first token) / (output tokens - 1); NaN with one output token, infinite for a refused one."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1.0, np.nan)
        return np.where(self.refused, np.inf, (self.finish_s - self.first_token_s) / gaps)

    @property
    def latency_s(self) -> Floats:
        """Arrival to last token; infinite for a refused request."""
        return np.where(self.refused, np.inf, self.finish_s - self.arrival_s)

    def met(self, slo: SLO) -> NDArray[np.bool_]:
        """Which requests met both targets."""
        tpot = self.tpot_s
        within: NDArray[np.bool_] = (self.ttft_s <= slo.ttft_s) & (np.isnan(tpot) | (tpot <= slo.tpot_s))
        return within

    def attainment(self, slo: SLO, *, skip: float = 0.0) -> float:
        """Share of all requests, refused ones included, that met both targets.

        Args:
            slo: the targets.
            skip: share of the requests to leave out at the beginning, while the system fills, and again at the end,
                where nobody comes after them.
        """
        return float(self.met(slo)[self.window(skip)].mean())

    def window(self, skip: float) -> slice:
        """The requests without `skip` of them at either end; at least one."""
        cut = min(int(len(self) * skip), (len(self) - 1) // 2)
        return slice(cut, len(self) - cut)

    def phases(self) -> dict[str, Floats]:
        """Seconds in each of `PHASES`. Their sum is the time to the first decoded token: TTFT, unless prefill sends the
        first token."""
        split = ~np.isnan(self.first_decode_s)
        fetched = split & ~np.isnan(self.transfer_end_s)
        transfer = np.where(fetched, self.transfer_end_s - self.transfer_start_s, 0.0)
        values = (
            self.prefill_start_s - self.arrival_s,
            self.prefill_end_s - self.prefill_start_s,
            transfer,
            np.where(split, self.decode_start_s - self.prefill_end_s - transfer, 0.0),
            np.where(split, self.first_decode_s - self.decode_start_s, 0.0),
        )
        return dict(zip(PHASES, values, strict=True))
