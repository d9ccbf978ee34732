"""The simulator as it is meant to be read: plain Python, one method per thing that happens.

Time jumps from event to event. Everything that happens at one moment is taken in before any engine forms its next step;
engines then do so in the order of their numbers. `fast` does the same over arrays, and gives the same results to the
last bit; a test compares them event for event. Change both or neither.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vllm_disagg.core.latency import work_of
from vllm_disagg.core.policy import Load, decide
from vllm_disagg.sim.outcome import DISPATCH, FINISH, LOG_COLUMNS, PREEMPTION, STEP, TRANSFER, Outcome
from vllm_disagg.sim.pool import Holding, Pool
from vllm_disagg.sim.system import EngineSpec, System
from vllm_disagg.sim.workload import Workload

_NAN: Final = math.nan

QUEUED, STAGE_FREE, STEP_END, HANDED_OVER, PULLED, WAKE = range(6)
"""Kinds of events. Arrivals are not among them: they come from the workload, before events of the same moment."""

RESERVE_SHARE: Final = 4
"""One in so many free blocks may be taken by a fetch that begins before the scheduler has seen its request
(`connector/reserve.py`)."""


@dataclass(slots=True, eq=False)
class _Request:
    """One request. `known` tokens exist as text, of which `computed` have KV on the engine that works on it."""

    index: int
    prompt: int
    output: int
    chunks: tuple[int, ...]
    generated: int = 0
    computed: int = 0
    split: bool = False
    remote: bool = False
    """Its KV is to be fetched; false again once that has been tried."""
    on_decode: bool = False
    last_token_s: float = _NAN
    hold_until_s: float = math.inf
    pull_failed: bool = False
    epoch: int = 0
    """Grows with each preemption: what is still under way from before is then thrown away."""

    @property
    def known(self) -> int:
        return self.prompt + self.generated


@dataclass(slots=True)
class _Part:
    """One request's part of a step."""

    request: _Request
    epoch: int
    emits: bool


@dataclass(slots=True, eq=False)
class _Engine:
    """One instance and its queues."""

    number: int
    spec: EngineSpec
    pool: Pool
    waiting: deque[_Request] = field(default_factory=deque)
    fetched: deque[_Request] = field(default_factory=deque)
    """Requests whose KV has come. They hold blocks and go first."""
    running: list[_Request] = field(default_factory=list)
    under_way: deque[list[_Part]] = field(default_factory=deque)
    stage_free_s: list[float] = field(default_factory=list)
    holdings: dict[int, Holding] = field(default_factory=dict)
    holds: deque[tuple[float, _Request]] = field(default_factory=deque)
    """Prompts kept for a decode instance, by their end; those released before it stay in line."""
    wake_s: float = _NAN
    load_tokens: int = 0
    load_requests: int = 0
    last_chosen: int = 0


