"""KV on its way from prefill to decode, the hold that keeps it until then, and the blocks set aside for it."""

from __future__ import annotations

import math

from vllm_disagg.core.scheduling import reserve as reserving
from vllm_disagg.sim.kernel.blocks import blocks, find, hit_tokens, hold, price, publish, release, set_aside
from vllm_disagg.sim.kernel.compiled import inner
from vllm_disagg.sim.kernel.growth import went
from vllm_disagg.sim.kernel.lists import compute_here, mark, note, push, take, wait_first
from vllm_disagg.sim.kernel.state import (
    BANDWIDTH,
    BLOCK_SIZE,
    COMPUTED,
    EARLY,
    END,
    FREE,
    HELD,
    HELD_BLOCKS,
    HOLD,
    HOLD_CAP,
    HOLD_LAST,
    HOLD_UNTIL,
    KNOWN,
    KV_BYTES,
    LATENCY,
    LENT,
    LONGEST,
    NEXT,
    NEXT_HOLD,
    NONE,
    NUM_COMING,
    NUM_HERE,
    NUM_PARKED,
    NUM_RECENT,
    NUM_X,
    OURS_DECODE,
    OWN,
    PARKED,
    POLICY,
    PROMISED,
    PROMPT,
    PULL_FAILED,
    PULL_TIMEOUT,
    PULLED,
    PULLING,
    READS_EARLY,
    REMOTE,
    RESERVED,
    RUNNING,
    SIDE,
    TRANSFER,
    TRANSFER_END,
    TRANSFER_START,
    WAKE,
    WAKE_AT,
    D,
    P,
)  # fmt: skip

_reserve_target = inner(reserving.reserve_target)


@inner
def keep_reserve(R, E, left, i):
    promised = E[i, PROMISED] if E[i, POLICY] == OURS_DECODE else 0
    target = _reserve_target(E[i, FREE], E[i, RESERVED], E[i, LENT], E[i, LONGEST], E[i, RUNNING], promised)
    set_aside(E, R, left, i, target - E[i, RESERVED])
    E[i, RESERVED] = target


@inner
def _recall(E, W, i, num_blocks):
    """The longest of the recent prompts, this one included."""
    W[i, E[i, NUM_RECENT] % reserving.RECENT_PROMPTS] = num_blocks
    E[i, NUM_RECENT] += 1
    longest = num_blocks
    for k in range(min(E[i, NUM_RECENT], reserving.RECENT_PROMPTS)):
        longest = max(longest, W[i, k])
    E[i, LONGEST] = longest


