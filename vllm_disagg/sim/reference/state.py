"""Requests, engines, and what a run consists of."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vllm_disagg.core.scheduling.growth import OutputLengths
from vllm_disagg.core.scheduling.reserve import RECENT_PROMPTS
from vllm_disagg.sim.outcome import LOG_COLUMNS, Outcome
from vllm_disagg.sim.pool import Holding, Pool
from vllm_disagg.sim.system import EngineSpec, System
from vllm_disagg.sim.workload import Workload

NAN: Final = math.nan

QUEUED, STAGE_FREE, STEP_END, HANDED_OVER, PULLED, WAKE = range(6)
"""Kinds of events. Arrivals are not among them: they come from the workload, before events of the same moment."""

_TIMES: Final = (
    "prefill_start_s", "prefill_end_s", "transfer_start_s", "transfer_end_s", "decode_start_s", "first_decode_s",
    "first_token_s", "finish_s", "longest_gap_s",
)  # fmt: skip

_COUNTS: Final = {"prefill_instance": -1, "decode_instance": -1, "cached_tokens": -1, "num_preemptions": 0}


@dataclass(slots=True, eq=False)
class Request:
    """One request. `known` tokens exist as text, of which `computed` have KV on the engine that works on it."""

    index: int
    prompt: int
    output: int
    most: int
    """Tokens of its answer that its client or the KV cache allow."""
    kind: int
    """Requests whose answers are likely to be of one length."""
    chunks: tuple[int, ...]
    generated: int = 0
    computed: int = 0
    split: bool = False
    remote: bool = False
    """Its KV is to be fetched; false again once that has been tried."""
    on_decode: bool = False
    early: bool = False
    """Its KV comes, or lies, in blocks of the reserve: the scheduler has not given it any yet."""
    pulling: bool = False
    """Its KV is on its way."""
    queued_s: float = NAN
    """When the engine that works on it heard of it."""
    first_s: float = NAN
    """When that engine had its first token."""
    passes: int = 0
    """Steps that went past it while it was first in line and found no memory."""
    quantile: float = NAN
    """Of the lengths of past answers, the one that it is expected to reach."""
    num_preemptions: int = 0
    last_token_s: float = NAN
    hold_until_s: float = math.inf
    pull_failed: bool = False
    epoch: int = 0
    """Grows with each preemption: what is still under way from before is then thrown away."""

    @property
    def known(self) -> int:
        return self.prompt + self.generated

    @property
    def rest(self) -> int:
        """Tokens that it still wants of the next step: one for a stream, more for a prompt."""
        return self.known - self.computed


@dataclass(slots=True)
class Part:
    """One request's part of a step."""

    request: Request
    epoch: int
    emits: bool


@dataclass(slots=True)
class Holders:
    """Who holds blocks when a step is formed, by what each holds and will still take."""

    blocks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def held(self) -> int:
        return sum(held for held, _ in self.blocks)


@dataclass(slots=True, eq=False)
class Engine:
    """One instance and its queues."""

    number: int
    spec: EngineSpec
    pool: Pool
    waiting: deque[Request] = field(default_factory=deque)
    parked: list[Request] = field(default_factory=list)
    """Requests that were given blocks for their KV, in that order. Those whose KV has come go before `waiting`."""
    running: list[Request] = field(default_factory=list)
    under_way: deque[list[Part]] = field(default_factory=deque)
    stage_free_s: list[float] = field(default_factory=list)
    holdings: dict[int, Holding] = field(default_factory=dict)
    holds: deque[tuple[float, Request]] = field(default_factory=deque)
    """Prompts kept for a decode instance, by their end; those released before it stay in line."""
    held_blocks: int = 0
    """Of prompts that are kept."""
    wake_s: float = NAN
    load_tokens: int = 0
    load_requests: int = 0
    last_chosen: int = 0
    num_queued: int = 0
    """Requests that it has heard of."""
    num_formed: int = 0
    """How often it has begun to form a step."""
    lengths: OutputLengths = field(default_factory=OutputLengths)
    headroom: float = 0.0
    num_preempted: int = 0
    """Requests that have given way since the last plan."""
    promised: int = 0
    promised_to: int = 0
    """Blocks by which those who held some were expected to grow, and how many they were."""
    reserved: int = 0
    lent: int = 0
    """Blocks in reserve, and those with early KV that no request has taken over yet."""
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT_PROMPTS))
    """Blocks that recent prompts would have been fetched into."""

    @property
    def slots_are_taken(self) -> bool:
        return len(self.running) >= self.spec.max_num_seqs


