"""What the end of a step brings: tokens, prompts that are handed over, answers that are complete."""

from __future__ import annotations

import math

from vllm_disagg.sim.kernel.blocks import release
from vllm_disagg.sim.kernel.compiled import inner
from vllm_disagg.sim.kernel.growth import learn, went
from vllm_disagg.sim.kernel.lists import note, push
from vllm_disagg.sim.kernel.state import (
    EPOCH,
    FINISH,
    FINISHED,
    FIRST_DECODE,
    FIRST_FROM_PREFILL,
    FIRST_TOKEN,
    HANDED_OVER,
    HANDOFF,
    KNOWN,
    LAST_TOKEN,
    LOAD_REQUESTS,
    LOAD_TOKENS,
    LONGEST_GAP,
    NUM_E,
    ON_DECODE,
    PREFILL_END,
    PROMPT,
    REMOTE,
    RUNNING,
    SPLIT,
    STAGES,
    STEP_COUNT,
    STEP_FIRST,
    TOTAL,
    ZERO,
    D,
)  # fmt: skip
from vllm_disagg.sim.kernel.transfers import hold_prompt


@inner
def end_step(R, T, E, S, X, W, parts, ids, left, heap, log, i, now_s):
    """With `_emit` of the reference inside."""
    slot = E[i, STEP_FIRST]
    E[i, STEP_FIRST] = (slot + 1) % E[i, STAGES]
    E[i, STEP_COUNT] -= 1
    for k in range(parts[i, slot, 0, 0]):
        r = parts[i, slot, k + 1, 0]
        if parts[i, slot, k + 1, 1] != R[r, EPOCH]:  # NONE for a chunk that ends inside its prompt
            continue
        if R[r, SPLIT] == 1:
            if R[r, ON_DECODE] == 0:
                _end_prompt(R, T, E, S, X, ids, left, heap, log, i, r, now_s)
                continue
            if math.isnan(T[r, FIRST_DECODE]):
                T[r, FIRST_DECODE] = now_s
        elif math.isnan(T[r, PREFILL_END]):
            T[r, PREFILL_END] = now_s
        R[r, KNOWN] += 1
        token(T, r, now_s)
        if R[r, KNOWN] == R[r, TOTAL]:
            _leave_running(E, i, r)
            release(E, R, ids, left, i, r)
            went(R, E, W, i, r)
            learn(R, E, W, i, r)
            finish(E, R, T, S, log, i, r, now_s)


@inner
def _end_prompt(R, T, E, S, X, ids, left, heap, log, i, r, now_s):
    _leave_running(E, i, r)
    put_down(E, R, i, r)
    T[r, PREFILL_END] = now_s
    if S[FIRST_FROM_PREFILL] == 1:
        R[r, KNOWN] += 1
        token(T, r, now_s)
        if R[r, KNOWN] == R[r, TOTAL]:
            release(E, R, ids, left, i, r)
            finish(E, R, T, S, log, R[r, D], r, now_s)
            return
    hold_prompt(R, T, E, X, i, r, now_s)
    R[r, ON_DECODE] = R[r, REMOTE] = 1
    push(S, heap, now_s + X[HANDOFF], HANDED_OVER, r)


@inner
def _leave_running(E, i, r):
    at = ZERO
    while E[i, NUM_E + at] != r:
        at += 1
    E[i, RUNNING] -= 1
    for k in range(at, E[i, RUNNING]):
        E[i, NUM_E + k] = E[i, NUM_E + k + 1]


@inner
def token(T, r, now_s):
    if math.isnan(T[r, LAST_TOKEN]):
        T[r, FIRST_TOKEN] = now_s
        T[r, LONGEST_GAP] = 0.0
    elif now_s - T[r, LAST_TOKEN] > T[r, LONGEST_GAP]:
        T[r, LONGEST_GAP] = now_s - T[r, LAST_TOKEN]
    T[r, LAST_TOKEN] = now_s


@inner
def finish(E, R, T, S, log, i, r, now_s):
    put_down(E, R, i, r)
    T[r, FINISHED] = now_s
    note(S, log, FINISH, now_s, now_s, i, r, 0.0, 0.0, 0.0)


@inner
def put_down(E, R, i, r):
    E[i, LOAD_TOKENS] -= R[r, PROMPT]
    E[i, LOAD_REQUESTS] -= 1
