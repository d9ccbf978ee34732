"""What `scheduler/decode.py` decides before and within a step: how much of prompts it may have beside streams, who is
seen, who comes in, and who gives way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vllm_disagg.core.scheduling.growth import next_headroom
from vllm_disagg.core.scheduling.pace import FLOOR_TOKENS, prompt_tokens_beside
from vllm_disagg.core.scheduling.victims import ahead_s, rank
from vllm_disagg.sim.reference.growth import may_come_in
from vllm_disagg.sim.reference.state import Engine, Holders, Request


@dataclass(slots=True, kw_only=True)
class Plan:
    """What a step of a decode instance keeps to.

    Args:
        prompt_tokens: new tokens that prompts may still have; None for as many as vLLM likes.
        local_tokens: of these, what is left to those that wait.
        fetch_only: every run slot is taken, so that only KV is fetched.
        holders: who holds blocks.
    """

    prompt_tokens: int | None = None
    local_tokens: int | None = None
    fetch_only: bool = False
    holders: Holders = field(default_factory=Holders)


def plan_decode(engine: Engine, holders: Holders, now_s: float) -> Plan:
    """Before vLLM looks at anybody."""
    engine.headroom = next_headroom(engine.headroom, preempted=engine.num_preempted)
    engine.num_preempted = 0
    _keep_who_cannot_afford_it(engine, now_s)
    left = budget = _budget(engine)
    if budget is not None and left is not None:
        left -= sum(min(request.rest, budget) for request in engine.running if request.rest > 1)
    return Plan(prompt_tokens=budget, local_tokens=left, fetch_only=engine.slots_are_taken, holders=holders)


def sees(plan: Plan, request: Request) -> bool:
    """Whether vLLM gets to see a waiting request. To be asked of each in line."""
    if plan.fetch_only:
        return request.remote
    if request.remote or request.early or plan.local_tokens is None:
        return True
    if plan.local_tokens <= 0:
        return False
    plan.local_tokens -= min(plan.local_tokens, request.known)
    return True


def within_pace(plan: Plan, new: int) -> int:
    """How many of a request's new tokens the step may have. Streams have theirs in any case."""
    if plan.prompt_tokens is None or new <= 1:
        return new
    new = min(new, plan.prompt_tokens)
    plan.prompt_tokens -= new
    return new


def has_room(engine: Engine, plan: Plan, request: Request, *, parks: bool) -> bool:
    """Whether it may come in: what it will grow by counts too."""
    if plan.fetch_only and not parks:
        return False
    own = engine.holdings[request.index].own if request.early else 0
    return may_come_in(engine, plan.holders, request, engine.pool.free + own)


def _budget(engine: Engine) -> int | None:
    """Prompt tokens that this step may have. Only where a prompt could have some: else nobody asks."""
    prompts = [request for request in engine.running if request.rest > 1]
    num_streams = len(engine.running) - len(prompts)
    if num_streams == 0 or not (prompts or engine.waiting):
        return None
    most = max(FLOOR_TOKENS, engine.spec.max_num_batched_tokens - num_streams)
    return prompt_tokens_beside(
        engine.spec.latency,
        num_decodes=num_streams,
        decode_context=sum(request.computed + 1 for request in engine.running if request.rest <= 1),
        target_s=engine.spec.rules.slo_tpot_s,
        computed=prompts[0].computed if prompts else 0,
        floor=min(FLOOR_TOKENS, most),
        ceiling=most,
    )


def _keep_who_cannot_afford_it(engine: Engine, now_s: float) -> None:
    """Where the next step may find no block for somebody: put those first who should not give way."""
    if engine.pool.free >= len(engine.running) or len(engine.running) < 2:
        return
    engine.running.sort(key=lambda request: _rank(engine, request, now_s))


def _rank(engine: Engine, request: Request, now_s: float) -> tuple[int, int, float]:
    since_s = 0.0 if math.isnan(request.first_s) else now_s - request.first_s
    return rank(
        request.num_preemptions,
        priority=0,
        ahead_s=ahead_s(request.generated, engine.spec.rules.slo_tpot_s, since_s),
        recompute_s=engine.spec.latency.prompt_s(request.known),
    )
