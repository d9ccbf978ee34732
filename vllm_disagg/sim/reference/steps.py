"""What a step computes, as vLLM decides it; and before it what the schedulers of this project let vLLM see."""

from __future__ import annotations

import math

from vllm_disagg.sim.outcome import PREEMPTION
from vllm_disagg.sim.reference.decode import Plan, has_room, plan_decode, sees, within_pace
from vllm_disagg.sim.reference.growth import came_in, holders_of, promise, promise_is_due
from vllm_disagg.sim.reference.prefill import plan_prompts, put_back
from vllm_disagg.sim.reference.state import Engine, Holders, Part, Request, Run
from vllm_disagg.sim.reference.transfers import keep_reserve, release_hold, start_pull

Work = list[tuple[int, int]]
"""Of each request in a step: tokens already computed, tokens to compute."""


def form(run: Run, engine: Engine, now_s: float) -> tuple[list[Part], Work]:
    """Which requests the step computes, and how many tokens of each."""
    while True:
        parts: list[Part] = []
        work: Work = []
        plan, line = _plan(run, engine, now_s)
        budget = _budget(engine, now_s)
        preempted = False
        if engine.spec.policy == "prefill_first":
            _admit(run, engine, plan, line, parts, work, budget, now_s)
            if not parts:
                _, preempted = _continue_running(run, engine, plan, parts, work, budget, now_s)
        else:
            budget, preempted = _continue_running(run, engine, plan, parts, work, budget, now_s)
            if not preempted:
                _admit(run, engine, plan, line, parts, work, budget, now_s)
        if parts or not preempted:
            return parts, work


def _plan(run: Run, engine: Engine, now_s: float) -> tuple[Plan, list[Request]]:
    """What the step keeps to, and who is seen."""
    plans, holders = engine.spec.policy == "decode", Holders()
    early = run.reads_early and engine in run.decode
    if plans:
        due = early and promise_is_due(engine)
        if due or engine.waiting:
            holders = holders_of(engine)
        if due:
            promise(engine, holders)
    engine.num_formed += 1
    if early:
        keep_reserve(engine)
    if engine.spec.policy == "prefill":
        return Plan(), plan_prompts(engine, now_s)
    return plan_decode(engine, holders, now_s) if plans else Plan(), _line(engine)


def _line(engine: Engine) -> list[Request]:
    """Those that wait. Where nobody holds blocks, those whose early KV is here go first: nobody else would ever give
    blocks back."""
    waiting = list(engine.waiting)
    if not engine.running and not engine.parked:
        return sorted(waiting, key=lambda request: not (request.early and not request.pulling))
    return waiting


def _budget(engine: Engine, now_s: float) -> int:
    """New tokens of the step. With whole prompts, a longer one still gets its turn, alone: one beyond the budget, or
    one that lost its blocks after it had grown."""
    budget = engine.spec.max_num_batched_tokens
    if not engine.waiting or engine.spec.policy not in ("whole", "prefill_first"):
        return budget
    head = engine.waiting[0]
    _give_up_expired(head, now_s)
    if head.remote or head.early:
        return budget
    if engine.spec.policy == "whole" or head.generated > 0:
        found = engine.pool.find(head.chunks)
        budget = max(budget, head.known - engine.pool.hit_tokens(found, head.known))
    return budget


def _give_up_expired(request: Request, now_s: float) -> None:
    """Its turn came too late for its KV: it computes its prompt here."""
    if request.remote and request.hold_until_s <= now_s:
        request.remote = False


def _continue_running(
    run: Run, engine: Engine, plan: Plan, parts: list[Part], work: Work, budget: int, now_s: float
) -> tuple[int, bool]:
    """Running requests in their order. The last ones give way where blocks are missing.

    Returns:
        The budget left, and whether any gave way.
    """
    position, preempted = 0, False
    while position < len(engine.running) and budget > 0:
        request = engine.running[position]
        new = within_pace(plan, min(request.rest, budget))
        if new == 0:  # its token is still under way, or it has to wait for the streams' sake
            position += 1
            continue
        holding = engine.holdings[request.index]
        alive = True
        while alive and engine.pool.missing(holding, request.computed + new) > engine.pool.free:
            victim = engine.running.pop()
            _preempt(run, engine, victim, now_s)
            preempted, alive = True, victim is not request
        if not alive:
            break
        engine.pool.grow(holding, request.computed + new)
        budget -= new
        _schedule(run, engine, request, new, parts, work, now_s)
        position += 1
    return budget, preempted