class Run:
    """One run of one system over one workload.

    Args:
        system: what is simulated.
        workload: the requests.
        log: whether to keep `Outcome.log`.
    """

    def __init__(self, system: System, workload: Workload, *, log: bool) -> None:
        self.system, self.workload = system, workload
        chunk_tokens = workload.prefixes.chunk_tokens if workload.prefixes else 0
        self.engines = [
            Engine(
                number=number,
                spec=spec,
                pool=Pool(spec.num_blocks, spec.block_size, chunk_tokens if spec.prefix_cache else 0),
                stage_free_s=[0.0] * spec.pp,
            )
            for number, spec in enumerate(system.engines)
        ]
        self.prefill = self.engines[: len(system.prefill)]
        self.decode = self.engines[len(system.prefill) :]
        self.reads_early = system.early_reads and bool(system.prefill)
        self.send_free_s = dict.fromkeys(system.ends, 0.0)
        self.receive_free_s = dict.fromkeys(system.ends, 0.0)
        most, kinds = answers_of(workload)
        self.requests = [
            Request(
                index=index,
                prompt=int(workload.prompt_tokens[index]),
                output=1 if system.phase == "prefill" else int(workload.output_tokens[index]),
                most=most[index],
                kind=kinds[index],
                chunks=tuple(workload.prefixes.of(index).tolist()) if workload.prefixes else (),
            )
            for index in range(len(workload))
        ]
        self.events: list[tuple[float, int, int, int]] = []
        self.num_pushed = self.num_choices = self.num_steps = self.num_events = 0
        self.dirty: set[int] = set()
        self._keeps_log = log
        self._log: list[tuple[float, ...]] = []
        self.at = {name: np.full(len(workload), NAN) for name in _TIMES}
        self.count = {name: np.full(len(workload), start, dtype=np.int64) for name, start in _COUNTS.items()}
        self.refused = np.zeros(len(workload), dtype=np.bool_)

    def place(self, request: Request) -> Engine:
        """The engine that works on a request now."""
        return self.engines[
            int(self.count["decode_instance" if request.on_decode else "prefill_instance"][request.index])
        ]

    def push(self, time_s: float, kind: int, subject: int) -> None:
        """Something will happen."""
        self.num_pushed += 1
        heapq.heappush(self.events, (time_s, self.num_pushed, kind, subject))

    def note(
        self, kind: int, start_s: float, end_s: float, engine: int, request: int,
        a: float = 0, b: float = 0, c: float = 0,
    ) -> None:  # fmt: skip
        """A row of the log."""
        if self._keeps_log:
            self._log.append((kind, start_s, end_s, engine, request, float(a), float(b), float(c)))

    def outcome(self) -> Outcome:
        """What the run gives."""
        return Outcome(
            arrival_s=self.workload.arrival_s,
            **self.at,
            prefill_instance=self.count["prefill_instance"],
            decode_instance=self.count["decode_instance"],
            cached_tokens=np.maximum(self.count["cached_tokens"], 0),
            num_preemptions=self.count["num_preemptions"],
            output_tokens=np.array([request.output for request in self.requests], dtype=np.int64),
            refused=self.refused,
            num_steps=self.num_steps,
            num_events=self.num_events,
            log=np.array(self._log, dtype=np.float64).reshape(len(self._log), len(LOG_COLUMNS)),
        )


def answers_of(workload: Workload) -> tuple[Sequence[int], Sequence[int]]:
    """For each request the most tokens that its answer may have, and its kind: what `DecodeMixin._kind` makes of it.
    Where nobody states a limit, all are of one kind, and as long as they like."""
    if workload.max_tokens is None:
        return [UNLIMITED] * len(workload), [0] * len(workload)
    most = workload.max_tokens.tolist()
    return most, [tokens.bit_length() for tokens in most]


UNLIMITED: Final = 1 << 40
