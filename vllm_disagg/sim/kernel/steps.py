"""What a step computes, as vLLM decides it; and before it what the schedulers of this project let vLLM see."""

from __future__ import annotations

import math

from vllm_disagg.sim.kernel.blocks import find, grow, hit_tokens, hold, missing, price, publish, release
from vllm_disagg.sim.kernel.compiled import inner
from vllm_disagg.sim.kernel.decode import asks, has_room, plan_decode, sees, sees_local, within_pace
from vllm_disagg.sim.kernel.growth import came_in, holders_of, promise, promise_is_due, went
from vllm_disagg.sim.kernel.lists import append, compute_here, note, take, wait_first, wait_no_more
from vllm_disagg.sim.kernel.prefill import plan_prompts, put_back
from vllm_disagg.sim.kernel.state import (
    AREA,
    AWAY,
    BUDGET,
    CACHED,
    CHOSEN,
    CHUNK_TOKENS,
    COMPUTED,
    CONTEXT,
    DECODE_START,
    DECODES,
    EARLY,
    EPOCH,
    FETCH_ONLY,
    FREE,
    HOLD_UNTIL,
    KNOWN,
    LENT,
    LINE,
    MAX_SEQS,
    NEXT,
    NEXT_AWAY,
    NONE,
    NUM_E,
    NUM_FORMED,
    NUM_HERE,
    NUM_PARKED,
    NUM_PREEMPTED,
    NUM_PREFILL,
    ON_DECODE,
    OURS_DECODE,
    OURS_PREFILL,
    OWN,
    PACED,
    PARKED,
    POLICY,
    PREEMPTION,
    PREEMPTIONS,
    PREFILL_FIRST,
    PREFILL_START,
    PREFILLS,
    PROMPT,
    PULLING,
    READS_EARLY,
    REMOTE,
    ROOM,
    RUNNING,
    SIDE,
    SPLIT,
    TOKENS,
    WAITING,
    WATERMARK,
    WHOLE,
    ZERO,
)  # fmt: skip
from vllm_disagg.sim.kernel.transfers import keep_reserve, release_hold, start_pull


@inner
def form(R, T, E, F, S, X, W, G, table, parts, ids, left, ranks, heap, log, i, slot, now_s):
    while True:
        parts[i, slot, 0, 0] = 0
        S[TOKENS] = S[AREA] = S[PREFILLS] = S[DECODES] = S[CONTEXT] = 0
        chosen = _plan(R, T, E, F, S, W, G, table, ids, left, ranks, i, now_s)
        budget = _budget(R, T, E, ids, left, i, now_s)
        preempted, admits = False, True
        if E[i, POLICY] != PREFILL_FIRST:
            budget, preempted = _continue_running(R, T, E, S, W, parts, ids, left, log, i, slot, budget, now_s)
            admits = not preempted
        if admits:
            _admit(R, T, E, F, S, X, W, G, parts, ids, left, heap, log, i, slot, chosen, budget, now_s)
            if E[i, POLICY] == PREFILL_FIRST and parts[i, slot, 0, 0] == 0:
                budget, preempted = _continue_running(R, T, E, S, W, parts, ids, left, log, i, slot, budget, now_s)
        if parts[i, slot, 0, 0] > 0 or not preempted:
            return


@inner
def _plan(R, T, E, F, S, W, G, table, ids, left, ranks, i, now_s):
    """Returns how many prompts of the line in `G` are chosen, where that is what is seen."""
    S[PACED] = S[FETCH_ONLY] = 0
    early, due = S[READS_EARLY] == 1 and i >= S[NUM_PREFILL], False
    if E[i, POLICY] == OURS_DECODE:
        due = early and promise_is_due(E, i)
        if due:
            holders_of(R, T, E, W, i)
            promise(E, W, i)
    E[i, NUM_FORMED] += 1
    if early:
        keep_reserve(R, E, left, i)
    if E[i, POLICY] == OURS_PREFILL:
        return plan_prompts(R, T, E, F, table, ids, left, G, ranks, i, now_s)
    if E[i, POLICY] == OURS_DECODE:
        plan_decode(R, T, E, F, S, table, i, now_s)
        if not due and asks(E, S, i):
            holders_of(R, T, E, W, i)
    return ZERO


@inner
def _budget(R, T, E, ids, left, i, now_s):
    budget = E[i, BUDGET]
    head = E[i, WAITING]
    if head == NONE or not (E[i, POLICY] == WHOLE or E[i, POLICY] == PREFILL_FIRST):
        return budget
    _give_up_expired(R, T, E, i, head, now_s)
    if R[head, REMOTE] == 1 or R[head, EARLY] == 1:
        return budget
    if E[i, POLICY] == WHOLE or R[head, KNOWN] > R[head, PROMPT]:
        found = find(E, R, ids, left, i, head)
        budget = max(budget, R[head, KNOWN] - hit_tokens(E, i, found, R[head, KNOWN]))
    return budget


@inner
def _give_up_expired(R, T, E, i, r, now_s):
    if R[r, REMOTE] == 1 and T[r, HOLD_UNTIL] <= now_s:
        compute_here(E, R, i, r)