def _admit(
    run: Run, engine: Engine, plan: Plan, line: list[Request], parts: list[Part], work: Work, budget: int, now_s: float
) -> None:
    """Requests whose KV has come, then those in line. The first that does not fit stops everybody behind it."""
    spec, pool = engine.spec, engine.pool
    for request in [] if plan.fetch_only else list(engine.parked):
        if budget <= 0 or engine.slots_are_taken:
            return
        if request.pulling:
            continue
        watermark = spec.watermark_blocks if engine.running else 0
        holding = engine.holdings[request.index]
        if request.rest > budget or pool.missing(holding, request.known) + watermark > pool.free:
            return
        engine.parked.remove(request)
        pool.grow(holding, request.known)
        budget -= _start(run, engine, request, request.rest, parts, work, now_s)
    for request in line:
        if budget <= 0 or (engine.slots_are_taken and not plan.fetch_only):
            return
        _give_up_expired(request, now_s)
        if not sees(plan, request) or (request.early and request.pulling):
            continue
        new = _admit_one(run, engine, plan, request, parts, work, budget, now_s)
        if new is None:
            return
        budget -= new


def _admit_one(
    run: Run, engine: Engine, plan: Plan, request: Request, parts: list[Part], work: Work, budget: int, now_s: float
) -> int | None:
    """Give a waiting request its blocks. Returns its new tokens, 0 for one that is parked, None if it does not fit."""
    spec, pool, plans = engine.spec, engine.pool, engine.spec.policy == "decode"
    watermark = spec.watermark_blocks if engine.running else 0
    if request.early:
        holding = engine.holdings[request.index]
        if plans and not has_room(engine, plan, request, parks=False):
            return None
        if pool.missing(holding, request.known) + watermark > pool.free + holding.own:
            return None
        request.early = False
        engine.lent -= holding.own
        engine.waiting.remove(request)
        pool.grow(holding, request.known)
        _came_in(engine, plan, request)
        return _start(run, engine, request, request.rest, parts, work, now_s)
    chunks, known = request.chunks, request.known
    found = pool.find(chunks)
    hit = pool.hit_tokens(found, known)
    price = pool.price(chunks, found, known)
    if request.remote and request.prompt - hit > 1:
        if plans and not has_room(engine, plan, request, parks=True):
            return None
        if price + watermark + _reserved(engine) > pool.free:
            return None
        engine.waiting.remove(request)
        engine.holdings[request.index] = pool.admit(chunks, found, known)
        engine.parked.append(request)
        _came_in(engine, plan, request)
        start_pull(run, engine, request, hit, now_s)
        return 0
    if spec.policy in ("whole", "prefill_first") and known - hit > budget:
        return None
    new = within_pace(plan, min(known - hit, budget))
    if new == 0 or (plans and not has_room(engine, plan, request, parks=False)) or price + watermark > pool.free:
        return None
    engine.waiting.remove(request)
    if request.remote:  # all but its last token was here already
        release_hold(run, request)
    engine.holdings[request.index] = pool.admit(chunks, found, hit + new)
    request.computed = hit
    if run.count["cached_tokens"][request.index] < 0:
        run.count["cached_tokens"][request.index] = hit
    _came_in(engine, plan, request)
    return _start(run, engine, request, new, parts, work, now_s)


def _came_in(engine: Engine, plan: Plan, request: Request) -> None:
    if engine.spec.policy == "decode":
        came_in(engine, plan.holders, request)


def _start(run: Run, engine: Engine, request: Request, new: int, parts: list[Part], work: Work, now_s: float) -> int:
    engine.running.append(request)
    _schedule(run, engine, request, new, parts, work, now_s)
    return new


def _reserved(engine: Engine) -> int:
    """Blocks that prompts which are being computed in chunks still need: a pull must not take them."""
    return sum(
        engine.pool.missing(engine.holdings[request.index], request.known)
        for request in engine.running
        if request.rest > 1
    )


def _schedule(
    run: Run, engine: Engine, request: Request, new: int, parts: list[Part], work: Work, now_s: float
) -> None:
    """Put it into the step that begins now."""
    name = "decode_start_s" if request.split and request.on_decode else "prefill_start_s"
    if math.isnan(run.at[name][request.index]):
        run.at[name][request.index] = now_s
    work.append((request.computed, new))
    request.computed += new
    engine.pool.publish(engine.holdings[request.index], request.chunks, request.computed)
    parts.append(Part(request, request.epoch, request.computed == request.known))


def _preempt(run: Run, engine: Engine, request: Request, now_s: float) -> None:
    """It loses its blocks and computes everything again when its turn comes."""
    run.note(PREEMPTION, now_s, now_s, engine.number, request.index, request.computed)
    engine.pool.release(engine.holdings.pop(request.index), request.chunks, request.index)
    request.computed = 0
    request.epoch += 1
    request.num_preemptions += 1
    engine.num_preempted += 1
    run.count["num_preemptions"][request.index] += 1
    if engine.spec.policy == "prefill":
        put_back(engine, request)
    else:
        engine.waiting.appendleft(request)
