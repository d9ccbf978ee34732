"""Which waiting prompts a step of a prefill instance computes."""

from __future__ import annotations

import heapq

from vllm_disagg.core.scheduling import order as ordering
from vllm_disagg.core.scheduling import packing
from vllm_disagg.sim.kernel.blocks import find, hit_tokens, price
from vllm_disagg.sim.kernel.compiled import inner, inner_with_lists
from vllm_disagg.sim.kernel.lists import wait_before, wait_last
from vllm_disagg.sim.kernel.state import (
    BATCH_TOKENS,
    BLOCKS,
    BLOCKS_OF,
    CHOSEN,
    CHUNK_TOKENS,
    COMPUTED,
    CONSTANT,
    DEADLINE,
    FREE,
    HELD_BLOCKS,
    HELD_SHARE,
    KEPT,
    KNOWN,
    LINE,
    MOST_BATCH,
    NEXT,
    NONE,
    NUM_CHUNKS,
    NUM_E,
    OF_PREFILL,
    ORDER,
    PASSES,
    PATIENCE,
    PER_AREA,
    PER_TOKEN,
    QUEUED_AT,
    RUN_S,
    RUNNING,
    STAGES,
    TOKENS_OF,
    TTFT,
    WAITING,
    WATERMARK,
    WHO,
    ZERO,
)  # fmt: skip
from vllm_disagg.sim.kernel.times import regime_of

_is_full = inner(packing.is_full)
_choose = inner(packing.choose)
_backlog_limit = inner(packing.backlog_limit)
_even_limit = inner(packing.even_limit)
_rank = inner(ordering.rank)
_keep_on_time = inner_with_lists(ordering.keep_on_time)
_own_s = inner(ordering.own_s)


@inner
def plan_prompts(R, T, E, F, table, ids, left, G, ranks, i, now_s):
    """Returns how many are chosen: places of the line, both in `G`."""
    if E[i, WAITING] == NONE or _is_full(E[i, HELD_BLOCKS], F[i, HELD_SHARE], E[i, BLOCKS]):
        return ZERO
    num = _line_up(R, T, E, F, table, G, ranks, i, now_s)
    under_way = total = waiting = ZERO
    for k in range(E[i, RUNNING]):
        under_way += R[E[i, NUM_E + k], KNOWN] - R[E[i, NUM_E + k], COMPUTED]
    for k in range(num):
        waiting += R[G[LINE, k], KNOWN]
    most = _backlog_limit(waiting, E[i, BATCH_TOKENS], E[i, MOST_BATCH], E[i, STAGES])
    free = E[i, FREE] - (E[i, WATERMARK] if E[i, RUNNING] > 0 else 0)
    spare, looks = ZERO, True
    for k in range(num):
        r = G[LINE, k]
        least = R[r, KNOWN] - R[r, NUM_CHUNKS] * E[i, CHUNK_TOKENS]
        if not looks and least > spare:  # whatever the cache holds of it, it does not fit beside the first one
            G[TOKENS_OF, k], G[BLOCKS_OF, k] = least, 0
            continue
        found = find(E, R, ids, left, i, r)
        G[TOKENS_OF, k] = R[r, KNOWN] - hit_tokens(E, i, found, R[r, KNOWN])
        G[BLOCKS_OF, k] = price(E, R, ids, left, i, r, found, R[r, KNOWN])
        total += G[TOKENS_OF, k]
        if k == 0 and E[i, STAGES] == 1 and G[BLOCKS_OF, 0] <= free:  # in a pipeline the sum of all matters
            spare, looks = most - under_way - G[TOKENS_OF, 0], False
    limit = _even_limit(total, most, E[i, STAGES]) - under_way
    head = G[LINE, 0]
    count = _choose(G[TOKENS_OF], G[BLOCKS_OF], num, limit, free, R[head, PASSES], packing.MAX_PASSES, G[CHOSEN])
    if count > 0 and G[BLOCKS_OF, 0] > free:
        R[head, PASSES] += 1
    return count


@inner
def put_back(R, T, E, i, r):
    other = E[i, WAITING]
    while other != NONE and T[other, QUEUED_AT] < T[r, QUEUED_AT]:
        other = R[other, NEXT]
    if other == NONE:
        wait_last(E, R, i, r)
    else:
        wait_before(E, R, i, other, r)


@inner
def _line_up(R, T, E, F, table, G, ranks, i, now_s):
    if ranks is not None:  # noqa: SIM102 - numba leaves out what follows only if this stands alone
        if E[i, ORDER] != ordering.FCFS:
            return _in_order(R, T, E, F, table, G, ranks, i, now_s)
    num, r = ZERO, E[i, WAITING]
    while r != NONE and num < packing.LOOK_AHEAD:
        G[LINE, num] = r
        num += 1
        r = R[r, NEXT]
    return num


@inner_with_lists
def _in_order(R, T, E, F, table, G, ranks, i, now_s):
    """The queue is in order of arrival, which with one target for all is that of the deadlines."""
    num, r = ZERO, E[i, WAITING]
    while r != NONE:
        known = R[r, KNOWN]
        k = regime_of(table[i], OF_PREFILL, known)
        ranks[RUN_S, num] = _own_s(
            known, E[i, BATCH_TOKENS], table[i, OF_PREFILL, k, CONSTANT], table[i, OF_PREFILL, k, PER_TOKEN],
            table[i, OF_PREFILL, k, PER_AREA],
        )  # fmt: skip
        ranks[DEADLINE, num] = T[r, QUEUED_AT] + F[i, TTFT]
        ranks[KEPT, num] = 0.0
        ranks[WHO, num] = r
        num += 1
        r = R[r, NEXT]
    if E[i, ORDER] == ordering.EDF:
        for _, place in _keep_on_time(ranks[RUN_S], ranks[DEADLINE], num, now_s):
            ranks[KEPT, place] = 1.0
    line = [
        (
            _rank(
                E[i, ORDER], ranks[KEPT, k] > 0, now_s - T[int(ranks[WHO, k]), QUEUED_AT] >= F[i, PATIENCE], 0,
                T[int(ranks[WHO, k]), QUEUED_AT], ranks[RUN_S, k], ranks[DEADLINE, k], ordering.AGEING,
            ),
            k,
        )
        for k in range(num)
    ]  # fmt: skip
    heapq.heapify(line)
    count = min(num, packing.LOOK_AHEAD)
    for place in range(count):
        G[LINE, place] = int(ranks[WHO, heapq.heappop(line)[1]])
    return count