@inner
def _continue_running(R, T, E, S, W, parts, ids, left, log, i, slot, budget, now_s):
    position, preempted = ZERO, False
    while position < E[i, RUNNING] and budget > 0:
        position, num = _continue_decoding(R, E, S, parts, i, slot, position, budget)
        budget -= num
        if position >= E[i, RUNNING] or budget == 0:
            break
        r = E[i, NUM_E + position]
        new = within_pace(S, min(R[r, KNOWN] - R[r, COMPUTED], budget))
        if new == 0:
            position += 1
            continue
        alive = True
        while alive and missing(E, R, i, r, R[r, COMPUTED] + new) > E[i, FREE]:
            E[i, RUNNING] -= 1
            victim = E[i, NUM_E + E[i, RUNNING]]
            _preempt(R, T, E, S, W, ids, left, log, i, victim, now_s)
            preempted, alive = True, victim != r
        if not alive:
            break
        grow(E, R, left, i, r, R[r, COMPUTED] + new)
        budget -= new
        _schedule(R, E, S, parts, ids, left, i, slot, r, new)
        position += 1
    return budget, preempted


@inner
def _continue_decoding(R, E, S, parts, i, slot, position, budget):
    """The common case of `_continue_running`, without a call for each request: one new token, and room for it; or none,
    while the last one is under way. Stops at the first request that needs more. Returns its position, and how many
    tokens those before it have."""
    room, last, caches = ROOM + E[i, SIDE], E[i, RUNNING], E[i, CHUNK_TOKENS] > 0
    k, context = parts[i, slot, 0, 0], ZERO
    first = k
    while position < last and k - first < budget:
        r = E[i, NUM_E + position]
        computed = R[r, COMPUTED]
        if R[r, KNOWN] == computed:
            position += 1
            continue
        if R[r, KNOWN] != computed + 1 or computed >= R[r, room] or (caches and computed < R[r, PROMPT]):
            break
        R[r, COMPUTED] = computed + 1
        context += computed + 1
        k += 1
        parts[i, slot, k, 0] = r
        parts[i, slot, k, 1] = R[r, EPOCH]
        position += 1
    parts[i, slot, 0, 0] = k
    S[DECODES] += k - first
    S[CONTEXT] += context
    return position, k - first


@inner
def _admit(R, T, E, F, S, X, W, G, parts, ids, left, heap, log, i, slot, chosen, budget, now_s):
    if S[FETCH_ONLY] == 0 and E[i, NUM_HERE] > 0:
        budget = _admit_parked(R, T, E, S, parts, ids, left, i, slot, budget, now_s)
        if budget == NONE:
            return
    if E[i, POLICY] == OURS_PREFILL:
        for k in range(chosen):
            if budget <= 0 or E[i, RUNNING] >= E[i, MAX_SEQS]:
                return
            r = G[LINE, G[CHOSEN, k]]
            new = _admit_one(R, T, E, F, S, X, W, parts, ids, left, heap, log, i, slot, r, budget, now_s)
            if new == NONE:
                return
            budget -= new
        return
    # Where nobody holds blocks, those whose early KV is here go first.
    first = 0 if E[i, RUNNING] == 0 and E[i, PARKED] == NONE and E[i, LENT] > 0 else 1
    for turn in range(first, 2):
        local, away = turn == 1, E[i, AWAY]
        r = E[i, WAITING] if local else away
        while True:
            if local and not sees_local(S):
                local, r = False, away  # nobody else is seen
            if r == NONE:
                break
            following = R[r, NEXT] if local else R[r, NEXT_AWAY]
            if r == away:
                away = R[r, NEXT_AWAY]
            if turn == 1 or (R[r, EARLY] == 1 and R[r, PULLING] == 0):
                if budget <= 0 or (E[i, RUNNING] >= E[i, MAX_SEQS] and S[FETCH_ONLY] == 0):
                    return
                _give_up_expired(R, T, E, i, r, now_s)
                if sees(R, S, r) and not (R[r, EARLY] == 1 and R[r, PULLING] == 1):
                    new = _admit_one(R, T, E, F, S, X, W, parts, ids, left, heap, log, i, slot, r, budget, now_s)
                    if new == NONE:
                        return
                    budget -= new
            r = following


@inner
def _admit_parked(R, T, E, S, parts, ids, left, i, slot, budget, now_s):
    """Those whose KV has come. Returns the budget left, NONE where somebody does not fit."""
    r, here = E[i, PARKED], E[i, NUM_HERE]
    while here > 0:
        following = R[r, NEXT]
        if budget <= 0 or E[i, RUNNING] >= E[i, MAX_SEQS]:
            return NONE
        if R[r, PULLING] == 0:
            here -= 1
            watermark = E[i, WATERMARK] if E[i, RUNNING] > 0 else ZERO
            new = R[r, KNOWN] - R[r, COMPUTED]
            if new > budget or missing(E, R, i, r, R[r, KNOWN]) + watermark > E[i, FREE]:
                return NONE
            take(E, R, i, PARKED, NEXT, r)
            E[i, NUM_PARKED] -= 1
            E[i, NUM_HERE] -= 1
            grow(E, R, left, i, r, R[r, KNOWN])
            _start(R, T, E, S, parts, ids, left, i, slot, r, new, now_s)
            budget -= new
        r = following
    return budget


