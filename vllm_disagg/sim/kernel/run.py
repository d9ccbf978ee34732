"""Arrivals, the queue of events, and when engines step."""

from __future__ import annotations

import math
from typing import Any

from vllm_disagg.core.scheduling import growth as rules
from vllm_disagg.sim.kernel.blocks import blocks
from vllm_disagg.sim.kernel.compiled import compiled, inner, sources
from vllm_disagg.sim.kernel.lists import mark, note, pop, push, wait_last
from vllm_disagg.sim.kernel.state import (
    AREA,
    ARRIVAL,
    BLOCKS,
    BUDGET,
    CHOICES,
    CONTEXT,
    DECODE_ONLY,
    DECODES,
    DIRTY,
    DISPATCH,
    DISPATCH_S,
    EVENTS,
    FIRST_TOKEN,
    FREE,
    HANDED_OVER,
    HEAP,
    HOLD,
    HOP,
    KNOWN,
    LAST_CHOSEN,
    LAST_TOKEN,
    LOAD_REQUESTS,
    LOAD_TOKENS,
    MIN_SPLIT,
    NONE,
    NUM_F,
    NUM_PREFILL,
    NUM_QUEUED,
    NUM_S,
    ON_DECODE,
    PHASE,
    POLICY,
    PREFILL_END,
    PREFILL_FIRST,
    PREFILL_START,
    PREFILLS,
    PROMPT,
    PULLED,
    QUANTILE,
    QUEUED,
    QUEUED_AT,
    REFUSED,
    REMOTE,
    REQUEST_OVERHEAD,
    RUNNING,
    SPLIT,
    STAGE_FREE,
    STAGES,
    STEP,
    STEP_COUNT,
    STEP_END,
    STEP_FIRST,
    STEP_OVERHEAD,
    STEPS,
    TOKENS,
    TOTAL,
    WAITING,
    ZERO,
    D,
    P,
)  # fmt: skip
from vllm_disagg.sim.kernel.steps import form
from vllm_disagg.sim.kernel.times import step_s
from vllm_disagg.sim.kernel.tokens import end_step, finish
from vllm_disagg.sim.kernel.transfers import end_pull, expire_holds, fetch_early, wake_at_expiry

_quantile_of = inner(rules.quantile_of)


@inner
def _least_loaded(E, first, last):
    """See `core.policy.least_loaded`."""
    best = first
    for i in range(first + 1, last):
        for column in (LOAD_TOKENS, LOAD_REQUESTS, LAST_CHOSEN):
            if E[i, column] != E[best, column]:
                if E[i, column] < E[best, column]:
                    best = i
                break
    return best


@inner
def _carry(E, S, R, i, r):
    S[CHOICES] += 1
    E[i, LOAD_TOKENS] += R[r, PROMPT]
    E[i, LOAD_REQUESTS] += 1
    E[i, LAST_CHOSEN] = S[CHOICES]


@inner
def _never_fits(E, S, R, r):
    for i in range(len(E)):
        tokens = R[r, TOTAL] if i >= S[NUM_PREFILL] else R[r, PROMPT]
        if blocks(E, i, tokens) > E[i, BLOCKS]:
            return True
        if E[i, POLICY] == PREFILL_FIRST and R[r, PROMPT] > E[i, BUDGET]:
            return True
    return False


@inner
def _enqueue(R, T, E, i, r, now_s):
    E[i, NUM_QUEUED] += 1
    T[r, QUEUED_AT], T[r, QUANTILE] = now_s, _quantile_of(E[i, NUM_QUEUED])
    wait_last(E, R, i, r)


@inner
def _arrive(R, T, E, S, X, heap, log, r, now_s):
    if _never_fits(E, S, R, r):
        R[r, REFUSED] = 1
        return
    decode = _least_loaded(E, S[NUM_PREFILL], len(E))
    _carry(E, S, R, decode, r)
    R[r, D] = decode
    place = decode
    if S[NUM_PREFILL] > 0 and R[r, PROMPT] >= S[MIN_SPLIT]:
        place = _least_loaded(E, ZERO, S[NUM_PREFILL])
        _carry(E, S, R, place, r)
        R[r, P] = place
        R[r, SPLIT] = 1
    else:
        R[r, ON_DECODE] = 1
    note(S, log, DISPATCH, now_s, now_s, decode, r, float(R[r, P]), 0.0, 0.0)
    if S[PHASE] == DECODE_ONLY:
        R[r, KNOWN] += 1
        R[r, SPLIT] = R[r, REMOTE] = 1
        T[r, PREFILL_START] = T[r, PREFILL_END] = T[r, FIRST_TOKEN] = T[r, LAST_TOKEN] = now_s
        if R[r, KNOWN] == R[r, TOTAL]:
            finish(E, R, T, S, log, decode, r, now_s)
        else:
            _enqueue(R, T, E, decode, r, now_s)
            mark(S, decode)
    elif X[DISPATCH_S] > 0:
        push(S, heap, now_s + X[DISPATCH_S], QUEUED, r)
    else:
        _enqueue(R, T, E, place, r, now_s)
        mark(S, place)


