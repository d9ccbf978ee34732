"""What the end of a step brings: tokens, prompts that are handed over, answers that are complete."""

from __future__ import annotations

import math

from vllm_disagg.sim.outcome import FINISH
from vllm_disagg.sim.reference.growth import learn
from vllm_disagg.sim.reference.state import HANDED_OVER, Engine, Request, Run
from vllm_disagg.sim.reference.transfers import hold


def end_step(run: Run, engine: Engine, now_s: float) -> None:
    """The oldest step under way is over."""
    for part in engine.under_way.popleft():
        if part.emits and part.epoch == part.request.epoch:
            _emit(run, engine, part.request, now_s)


def _emit(run: Run, engine: Engine, request: Request, now_s: float) -> None:
    """A step has ended with a new token of this request."""
    index = request.index
    if request.split and not request.on_decode:
        _end_prompt(run, engine, request, now_s)
        return
    if request.split and math.isnan(run.at["first_decode_s"][index]):
        run.at["first_decode_s"][index] = now_s
    elif not request.split and math.isnan(run.at["prefill_end_s"][index]):
        run.at["prefill_end_s"][index] = now_s
    if math.isnan(request.first_s):
        request.first_s = now_s
    request.generated += 1
    token(run, request, now_s)
    if request.generated == request.output:
        engine.running.remove(request)
        engine.pool.release(engine.holdings.pop(index), request.chunks, index)
        learn(engine, request)
        finish(run, engine, request, now_s)


def _end_prompt(run: Run, engine: Engine, request: Request, now_s: float) -> None:
    """Prefill is done with it: its KV stays, and decode is told."""
    index = request.index
    engine.running.remove(request)
    put_down(engine, request)
    run.at["prefill_end_s"][index] = now_s
    if run.system.first_token == "prefill":  # noqa: S105
        request.generated = 1
        token(run, request, now_s)
        if request.output == 1:
            engine.pool.release(engine.holdings.pop(index), request.chunks, index)
            finish(run, run.engines[int(run.count["decode_instance"][index])], request, now_s)
            return
    hold(run, engine, request, now_s)
    request.on_decode = request.remote = True
    run.push(now_s + run.system.handoff_s, HANDED_OVER, index)


def token(run: Run, request: Request, now_s: float) -> None:
    """Its client gets a token."""
    index = request.index
    if math.isnan(request.last_token_s):
        run.at["first_token_s"][index] = now_s
        run.at["longest_gap_s"][index] = 0.0
    elif now_s - request.last_token_s > run.at["longest_gap_s"][index]:
        run.at["longest_gap_s"][index] = now_s - request.last_token_s
    request.last_token_s = now_s


def finish(run: Run, engine: Engine, request: Request, now_s: float) -> None:
    """Its answer is complete."""
    put_down(engine, request)
    run.at["finish_s"][request.index] = now_s
    run.note(FINISH, now_s, now_s, engine.number, request.index)


def put_down(engine: Engine, request: Request) -> None:
    """The proxy counts it no more on this instance."""
    engine.load_tokens -= request.prompt
    engine.load_requests -= 1