class Simulation:
    """One run of one system over one workload.

    Args:
        system: what is simulated.
        workload: the requests.
        log: whether to keep `Outcome.log`.
    """

    def __init__(self, system: System, workload: Workload, *, log: bool = False) -> None:
        self._system, self._workload = system, workload
        chunk_tokens = workload.prefixes.chunk_tokens if workload.prefixes else 0
        self._engines = [
            _Engine(
                number=number,
                spec=spec,
                pool=Pool(spec.num_blocks, spec.block_size, chunk_tokens if spec.prefix_cache else 0),
                stage_free_s=[0.0] * spec.pp,
            )
            for number, spec in enumerate(system.engines)
        ]
        self._prefill = self._engines[: len(system.prefill)]
        self._decode = self._engines[len(system.prefill) :]
        self._send_free_s = dict.fromkeys(system.ends, 0.0)
        self._receive_free_s = dict.fromkeys(system.ends, 0.0)
        self._requests = [
            _Request(
                index=index,
                prompt=int(workload.prompt_tokens[index]),
                output=1 if system.phase == "prefill" else int(workload.output_tokens[index]),
                chunks=tuple(workload.prefixes.of(index).tolist()) if workload.prefixes else (),
            )
            for index in range(len(workload))
        ]
        self._events: list[tuple[float, int, int, int]] = []
        self._num_pushed = self._num_choices = self._num_steps = self._num_events = 0
        self._dirty: set[int] = set()
        self._keeps_log = log
        self._log: list[tuple[float, ...]] = []
        self._at = {name: np.full(len(workload), _NAN) for name in _TIMES}
        self._count = {name: np.full(len(workload), start, dtype=np.int64) for name, start in _COUNTS.items()}
        self._refused = np.zeros(len(workload), dtype=np.bool_)

    def run(self) -> Outcome:
        """Run until every request has ended."""
        arrivals, following = self._workload.arrival_s.tolist(), 0
        while following < len(arrivals) or self._events:
            now_s = self._events[0][0] if self._events else math.inf
            if following < len(arrivals):
                now_s = min(now_s, arrivals[following])
            while following < len(arrivals) and arrivals[following] == now_s:
                self._num_events += 1
                self._arrive(self._requests[following], now_s)
                following += 1
            while self._events and self._events[0][0] == now_s:
                self._num_events += 1
                _, _, kind, subject = heapq.heappop(self._events)
                self._happen(kind, subject, now_s)
            for number in sorted(self._dirty):
                self._dirty.discard(number)
                self._step(self._engines[number], now_s)
        return self._outcome()

    # What happens.

    def _happen(self, kind: int, subject: int, now_s: float) -> None:
        if kind == QUEUED:
            self._queue(self._requests[subject])
        elif kind == STEP_END:
            self._end_step(self._engines[subject], now_s)
        elif kind == HANDED_OVER:
            request = self._requests[subject]
            engine = self._engines[int(self._count["decode_instance"][subject])]
            if not self._fetch_early(engine, request, now_s):
                self._enqueue(engine, request)
        elif kind == PULLED:
            self._end_pull(self._requests[subject], now_s)
        self._dirty.add(subject if kind in (STEP_END, STAGE_FREE, WAKE) else self._place(subject))

    def _place(self, index: int) -> int:
        """The engine that works on a request now."""
        side = "decode_instance" if self._requests[index].on_decode else "prefill_instance"
        return int(self._count[side][index])

    def _arrive(self, request: _Request, now_s: float) -> None:
        """Choose the instances as the proxy does, and send it there."""
        if self._never_fits(request):
            self._refused[request.index] = True
            return
        decision = decide(
            shape=None,
            short=request.prompt < self._system.min_split_tokens,
            prefill=[_load(engine, first=0) for engine in self._prefill],
            decode=[_load(engine, first=len(self._prefill)) for engine in self._decode],
            fits=lambda _p, _d: True,
        )
        assert decision.decode is not None
        request.split = decision.route == "split"
        decode = self._decode[decision.decode]
        self._carry(decode, request)
        self._count["decode_instance"][request.index] = decode.number
        if decision.prefill is not None:
            prefill = self._prefill[decision.prefill]
            self._carry(prefill, request)
            self._count["prefill_instance"][request.index] = prefill.number
        else:
            request.on_decode = True
        self._note(DISPATCH, now_s, now_s, decode.number, request.index, self._count["prefill_instance"][request.index])
        if self._system.phase == "decode":
            self._come_computed(request, now_s)
        elif self._system.dispatch_s > 0:
            self._push(now_s + self._system.dispatch_s, QUEUED, request.index)
        else:
            self._queue(request)
            self._dirty.add(self._place(request.index))

    def _never_fits(self, request: _Request) -> bool:
        """Whether some instance could not hold it even alone, or (vLLM 0.2) not compute its prompt in one step."""
        return any(
            engine.pool.blocks(request.prompt + (request.output if number >= len(self._prefill) else 0))
            > engine.pool.num_blocks
            or (engine.spec.policy == "prefill_first" and request.prompt > engine.spec.max_num_batched_tokens)
            for number, engine in enumerate(self._engines)
        )

    def _come_computed(self, request: _Request, now_s: float) -> None:
        """Only decoding is simulated: the prompt cost nothing, and its first token is out."""
        request.generated, request.split, request.remote = 1, True, True
        for name in ("prefill_start_s", "prefill_end_s", "first_token_s"):
            self._at[name][request.index] = now_s
        request.last_token_s = now_s
        if request.output == 1:
            self._finish(self._engines[self._place(request.index)], request, now_s)
        else:
            self._queue(request)
            self._dirty.add(self._place(request.index))

    def _queue(self, request: _Request) -> None:
        self._enqueue(self._engines[self._place(request.index)], request)

    def _enqueue(self, engine: _Engine, request: _Request) -> None:
        engine.waiting.append(request)

    def _end_step(self, engine: _Engine, now_s: float) -> None:
        for part in engine.under_way.popleft():
            if part.emits and part.epoch == part.request.epoch:
                self._emit(engine, part.request, now_s)

    def _emit(self, engine: _Engine, request: _Request, now_s: float) -> None:
        """A step has ended with a new token of this request."""
        index = request.index
        if request.split and not request.on_decode:
            self._end_prompt(engine, request, now_s)
            return
        if request.split and math.isnan(self._at["first_decode_s"][index]):
            self._at["first_decode_s"][index] = now_s
        elif not request.split and math.isnan(self._at["prefill_end_s"][index]):
            self._at["prefill_end_s"][index] = now_s
        request.generated += 1
        self._token(request, now_s)
        if request.generated == request.output:
            engine.running.remove(request)
            engine.pool.release(engine.holdings.pop(index), request.chunks, index)
            self._finish(engine, request, now_s)

    def _end_prompt(self, engine: _Engine, request: _Request, now_s: float) -> None:
        """Prefill is done with it: its KV stays, and decode is told."""
        index = request.index
        engine.running.remove(request)
        self._put_down(engine, request)
        self._at["prefill_end_s"][index] = now_s
        if self._system.first_token == "prefill":  # noqa: S105
            request.generated = 1
            self._token(request, now_s)
            if request.output == 1:
                engine.pool.release(engine.holdings.pop(index), request.chunks, index)
                self._finish(self._engines[int(self._count["decode_instance"][index])], request, now_s)
                return
        request.hold_until_s = now_s + self._system.hold_cap_s
        engine.holds.append((request.hold_until_s, request))
        request.on_decode = request.remote = True
        self._push(now_s + self._system.handoff_s, HANDED_OVER, index)

    def _token(self, request: _Request, now_s: float) -> None:
        index = request.index
        if math.isnan(request.last_token_s):
            self._at["first_token_s"][index] = now_s
            self._at["longest_gap_s"][index] = 0.0
        elif now_s - request.last_token_s > self._at["longest_gap_s"][index]:
            self._at["longest_gap_s"][index] = now_s - request.last_token_s
        request.last_token_s = now_s

    def _finish(self, engine: _Engine, request: _Request, now_s: float) -> None:
        self._put_down(engine, request)
        self._at["finish_s"][request.index] = now_s
        self._note(FINISH, now_s, now_s, engine.number, request.index)

    # Steps of an engine.

    def _step(self, engine: _Engine, now_s: float) -> None:
        """Form the next step if the first stage is free, and let it run."""
        self._expire_holds(engine, now_s)
        if len(engine.under_way) >= engine.spec.pp or engine.stage_free_s[0] > now_s:
            return
        parts, work = self._form(engine, now_s)
        if not parts:
            if engine.waiting and engine.holds:
                self._wake_at_expiry(engine)
            return
        spec = engine.spec
        step = work_of(work)
        stage_s = spec.latency.step_s(step) / spec.pp + spec.hop_s
        end_s = now_s + (spec.step_overhead_s + spec.request_overhead_s * len(parts)) + stage_s
        engine.stage_free_s[0] = end_s
        for stage in range(1, spec.pp):
            end_s = max(end_s, engine.stage_free_s[stage]) + stage_s
            engine.stage_free_s[stage] = end_s
        engine.under_way.append(parts)
        self._num_steps += 1
        self._note(STEP, now_s, end_s, engine.number, -1, step.prefill_tokens, step.num_decodes, engine.pool.used)
        if spec.pp > 1:
            self._push(engine.stage_free_s[0], STAGE_FREE, engine.number)
        self._push(end_s, STEP_END, engine.number)

    def _form(self, engine: _Engine, now_s: float) -> tuple[list[_Part], list[tuple[int, int]]]:
        """Which requests the step computes, and how many tokens of each, as (computed, new)."""
        while True:
            parts: list[_Part] = []
            work: list[tuple[int, int]] = []
            self._give_up_expired(engine, now_s)
            budget = self._budget(engine)
            if engine.spec.policy == "prefill_first":
                self._admit(engine, parts, work, budget, now_s)
                preempted = False
                if not parts:
                    _, preempted = self._continue_running(engine, parts, work, budget, now_s)
            else:
                budget, preempted = self._continue_running(engine, parts, work, budget, now_s)
                if not preempted:
                    self._admit(engine, parts, work, budget, now_s)
            if parts or not preempted:
                return parts, work

    def _budget(self, engine: _Engine) -> int:
        """New tokens of the step. With whole prompts, a longer one still gets its turn, alone: one beyond L_m, or one
        that lost its blocks after it had grown."""
        budget = engine.spec.max_num_batched_tokens
        if engine.waiting and not engine.waiting[0].remote:
            head = engine.waiting[0]
            if engine.spec.policy == "whole" or (engine.spec.policy == "prefill_first" and head.generated > 0):
                found = engine.pool.find(head.chunks)
                budget = max(budget, head.known - engine.pool.hit_tokens(found, head.known))
        return budget

    def _give_up_expired(self, engine: _Engine, now_s: float) -> None:
        """The head of the line came too late for its KV: it computes its prompt here."""
        if engine.waiting and engine.waiting[0].remote and engine.waiting[0].hold_until_s <= now_s:
            engine.waiting[0].remote = False

    def _continue_running(
        self, engine: _Engine, parts: list[_Part], work: list[tuple[int, int]], budget: int, now_s: float
    ) -> tuple[int, bool]:
        """Running requests in the order of their admission. The last ones give way where blocks are missing.

        Returns:
            The budget left, and whether any gave way.
        """
        position, preempted = 0, False
        while position < len(engine.running) and budget > 0:
            request = engine.running[position]
            new = min(request.known - request.computed, budget)
            if new == 0:  # its token is still under way
                position += 1
                continue
            holding = engine.holdings[request.index]
            alive = True
            while alive and engine.pool.missing(holding, request.computed + new) > engine.pool.free:
                victim = engine.running.pop()
                self._preempt(engine, victim, now_s)
                preempted, alive = True, victim is not request
            if not alive:
                break
            engine.pool.grow(holding, request.computed + new)
            budget -= new
            self._schedule(engine, request, new, parts, work, now_s)
            position += 1
        return budget, preempted

    def _admit(
        self, engine: _Engine, parts: list[_Part], work: list[tuple[int, int]], budget: int, now_s: float
    ) -> None:
        """Waiting requests, first come first served; the first that does not fit stops the line."""
        spec, pool = engine.spec, engine.pool
        while budget > 0 and len(engine.running) < spec.max_num_seqs:
            if engine.fetched:
                request = engine.fetched[0]
                new = request.known - request.computed
                if new > budget or pool.missing(engine.holdings[request.index], request.known) > pool.free:
                    return
                engine.fetched.popleft()
                pool.grow(engine.holdings[request.index], request.known)
            elif engine.waiting:
                request = engine.waiting[0]
                if request.remote and request.hold_until_s <= now_s:
                    request.remote = False
                chunks, known = request.chunks, request.known
                found = pool.find(chunks)
                hit = pool.hit_tokens(found, known)
                watermark = spec.watermark_blocks if engine.running else 0
                if request.remote and request.prompt - hit > 1:
                    if pool.price(chunks, found, known) + watermark + self._reserved(engine) > pool.free:
                        return
                    engine.waiting.popleft()
                    engine.holdings[request.index] = pool.admit(chunks, found, known)
                    self._start_pull(engine, request, hit, now_s)
                    continue
                new = known - hit
                if spec.policy != "chunked" and new > budget:
                    return
                if pool.price(chunks, found, known) + watermark > pool.free:
                    return
                new = min(new, budget)
                engine.waiting.popleft()
                if request.remote:  # all but its last token was here already
                    self._release_hold(request)
                engine.holdings[request.index] = pool.admit(chunks, found, hit + new)
                request.computed = hit
                if self._count["cached_tokens"][request.index] < 0:
                    self._count["cached_tokens"][request.index] = hit
            else:
                return
            engine.running.append(request)
            budget -= new
            self._schedule(engine, request, new, parts, work, now_s)

    def _reserved(self, engine: _Engine) -> int:
        """Blocks that prompts which are being computed in chunks still need: a pull must not take them."""
        return sum(
            engine.pool.missing(engine.holdings[request.index], request.known)
            for request in engine.running
            if request.known - request.computed > 1
        )

    def _schedule(
        self,
        engine: _Engine,
        request: _Request,
        new: int,
        parts: list[_Part],
        work: list[tuple[int, int]],
        now_s: float,
    ) -> None:
        """Put it into the step that begins now."""
        name = "decode_start_s" if request.split and request.on_decode else "prefill_start_s"
        if math.isnan(self._at[name][request.index]):
            self._at[name][request.index] = now_s
        work.append((request.computed, new))
        request.computed += new
        engine.pool.publish(engine.holdings[request.index], request.chunks, request.computed)
        parts.append(_Part(request, request.epoch, request.computed == request.known))

    def _preempt(self, engine: _Engine, request: _Request, now_s: float) -> None:
        """It loses its blocks and computes everything again when its turn comes."""
        self._note(PREEMPTION, now_s, now_s, engine.number, request.index, request.computed)
        engine.pool.release(engine.holdings.pop(request.index), request.chunks, request.index)
        request.computed = 0
        request.epoch += 1
        self._count["num_preemptions"][request.index] += 1
        engine.waiting.appendleft(request)

    # KV on its way.

    def _fetch_early(self, engine: _Engine, request: _Request, now_s: float) -> bool:
        """It came while a step runs: the fetch need not wait for that, if the blocks in reserve are enough."""
        pool = engine.pool
        if not self._system.early_reads or not engine.under_way or request.hold_until_s <= now_s:
            return False
        found = pool.find(request.chunks)
        hit = pool.hit_tokens(found, request.known)
        price = pool.price(request.chunks, found, request.known)
        if request.prompt - hit <= 1 or price + self._reserved(engine) > pool.free // RESERVE_SHARE:
            return False
        engine.holdings[request.index] = pool.admit(request.chunks, found, request.known)
        self._start_pull(engine, request, hit, now_s)
        return True

    def _start_pull(self, engine: _Engine, request: _Request, hit: int, now_s: float) -> None:
        """Reserve both ends of the link. With no prefill instance the KV is there at once."""
        request.remote = False
        request.computed = min(request.prompt, request.known - 1)
        self._at["transfer_start_s"][request.index] = now_s
        sender = int(self._count["prefill_instance"][request.index])
        end_s, blocks = now_s, engine.pool.blocks(request.prompt) - hit // engine.spec.block_size
        if sender >= 0:
            out, into = self._system.ends[sender], self._system.ends[engine.number]
            begin_s = max(now_s, self._send_free_s[out], self._receive_free_s[into])
            end_s = begin_s + self._system.link.seconds(
                blocks * engine.spec.block_size * self._system.kv_bytes_per_token
            )
            self._send_free_s[out] = self._receive_free_s[into] = end_s
        limit_s = now_s + self._system.pull_timeout_s
        request.pull_failed = end_s > limit_s or end_s > request.hold_until_s
        self._note(TRANSFER, now_s, end_s, engine.number, request.index, sender, blocks, not request.pull_failed)
        self._push(min(end_s, limit_s), PULLED, request.index)

    def _end_pull(self, request: _Request, now_s: float) -> None:
        engine = self._engines[int(self._count["decode_instance"][request.index])]
        self._release_hold(request)
        if request.pull_failed:
            engine.pool.release(engine.holdings.pop(request.index), request.chunks, request.index)
            request.computed = 0
            self._at["transfer_start_s"][request.index] = _NAN
            engine.waiting.appendleft(request)
            return
        self._at["transfer_end_s"][request.index] = now_s
        engine.pool.publish(engine.holdings[request.index], request.chunks, request.prompt)
        engine.fetched.append(request)

    def _release_hold(self, request: _Request) -> None:
        """Prefill may let go of the prompt's KV, if it has not already."""
        number = int(self._count["prefill_instance"][request.index])
        if number >= 0 and request.index in self._engines[number].holdings:
            engine = self._engines[number]
            engine.pool.release(engine.holdings.pop(request.index), request.chunks, request.index)
            self._dirty.add(number)

    def _expire_holds(self, engine: _Engine, now_s: float) -> None:
        while engine.holds and engine.holds[0][0] <= now_s:
            _, request = engine.holds.popleft()
            if request.index in engine.holdings:
                engine.pool.release(engine.holdings.pop(request.index), request.chunks, request.index)

    def _wake_at_expiry(self, engine: _Engine) -> None:
        """Nothing else may happen here until a hold ends by itself."""
        while engine.holds and engine.holds[0][1].index not in engine.holdings:
            engine.holds.popleft()
        if engine.holds and engine.wake_s != engine.holds[0][0]:
            engine.wake_s = engine.holds[0][0]
            self._push(engine.wake_s, WAKE, engine.number)

    # Book-keeping.

    def _carry(self, engine: _Engine, request: _Request) -> None:
        self._num_choices += 1
        engine.load_tokens += request.prompt
        engine.load_requests += 1
        engine.last_chosen = self._num_choices

    def _put_down(self, engine: _Engine, request: _Request) -> None:
        engine.load_tokens -= request.prompt
        engine.load_requests -= 1

    def _push(self, time_s: float, kind: int, subject: int) -> None:
        self._num_pushed += 1
        heapq.heappush(self._events, (time_s, self._num_pushed, kind, subject))

    def _note(
        self, kind: int, start_s: float, end_s: float, engine: int, request: int,
        a: float = 0, b: float = 0, c: float = 0,
    ) -> None:  # fmt: skip
        if self._keeps_log:
            self._log.append((kind, start_s, end_s, engine, request, float(a), float(b), float(c)))

    def _outcome(self) -> Outcome:
        return Outcome(
            arrival_s=self._workload.arrival_s,
            **self._at,
            prefill_instance=self._count["prefill_instance"],
            decode_instance=self._count["decode_instance"],
            cached_tokens=np.maximum(self._count["cached_tokens"], 0),
            num_preemptions=self._count["num_preemptions"],
            output_tokens=np.array([request.output for request in self._requests], dtype=np.int64),
            refused=self._refused,
            num_steps=self._num_steps,
            num_events=self._num_events,
            log=np.array(self._log, dtype=np.float64).reshape(len(self._log), len(LOG_COLUMNS)),
        )


_TIMES: Final = (
    "prefill_start_s", "prefill_end_s", "transfer_start_s", "transfer_end_s", "decode_start_s", "first_decode_s",
    "first_token_s", "finish_s", "longest_gap_s",
)  # fmt: skip

_COUNTS: Final = {"prefill_instance": -1, "decode_instance": -1, "cached_tokens": -1, "num_preemptions": 0}


def _load(engine: _Engine, *, first: int) -> Load:
    return Load(
        index=engine.number - first,
        num_tokens=engine.load_tokens,
        num_requests=engine.load_requests,
        last_chosen=engine.last_chosen,
    )