@inner
def fetch_early(R, T, E, S, X, W, ids, left, heap, log, i, r, now_s):
    if S[READS_EARLY] == 0 or T[r, HOLD_UNTIL] <= now_s:
        return
    known = R[r, KNOWN]
    found = find(E, R, ids, left, i, r)
    hit = hit_tokens(E, i, found, known)
    if R[r, PROMPT] - hit <= 1:
        return
    _recall(E, W, i, blocks(E, i, R[r, PROMPT]) - hit // E[i, BLOCK_SIZE])
    needed = price(E, R, ids, left, i, r, found, known)
    if needed > E[i, RESERVED]:
        return
    set_aside(E, R, left, i, -needed)
    hold(E, R, ids, left, i, r, found, known)
    E[i, RESERVED] -= needed
    E[i, LENT] += R[r, OWN + E[i, SIDE]]
    R[r, EARLY] = 1
    E[i, NUM_COMING] += 1
    start_pull(R, T, E, S, X, heap, log, i, r, hit, now_s)


@inner
def start_pull(R, T, E, S, X, heap, log, i, r, hit, now_s):
    R[r, REMOTE], R[r, PULLING], R[r, COMPUTED] = 0, 1, R[r, PROMPT]
    T[r, TRANSFER_START] = now_s
    sender = R[r, P]
    end_s = now_s
    num_blocks = blocks(E, i, R[r, PROMPT]) - hit // E[i, BLOCK_SIZE]
    if sender != NONE:
        out, into = E[sender, END], E[i, END]
        begin_s = max(now_s, X[NUM_X + 2 * out], X[NUM_X + 2 * into + 1])
        end_s = begin_s + (X[LATENCY] + num_blocks * E[i, BLOCK_SIZE] * S[KV_BYTES] / X[BANDWIDTH])
        X[NUM_X + 2 * out] = X[NUM_X + 2 * into + 1] = end_s
    limit_s = now_s + X[PULL_TIMEOUT]
    R[r, PULL_FAILED] = 1 if end_s > limit_s or end_s > T[r, HOLD_UNTIL] else 0
    note(S, log, TRANSFER, now_s, end_s, i, r, float(sender), float(num_blocks), 1.0 - R[r, PULL_FAILED])
    push(S, heap, min(end_s, limit_s), PULLED, r)


@inner
def end_pull(R, T, E, S, W, ids, left, r, now_s):
    i = R[r, D]
    release_hold(R, E, S, ids, left, r)
    R[r, PULLING] = 0
    if R[r, EARLY] == 1:
        E[i, NUM_COMING] -= 1
    if R[r, PULL_FAILED] == 1:
        _lose(R, T, E, W, ids, left, i, r)
        return
    R[r, COMPUTED] = min(R[r, PROMPT], R[r, KNOWN] - 1)
    T[r, TRANSFER_END] = now_s
    own = R[r, OWN + E[i, SIDE]]
    publish(E, R, ids, left, i, r, R[r, PROMPT])
    if R[r, EARLY] == 1:
        E[i, LENT] += R[r, OWN + E[i, SIDE]] - own
    else:
        E[i, NUM_HERE] += 1


@inner
def _lose(R, T, E, W, ids, left, i, r):
    R[r, COMPUTED] = 0
    T[r, TRANSFER_START] = math.nan
    if R[r, EARLY] == 1:
        compute_here(E, R, i, r)
        E[i, LENT] -= R[r, OWN + E[i, SIDE]]
    else:
        take(E, R, i, PARKED, NEXT, r)
        E[i, NUM_PARKED] -= 1
        went(R, E, W, i, r)
        wait_first(E, R, i, r)
    release(E, R, ids, left, i, r)


@inner
def hold_prompt(R, T, E, X, i, r, now_s):
    """`hold` of the reference."""
    T[r, HOLD_UNTIL] = now_s + X[HOLD_CAP]
    R[r, NEXT_HOLD] = NONE
    if E[i, HOLD] == NONE:
        E[i, HOLD] = r
    else:
        R[E[i, HOLD_LAST], NEXT_HOLD] = r
    E[i, HOLD_LAST] = r
    E[i, HELD_BLOCKS] += blocks(E, i, R[r, PROMPT])


@inner
def release_hold(R, E, S, ids, left, r):
    if R[r, P] != NONE and R[r, HELD] == 1:
        _let_go(R, E, ids, left, R[r, P], r)
        mark(S, R[r, P])


@inner
def expire_holds(R, T, E, ids, left, i, now_s):
    while E[i, HOLD] != NONE and T[E[i, HOLD], HOLD_UNTIL] <= now_s:
        r = E[i, HOLD]
        E[i, HOLD] = R[r, NEXT_HOLD]
        if R[r, HELD] == 1:
            _let_go(R, E, ids, left, i, r)


@inner
def wake_at_expiry(R, T, E, F, S, heap, i):
    while E[i, HOLD] != NONE and R[E[i, HOLD], HELD] == 0:
        E[i, HOLD] = R[E[i, HOLD], NEXT_HOLD]
    if E[i, HOLD] != NONE and F[i, WAKE_AT] != T[E[i, HOLD], HOLD_UNTIL]:
        F[i, WAKE_AT] = T[E[i, HOLD], HOLD_UNTIL]
        push(S, heap, F[i, WAKE_AT], WAKE, i)


@inner
def _let_go(R, E, ids, left, i, r):
    E[i, HELD_BLOCKS] -= blocks(E, i, R[r, PROMPT])
    release(E, R, ids, left, i, r)