@inner
def _admit_one(R, T, E, F, S, X, W, parts, ids, left, heap, log, i, slot, r, budget, now_s):
    """NONE for a request that does not fit."""
    plans = E[i, POLICY] == OURS_DECODE
    watermark = E[i, WATERMARK] if E[i, RUNNING] > 0 else ZERO
    known = R[r, KNOWN]
    if R[r, EARLY] == 1:
        own = R[r, OWN + E[i, SIDE]]
        if plans and not has_room(R, T, E, F, S, W, i, r, False):
            return NONE
        if missing(E, R, i, r, known) + watermark > E[i, FREE] + own:
            return NONE
        wait_no_more(E, R, i, r)
        R[r, EARLY] = 0
        E[i, LENT] -= own
        grow(E, R, left, i, r, known)
        if plans:
            came_in(R, T, E, W, i, r)
        new = known - R[r, COMPUTED]
        _start(R, T, E, S, parts, ids, left, i, slot, r, new, now_s)
        return new
    found = find(E, R, ids, left, i, r)
    hit = hit_tokens(E, i, found, known)
    needed = price(E, R, ids, left, i, r, found, known)
    if R[r, REMOTE] == 1 and R[r, PROMPT] - hit > 1:
        if plans and not has_room(R, T, E, F, S, W, i, r, True):
            return NONE
        if needed + watermark > E[i, FREE] or needed + watermark + _reserved(R, E, i) > E[i, FREE]:
            return NONE
        wait_no_more(E, R, i, r)
        hold(E, R, ids, left, i, r, found, known)
        append(E, R, i, PARKED, NEXT, r)
        E[i, NUM_PARKED] += 1
        if plans:
            came_in(R, T, E, W, i, r)
        start_pull(R, T, E, S, X, heap, log, i, r, hit, now_s)
        return ZERO
    if (E[i, POLICY] == WHOLE or E[i, POLICY] == PREFILL_FIRST) and known - hit > budget:
        return NONE
    new = within_pace(S, min(known - hit, budget))
    if new == 0 or (plans and not has_room(R, T, E, F, S, W, i, r, False)) or needed + watermark > E[i, FREE]:
        return NONE
    wait_no_more(E, R, i, r)
    if R[r, REMOTE] == 1:
        release_hold(R, E, S, ids, left, r)
    hold(E, R, ids, left, i, r, found, hit + new)
    R[r, COMPUTED] = hit
    if R[r, CACHED] < 0:
        R[r, CACHED] = hit
    if plans:
        came_in(R, T, E, W, i, r)
    _start(R, T, E, S, parts, ids, left, i, slot, r, new, now_s)
    return new


@inner
def _start(R, T, E, S, parts, ids, left, i, slot, r, new, now_s):
    """With the beginning of the reference's `_schedule` inside: only who has just come in can begin."""
    column = DECODE_START if R[r, SPLIT] == 1 and R[r, ON_DECODE] == 1 else PREFILL_START
    if math.isnan(T[r, column]):
        T[r, column] = now_s
    E[i, NUM_E + E[i, RUNNING]] = r
    E[i, RUNNING] += 1
    _schedule(R, E, S, parts, ids, left, i, slot, r, new)


@inner
def _reserved(R, E, i):
    blocks = ZERO
    for k in range(E[i, RUNNING]):
        r = E[i, NUM_E + k]
        if R[r, KNOWN] - R[r, COMPUTED] > 1:
            blocks += missing(E, R, i, r, R[r, KNOWN])
    return blocks


@inner
def _schedule(R, E, S, parts, ids, left, i, slot, r, new):
    computed = R[r, COMPUTED]
    if new > 1:
        S[TOKENS] += new
        S[AREA] += new * (new + 2 * computed)
        S[PREFILLS] += 1
    else:
        S[DECODES] += 1
        S[CONTEXT] += computed + 1
    R[r, COMPUTED] = computed + new
    publish(E, R, ids, left, i, r, computed + new)
    k = parts[i, slot, 0, 0] + 1
    parts[i, slot, 0, 0] = k
    parts[i, slot, k, 0] = r
    parts[i, slot, k, 1] = R[r, EPOCH] if computed + new == R[r, KNOWN] else NONE


@inner
def _preempt(R, T, E, S, W, ids, left, log, i, r, now_s):
    note(S, log, PREEMPTION, now_s, now_s, i, r, float(R[r, COMPUTED]), 0.0, 0.0)
    release(E, R, ids, left, i, r)
    went(R, E, W, i, r)
    R[r, COMPUTED] = 0
    R[r, EPOCH] += 1
    R[r, PREEMPTIONS] += 1
    E[i, NUM_PREEMPTED] += 1
    if E[i, POLICY] == OURS_PREFILL:
        put_back(R, T, E, i, r)
    else:
        wait_first(E, R, i, r)
