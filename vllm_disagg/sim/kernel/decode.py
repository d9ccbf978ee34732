"""How much of prompts a step of a decode instance may have, who is seen, who comes in, and who gives way. The plan of a
step lies in `S`."""

from __future__ import annotations

import math

from vllm_disagg.core.scheduling import growth as rules
from vllm_disagg.core.scheduling import pace, victims
from vllm_disagg.sim.kernel.compiled import inner, inner_in_loops
from vllm_disagg.sim.kernel.growth import may_come_in
from vllm_disagg.sim.kernel.state import (
    AHEAD,
    BUDGET,
    COMPUTED,
    COST,
    EARLY,
    FETCH_ONLY,
    FIRST_DECODE,
    FREE,
    HEADROOM,
    KNOWN,
    LOCAL_TOKENS,
    MAX_SEQS,
    NONE,
    NUM_AWAY,
    NUM_COMING,
    NUM_E,
    NUM_LOCAL,
    NUM_PREEMPTED,
    OWN,
    PACED,
    PREEMPTIONS,
    PREFILL_END,
    PROMPT,
    PROMPT_TOKENS,
    REMOTE,
    RUNNING,
    SIDE,
    SPLIT,
    TPOT,
    WAITING,
    ZERO,
)  # fmt: skip
from vllm_disagg.sim.kernel.times import step_s

_next_headroom = inner(rules.next_headroom)
_prompt_tokens_beside = inner(pace.budget_rule(step_s))
_ahead_s = inner(victims.ahead_s)
_rank = inner(victims.rank)


@inner
def plan_decode(R, T, E, F, S, table, i, now_s):
    F[i, HEADROOM] = _next_headroom(F[i, HEADROOM], E[i, NUM_PREEMPTED])
    E[i, NUM_PREEMPTED] = 0
    _keep_who_cannot_afford_it(R, T, E, F, table, i, now_s)
    S[FETCH_ONLY] = 1 if E[i, RUNNING] >= E[i, MAX_SEQS] else 0
    _budget(R, E, F, S, table, i)


@inner
def sees_local(S):
    """Whether those with their prompt before them are seen."""
    return S[FETCH_ONLY] == 0 and (S[PACED] == 0 or S[LOCAL_TOKENS] > 0)


@inner
def asks(E, S, i):
    """Whether somebody may ask for room in this step."""
    return E[i, NUM_AWAY] > E[i, NUM_COMING] or (E[i, NUM_LOCAL] > 0 and sees_local(S))


@inner
def sees(R, S, r):
    if S[FETCH_ONLY] == 1:
        return R[r, REMOTE] == 1
    if R[r, REMOTE] == 1 or R[r, EARLY] == 1 or S[PACED] == 0:
        return True
    if S[LOCAL_TOKENS] <= 0:
        return False
    S[LOCAL_TOKENS] -= min(S[LOCAL_TOKENS], R[r, KNOWN])
    return True


@inner
def within_pace(S, new):
    if S[PACED] == 0 or new <= 1:
        return new
    new = min(new, S[PROMPT_TOKENS])
    S[PROMPT_TOKENS] -= new
    return new


@inner
def has_room(R, T, E, F, S, W, i, r, parks):
    if S[FETCH_ONLY] == 1 and not parks:
        return False
    own = R[r, OWN + E[i, SIDE]] if R[r, EARLY] == 1 else ZERO
    return may_come_in(R, T, E, F, W, i, r, E[i, FREE] + own)


@inner
def _budget(R, E, F, S, table, i):
    S[PACED] = 0
    prompts = context = wanted = ZERO
    first = NONE
    for k in range(E[i, RUNNING]):
        r = E[i, NUM_E + k]
        if R[r, KNOWN] - R[r, COMPUTED] > 1:
            prompts += 1
            if first == NONE:
                first = r
        else:
            context += R[r, COMPUTED] + 1
    streams = E[i, RUNNING] - prompts
    if streams == 0 or (prompts == 0 and E[i, WAITING] == NONE):
        return
    most = max(pace.FLOOR_TOKENS, E[i, BUDGET] - streams)
    computed = R[first, COMPUTED] if first != NONE else ZERO
    budget = _prompt_tokens_beside(table[i], streams, context, F[i, TPOT], computed, min(pace.FLOOR_TOKENS, most), most)
    if prompts > 0:
        for k in range(E[i, RUNNING]):
            rest = R[E[i, NUM_E + k], KNOWN] - R[E[i, NUM_E + k], COMPUTED]
            if rest > 1:
                wanted += min(rest, budget)
    S[PACED], S[PROMPT_TOKENS], S[LOCAL_TOKENS] = 1, budget, budget - wanted


@inner
def _keep_who_cannot_afford_it(R, T, E, F, table, i, now_s):
    running = E[i, RUNNING]
    if E[i, FREE] >= running or running < 2:
        return
    tpot_s = F[i, TPOT]
    for k in range(running):
        r = E[i, NUM_E + k]
        first_s = T[r, FIRST_DECODE] if R[r, SPLIT] == 1 else T[r, PREFILL_END]
        since_s = 0.0 if math.isnan(first_s) else now_s - first_s
        known = R[r, KNOWN]
        T[r, AHEAD] = _ahead_s(known - R[r, PROMPT], tpot_s, since_s)
        if known > 1:
            T[r, COST] = step_s(table[i], known, known * known, 1, 0, 0)
        else:
            T[r, COST] = step_s(table[i], 0, 0, 0, 1, known)
    last = _rank_of(R, T, E[i, NUM_E])
    for k in range(1, running):  # stable, and quick where they were in order already
        r = E[i, NUM_E + k]
        mine = _rank_of(R, T, r)
        if not mine < last:
            last = mine
            continue
        at = k
        while at > 0:
            other = E[i, NUM_E + at - 1]
            if not mine < _rank_of(R, T, other):
                break
            E[i, NUM_E + at] = other
            at -= 1
        E[i, NUM_E + at] = r


@inner_in_loops
def _rank_of(R, T, r):
    return _rank(R[r, PREEMPTIONS], 0, T[r, AHEAD], T[r, COST])
