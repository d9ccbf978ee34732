"""Arrivals, the queue of events, and when engines step."""

from __future__ import annotations

import heapq
import math

from vllm_disagg.core.latency import work_of
from vllm_disagg.core.policy import Load, decide
from vllm_disagg.core.scheduling.growth import quantile_of
from vllm_disagg.sim.outcome import DISPATCH, STEP, Outcome
from vllm_disagg.sim.reference.state import (
    HANDED_OVER,
    NAN,
    PULLED,
    QUEUED,
    STAGE_FREE,
    STEP_END,
    WAKE,
    Engine,
    Request,
    Run,
)  # fmt: skip
from vllm_disagg.sim.reference.steps import form
from vllm_disagg.sim.reference.tokens import end_step, finish
from vllm_disagg.sim.reference.transfers import end_pull, expire_holds, fetch_early, wake_at_expiry
from vllm_disagg.sim.system import System
from vllm_disagg.sim.workload import Workload


class Simulation:
    """One run of one system over one workload.

    Args:
        system: what is simulated.
        workload: the requests.
        log: whether to keep `Outcome.log`.
    """

    def __init__(self, system: System, workload: Workload, *, log: bool = False) -> None:
        self._run = Run(system, workload, log=log)

    def run(self) -> Outcome:
        """Run until every request has ended."""
        run = self._run
        arrivals, following = run.workload.arrival_s.tolist(), 0
        while following < len(arrivals) or run.events:
            now_s = run.events[0][0] if run.events else math.inf
            if following < len(arrivals):
                now_s = min(now_s, arrivals[following])
            while following < len(arrivals) and arrivals[following] == now_s:
                run.num_events += 1
                _arrive(run, run.requests[following], now_s)
                following += 1
            while run.events and run.events[0][0] == now_s:
                run.num_events += 1
                _, _, kind, subject = heapq.heappop(run.events)
                _happen(run, kind, subject, now_s)
            for number in sorted(run.dirty):
                run.dirty.discard(number)
                _step(run, run.engines[number], now_s)
        return run.outcome()


def _happen(run: Run, kind: int, subject: int, now_s: float) -> None:
    if kind in (STEP_END, STAGE_FREE, WAKE):
        run.dirty.add(subject)
        if kind == STEP_END:
            end_step(run, run.engines[subject], now_s)
        return
    request = run.requests[subject]
    engine = run.place(request)
    run.dirty.add(engine.number)
    if kind == QUEUED:
        _enqueue(engine, request, now_s)
    elif kind == HANDED_OVER:
        _enqueue(engine, request, now_s)
        fetch_early(run, engine, request, now_s)
    elif kind == PULLED:
        end_pull(run, request, now_s)


def _arrive(run: Run, request: Request, now_s: float) -> None:
    """Choose the instances as the proxy does, and send it there."""
    if _never_fits(run, request):
        run.refused[request.index] = True
        return
    decision = decide(
        shape=None,
        short=request.prompt < run.system.min_split_tokens,
        prefill=[_load(engine, first=0) for engine in run.prefill],
        decode=[_load(engine, first=len(run.prefill)) for engine in run.decode],
        fits=lambda _p, _d: True,
    )
    assert decision.decode is not None
    request.split = decision.route == "split"
    decode = run.decode[decision.decode]
    _carry(run, decode, request)
    run.count["decode_instance"][request.index] = decode.number
    if decision.prefill is not None:
        prefill = run.prefill[decision.prefill]
        _carry(run, prefill, request)
        run.count["prefill_instance"][request.index] = prefill.number
    else:
        request.on_decode = True
    run.note(DISPATCH, now_s, now_s, decode.number, request.index, run.count["prefill_instance"][request.index])
    if run.system.phase == "decode":
        _come_computed(run, request, now_s)
    elif run.system.dispatch_s > 0:
        run.push(now_s + run.system.dispatch_s, QUEUED, request.index)
    else:
        engine = run.place(request)
        _enqueue(engine, request, now_s)
        run.dirty.add(engine.number)


def _never_fits(run: Run, request: Request) -> bool:
    """Whether some instance could not hold it even alone, or (vLLM 0.2) not compute its prompt in one step."""
    return any(
        engine.pool.blocks(request.prompt + (request.output if number >= len(run.prefill) else 0))
        > engine.pool.num_blocks
        or (engine.spec.policy == "prefill_first" and request.prompt > engine.spec.max_num_batched_tokens)
        for number, engine in enumerate(run.engines)
    )


def _come_computed(run: Run, request: Request, now_s: float) -> None:
    """Only decoding is simulated: the prompt cost nothing, and its first token is out."""
    request.generated, request.split, request.remote = 1, True, True
    for name in ("prefill_start_s", "prefill_end_s", "first_token_s"):
        run.at[name][request.index] = now_s
    request.last_token_s = now_s
    engine = run.place(request)
    if request.output == 1:
        finish(run, engine, request, now_s)
    else:
        _enqueue(engine, request, now_s)
        run.dirty.add(engine.number)


def _enqueue(engine: Engine, request: Request, now_s: float) -> None:
    """An engine hears of it."""
    engine.num_queued += 1
    request.queued_s, request.quantile, request.first_s = now_s, quantile_of(engine.num_queued), NAN
    engine.waiting.append(request)


def _step(run: Run, engine: Engine, now_s: float) -> None:
    """Form the next step if the first stage is free, and let it run."""
    expire_holds(engine, now_s)
    if len(engine.under_way) >= engine.spec.pp or engine.stage_free_s[0] > now_s:
        return
    parts, work = form(run, engine, now_s)
    if not parts:
        if engine.waiting and engine.holds:
            wake_at_expiry(run, engine)
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
    run.num_steps += 1
    run.note(STEP, now_s, end_s, engine.number, -1, step.prefill_tokens, step.num_decodes, engine.pool.used)
    if spec.pp > 1:
        run.push(engine.stage_free_s[0], STAGE_FREE, engine.number)
    run.push(end_s, STEP_END, engine.number)


def _carry(run: Run, engine: Engine, request: Request) -> None:
    run.num_choices += 1
    engine.load_tokens += request.prompt
    engine.load_requests += 1
    engine.last_chosen = run.num_choices


def _load(engine: Engine, *, first: int) -> Load:
    return Load(
        index=engine.number - first,
        num_tokens=engine.load_tokens,
        num_requests=engine.load_requests,
        last_chosen=engine.last_chosen,
    )
