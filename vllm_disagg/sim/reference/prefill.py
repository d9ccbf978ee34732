"""What `scheduler/prefill.py` decides before a step: which waiting prompts the step computes."""

from __future__ import annotations

from vllm_disagg.core.scheduling.order import Prompt, order, own_s
from vllm_disagg.core.scheduling.packing import LOOK_AHEAD, backlog_limit, even_limit, is_full, pack
from vllm_disagg.sim.reference.state import Engine, Request


def plan_prompts(engine: Engine, now_s: float) -> list[Request]:
    """Whole prompts, up to L_m or more where many wait, in the order that was chosen.

    The engine's fallback, to leave it to vLLM where nothing fits although nothing is held, has no place here: a prompt
    that does not fit an empty cache is refused on arrival.
    """
    spec, pool = engine.spec, engine.pool
    if not engine.waiting or is_full(engine.held_blocks, spec.rules.held_share, pool.num_blocks):
        return []
    line = _line_up(engine, now_s)
    costs = [_cost(engine, request) for request in line]
    under_way = sum(request.rest for request in engine.running)
    waiting = sum(request.known for request in line)
    limit = backlog_limit(waiting, spec.batch_tokens, spec.most_batch_tokens, spec.pp)
    limit = even_limit(sum(tokens for tokens, _ in costs), limit_tokens=limit, stages=spec.pp) - under_way
    packed = pack(
        costs,
        limit_tokens=limit,
        free_blocks=pool.free - (spec.watermark_blocks if engine.running else 0),
        passes=line[0].passes,
    )
    line[0].passes += packed.head_passed
    return [line[place] for place in packed.chosen]


def put_back(engine: Engine, request: Request) -> None:
    """A request that gave way waits again where its arrival puts it: the order looks at nothing else."""
    place = 0
    while place < len(engine.waiting) and engine.waiting[place].queued_s < request.queued_s:
        place += 1
    engine.waiting.insert(place, request)


def _line_up(engine: Engine, now_s: float) -> list[Request]:
    """The first of those that wait, in order."""
    rules, waiting = engine.spec.rules, list(engine.waiting)
    prompts = [
        Prompt(
            arrived_s=request.queued_s, run_s=_run_s(engine, request), deadline_s=request.queued_s + rules.slo_ttft_s
        )
        for request in waiting
    ]
    places = order(prompts, rules.prefill_order, now_s=now_s, patience_s=rules.patience_s)
    return [waiting[place] for place in places[:LOOK_AHEAD]]


def _run_s(engine: Engine, request: Request) -> float:
    regime = next(regime for regime in engine.spec.latency.prefill if request.known <= regime.up_to)
    return own_s(request.known, engine.spec.batch_tokens, regime.constant_s, regime.per_token_s, regime.per_area_s)


def _cost(engine: Engine, request: Request) -> tuple[int, int]:
    """`(tokens, blocks)`: what it has to compute, and what it takes out of the free blocks."""
    found = engine.pool.find(request.chunks)
    hit = engine.pool.hit_tokens(found, request.known)
    return request.known - hit, engine.pool.price(request.chunks, found, request.known)