@inner
def _step(R, T, E, F, S, X, W, G, table, parts, ids, left, ranks, heap, log, i, now_s):
    expire_holds(R, T, E, ids, left, i, now_s)
    stages = E[i, STAGES]
    if E[i, STEP_COUNT] >= stages or F[i, NUM_F] > now_s:
        return
    if i < S[NUM_PREFILL] and E[i, WAITING] == NONE and E[i, RUNNING] == 0:
        return  # somebody has fetched KV from it
    slot = (E[i, STEP_FIRST] + E[i, STEP_COUNT]) % stages
    form(R, T, E, F, S, X, W, G, table, parts, ids, left, ranks, heap, log, i, slot, now_s)
    num = parts[i, slot, 0, 0]
    if num == 0:
        if E[i, WAITING] != NONE and E[i, HOLD] != NONE:
            wake_at_expiry(R, T, E, F, S, heap, i)
        return
    one_s = step_s(table[i], S[TOKENS], S[AREA], S[PREFILLS], S[DECODES], S[CONTEXT]) / stages + F[i, HOP]
    end_s = now_s + (F[i, STEP_OVERHEAD] + F[i, REQUEST_OVERHEAD] * num) + one_s
    F[i, NUM_F] = end_s
    for stage in range(1, stages):
        end_s = max(end_s, F[i, NUM_F + stage]) + one_s
        F[i, NUM_F + stage] = end_s
    E[i, STEP_COUNT] += 1
    S[STEPS] += 1
    used = E[i, BLOCKS] - E[i, FREE]
    note(S, log, STEP, now_s, end_s, i, NONE, float(S[TOKENS]), float(S[DECODES]), float(used))
    if stages > 1:
        push(S, heap, F[i, NUM_F], STAGE_FREE, i)
    push(S, heap, end_s, STEP_END, i)


def _run_of(version: str) -> Any:
    """The main loop. That it refers to the version is what keeps numba from taking an older one from its disk."""

    def run(R, T, E, F, S, X, W, G, table, parts, ids, left, ranks, heap, log):
        version  # noqa: B018
        num, following = len(R), ZERO
        while following < num or S[HEAP] > 0:
            now_s = heap[0, 0] if S[HEAP] > 0 else math.inf
            if following < num:
                now_s = min(now_s, T[following, ARRIVAL])
            while following < num and T[following, ARRIVAL] == now_s:
                S[EVENTS] += 1
                _arrive(R, T, E, S, X, heap, log, following, now_s)
                following += 1
            while S[HEAP] > 0 and heap[0, 0] == now_s:
                S[EVENTS] += 1
                kind, subject = int(heap[0, 2]), int(heap[0, 3])
                pop(S, heap)
                place = subject
                if kind == STEP_END:
                    end_step(R, T, E, S, X, W, parts, ids, left, heap, log, subject, now_s)
                elif kind in (QUEUED, HANDED_OVER, PULLED):
                    place = R[subject, D] if R[subject, ON_DECODE] == 1 else R[subject, P]
                    if kind == PULLED:
                        end_pull(R, T, E, S, W, ids, left, subject, now_s)
                    else:
                        _enqueue(R, T, E, place, subject, now_s)
                        if kind == HANDED_OVER:
                            fetch_early(R, T, E, S, X, W, ids, left, heap, log, place, subject, now_s)
                mark(S, place)
            while S[DIRTY] > 0:
                i = S[NUM_S + 0]
                S[DIRTY] -= 1
                for k in range(S[DIRTY]):
                    S[NUM_S + k] = S[NUM_S + k + 1]
                _step(R, T, E, F, S, X, W, G, table, parts, ids, left, ranks, heap, log, i, now_s)

    return run


run = compiled(_run_of(sources()))
