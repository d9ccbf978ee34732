"""The simulator of `reference`, compiled: the same events in the same order, over arrays.

Read `reference` first; functions here have the names of its methods. Two details keep results equal to the last bit:
sums are written in the same order, and events of the same moment keep the order in which they were pushed.

Everything a run needs lies in a few arrays, since every array that is handed to a compiled function costs time: `R`
has a row of whole numbers per request and `T` a row of times, `E` and `F` the same per engine, `S` and `X` hold what
there is once, `parts` the steps under way, `ids` and `left` the prefix cache.
Where no prompt shares its beginning with another, `ids` and `left` are None: numba then leaves out what works on them,
and has less to compile. Names of columns are the constants below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

import numpy as np
from numba import njit

from vllm_disagg.sim import outcome, reference

_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(function: _F) -> _F:
    """numba's compiler, with its result kept on disk where that can be written."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep it
        return njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def _inner(function: _F) -> _F:
    """The same for what only compiled functions call: no entry from Python, and it is kept with its caller."""
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)  # type: ignore[no-any-return]


def _numbers(count: int) -> list[np.int64]:
    """0, 1, 2, ... numba gives each plain number among the globals a type of its own, and compiles every function once
    for each of those that it is called with; numbers of numpy all have one type."""
    return [np.int64(number) for number in range(count)]


DISPATCH, FINISH, PREEMPTION, STEP, TRANSFER = (
    np.int64(getattr(outcome, name)) for name in ("DISPATCH", "FINISH", "PREEMPTION", "STEP", "TRANSFER")
)
HANDED_OVER, PULLED, QUEUED, STAGE_FREE, STEP_END, WAKE = (
    np.int64(getattr(reference, name)) for name in ("HANDED_OVER", "PULLED", "QUEUED", "STAGE_FREE", "STEP_END", "WAKE")
)

RESERVE_SHARE: Final = np.int64(reference.RESERVE_SHARE)

# Columns of R, one row per request. Pairs are for the prefill and for the decode instance.
(
    KNOWN, COMPUTED, ROOM, ROOM_D, EPOCH, TOTAL, PROMPT, SPLIT, ON_DECODE, REMOTE, PULL_FAILED, OWN, OWN_D,
    CHUNKS, CHUNKS_D, HELD, HELD_D, P, D, NEXT, NEXT_HOLD, CACHED, PREEMPTIONS, REFUSED, FIRST_CHUNK, NUM_CHUNKS, NUM_R,
) = _numbers(27)  # fmt: skip

# Columns of T.
(
    ARRIVAL, LAST_TOKEN, HOLD_UNTIL, PREFILL_START, PREFILL_END, TRANSFER_START, TRANSFER_END, DECODE_START,
    FIRST_DECODE, FIRST_TOKEN, FINISHED, LONGEST_GAP, NUM_T,
) = _numbers(13)  # fmt: skip

# Columns of E, one row per engine. From NUM_E on: its running requests.
(
    BLOCKS, BLOCK_SIZE, STAGES, POLICY, BUDGET, MAX_SEQS, WATERMARK, CHUNK_TOKENS, SIDE, END,
    FREE, RUNNING, WAITING, WAITING_LAST, FETCHED, FETCHED_LAST, STEP_FIRST, STEP_COUNT, HOLD, HOLD_LAST,
    LOAD_TOKENS, LOAD_REQUESTS, LAST_CHOSEN, LEFT_FIRST, LEFT_LAST, LEFT_BLOCKS, NUM_E,
) = _numbers(27)  # fmt: skip

# Columns of F. From NUM_F on: when each stage is free.
STEP_OVERHEAD, REQUEST_OVERHEAD, HOP, WAKE_AT, NUM_F = _numbers(5)

# Places in S. From NUM_S on: the engines that may form a step.
(
    PUSHED, CHOICES, STEPS, EVENTS, LOGGED, HEAP, DIRTY, NUM_PREFILL, FIRST_FROM_PREFILL, MIN_SPLIT, PHASE, KV_BYTES,
    EARLY, TOKENS, AREA, PREFILLS, DECODES, CONTEXT, NUM_S,
) = _numbers(19)  # fmt: skip

# Places in X. From NUM_X on: when each link end is free to send, and to receive.
BANDWIDTH, LATENCY, HANDOFF, DISPATCH_S, HOLD_CAP, PULL_TIMEOUT, NUM_X = _numbers(7)

# The last axis of `left`, one entry per chunk and then one per request: its neighbours in the line of leftovers, its
# blocks (NONE for one that is not in line), and the references on a chunk (NONE for one that is not cached).
BEFORE, AFTER, SIZE, REFS = _numbers(4)

CHUNKED, WHOLE, PREFILL_FIRST = _numbers(3)
DECODE_ONLY = np.int64(2)

# Columns of a regime in the table of latencies.
UP_TO, CONSTANT, PER_TOKEN, PER_AREA, PER_PREFILL, PER_DECODE, PER_CONTEXT, NUM_REGIME = _numbers(8)

# The second axis of the table of latencies.
OF_PREFILL, OF_DECODE, OF_MIXED = _numbers(3)

NONE: Final = np.int64(-1)
ZERO: Final = np.int64(0)


# The queue of events: a binary heap over (time, order of pushing).


@_inner
def _before(heap, a, b):
    return heap[a, 0] < heap[b, 0] or (heap[a, 0] == heap[b, 0] and heap[a, 1] < heap[b, 1])


@_inner
def _swap(heap, a, b):
    for k in range(4):
        heap[a, k], heap[b, k] = heap[b, k], heap[a, k]


@_inner
def _push(S, heap, time_s, kind, subject):
    S[PUSHED] += 1
    at = S[HEAP]
    S[HEAP] += 1
    heap[at, 0], heap[at, 1], heap[at, 2], heap[at, 3] = time_s, S[PUSHED], kind, subject
    while at > 0 and _before(heap, at, (at - 1) // 2):
        _swap(heap, at, (at - 1) // 2)
        at = (at - 1) // 2


@_inner
def _pop(S, heap):
    """Drop the first event."""
    S[HEAP] -= 1
    size = S[HEAP]
    _swap(heap, ZERO, size)
    at = ZERO
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and _before(heap, child + 1, child):
            child += 1
        if not _before(heap, child, at):
            return
        _swap(heap, child, at)
        at = child


@_inner
def _note(S, log, kind, start_s, end_s, engine, request, a, b, c):
    if len(log) == 0:
        return
    row = S[LOGGED]
    S[LOGGED] += 1
    if row < len(log):
        log[row, 0], log[row, 1], log[row, 2], log[row, 3] = kind, start_s, end_s, engine
        log[row, 4], log[row, 5], log[row, 6], log[row, 7] = request, a, b, c


@_inner
def _mark(S, engine):
    """Engines that may form a step, in the order of their numbers, each once."""
    at = S[DIRTY]
    while at > 0 and S[NUM_S + at - 1] >= engine:
        if S[NUM_S + at - 1] == engine:
            return
        at -= 1
    for k in range(S[DIRTY], at, -1):
        S[NUM_S + k] = S[NUM_S + k - 1]
    S[NUM_S + at] = engine
    S[DIRTY] += 1


# Queues of requests: linked by NEXT.


@_inner
def _append(E, R, i, first, last, r):
    R[r, NEXT] = NONE
    if E[i, first] == NONE:
        E[i, first] = r
    else:
        R[E[i, last], NEXT] = r
    E[i, last] = r


@_inner
def _prepend(E, R, i, first, last, r):
    R[r, NEXT] = E[i, first]
    if E[i, first] == NONE:
        E[i, last] = r
    E[i, first] = r


@_inner
def _take_first(E, R, i, first):
    E[i, first] = R[E[i, first], NEXT]


# Blocks; see `pool.Pool`.


@_inner
def _prefix_blocks(E, i, num_chunks):
    return num_chunks * E[i, CHUNK_TOKENS] // E[i, BLOCK_SIZE]


@_inner
def _chunk_blocks(E, i, k):
    return _prefix_blocks(E, i, k + 1) - _prefix_blocks(E, i, k)


@_inner
def _blocks(E, i, num_tokens):
    return (num_tokens + E[i, BLOCK_SIZE] - 1) // E[i, BLOCK_SIZE]


@_inner
def _line_up(E, left, i, node, blocks):
    left[i, node, BEFORE], left[i, node, AFTER], left[i, node, SIZE] = E[i, LEFT_LAST], NONE, blocks
    if E[i, LEFT_LAST] == NONE:
        E[i, LEFT_FIRST] = node
    else:
        left[i, E[i, LEFT_LAST], AFTER] = node
    E[i, LEFT_LAST] = node
    E[i, LEFT_BLOCKS] += blocks


@_inner
def _leave_line(E, left, i, node):
    before, after, blocks = left[i, node, BEFORE], left[i, node, AFTER], left[i, node, SIZE]
    if before == NONE:
        E[i, LEFT_FIRST] = after
    else:
        left[i, before, AFTER] = after
    if after == NONE:
        E[i, LEFT_LAST] = before
    else:
        left[i, after, BEFORE] = before
    left[i, node, SIZE] = NONE
    E[i, LEFT_BLOCKS] -= blocks
    return blocks


@_inner
def _overwrite(E, R, left, i):
    if left is None:
        return
    num_chunks = left.shape[1] - len(R)
    while E[i, LEFT_BLOCKS] > E[i, FREE]:
        node = E[i, LEFT_FIRST]
        blocks = left[i, node, SIZE]
        taken = min(blocks, E[i, LEFT_BLOCKS] - E[i, FREE])
        if node < num_chunks or taken == blocks:
            _leave_line(E, left, i, node)
            if node < num_chunks:
                left[i, node, REFS] = NONE
        else:
            left[i, node, SIZE] = blocks - taken
            E[i, LEFT_BLOCKS] -= taken


@_inner
def _find(E, R, ids, left, i, r):
    if left is None:
        return ZERO
    found = ZERO
    if E[i, CHUNK_TOKENS] == 0:
        return found
    for k in range(R[r, FIRST_CHUNK], R[r, FIRST_CHUNK] + R[r, NUM_CHUNKS]):
        if left[i, ids[k], REFS] == NONE:
            break
        found += 1
    return found


@_inner
def _hit_tokens(E, i, num_chunks, known):
    if num_chunks == 0:
        return 0
    return min(_prefix_blocks(E, i, num_chunks), (known - 1) // E[i, BLOCK_SIZE]) * E[i, BLOCK_SIZE]


@_inner
def _price(E, R, ids, left, i, r, num_chunks, num_tokens):
    blocks = _blocks(E, i, num_tokens) - _prefix_blocks(E, i, num_chunks)
    if left is None:
        return blocks
    for k in range(num_chunks):
        if left[i, ids[R[r, FIRST_CHUNK] + k], REFS] == 0:
            blocks += _chunk_blocks(E, i, k)
    return blocks


@_inner
def _set_room(E, R, i, r):
    """How many tokens the blocks that it holds have room for."""
    side = E[i, SIDE]
    R[r, ROOM + side] = (R[r, OWN + side] + _prefix_blocks(E, i, R[r, CHUNKS + side])) * E[i, BLOCK_SIZE]


@_inner
def _missing(E, R, i, r, num_tokens):
    room = R[r, ROOM + E[i, SIDE]]
    if num_tokens <= room:
        return 0
    return _blocks(E, i, num_tokens - room)


@_inner
def _grow(E, R, left, i, r, num_tokens):
    more = _missing(E, R, i, r, num_tokens)
    if more > 0:
        R[r, OWN + E[i, SIDE]] += more
        E[i, FREE] -= more
        _set_room(E, R, i, r)
    if E[i, LEFT_BLOCKS] > E[i, FREE]:
        _overwrite(E, R, left, i)


@_inner
def _hold(E, R, ids, left, i, r, num_chunks, num_tokens):
    """`Pool.admit`."""
    if left is not None:
        for k in range(num_chunks):
            chunk = ids[R[r, FIRST_CHUNK] + k]
            if left[i, chunk, REFS] == 0:
                _leave_line(E, left, i, chunk)
                E[i, FREE] -= _chunk_blocks(E, i, k)
            left[i, chunk, REFS] += 1
    side = E[i, SIDE]
    R[r, HELD + side], R[r, OWN + side], R[r, CHUNKS + side] = 1, 0, num_chunks
    _set_room(E, R, i, r)
    _grow(E, R, left, i, r, num_tokens)


@_inner
def _publish(E, R, ids, left, i, r, num_tokens):
    if left is None:
        return
    if E[i, CHUNK_TOKENS] == 0:
        return
    side = E[i, SIDE]
    count = R[r, NUM_CHUNKS]
    while R[r, CHUNKS + side] < count and (R[r, CHUNKS + side] + 1) * E[i, CHUNK_TOKENS] <= num_tokens:
        k = R[r, CHUNKS + side]
        chunk = ids[R[r, FIRST_CHUNK] + k]
        if left[i, chunk, REFS] == NONE:
            left[i, chunk, REFS] = 0
        else:
            if left[i, chunk, REFS] == 0:
                _leave_line(E, left, i, chunk)
                E[i, FREE] -= _chunk_blocks(E, i, k)
            E[i, FREE] += _chunk_blocks(E, i, k)
        left[i, chunk, REFS] += 1
        R[r, OWN + side] -= _chunk_blocks(E, i, k)
        R[r, CHUNKS + side] += 1


@_inner
def _leave_behind(E, R, ids, left, i, r):
    """What an ended request leaves in the cache."""
    if left is None:
        return
    if E[i, CHUNK_TOKENS] == 0:
        return
    side = E[i, SIDE]
    node = left.shape[1] - len(R) + r
    before = ZERO
    if left[i, node, SIZE] != NONE:
        before = _leave_line(E, left, i, node)
    _line_up(E, left, i, node, before + R[r, OWN + side])
    for k in range(R[r, CHUNKS + side] - 1, -1, -1):
        chunk = ids[R[r, FIRST_CHUNK] + k]
        left[i, chunk, REFS] -= 1
        if left[i, chunk, REFS] == 0:
            _line_up(E, left, i, chunk, _chunk_blocks(E, i, k))
            E[i, FREE] += _chunk_blocks(E, i, k)


@_inner
def _release(E, R, ids, left, i, r):
    side = E[i, SIDE]
    E[i, FREE] += R[r, OWN + side]
    _leave_behind(E, R, ids, left, i, r)
    R[r, OWN + side] = R[r, CHUNKS + side] = R[r, HELD + side] = R[r, ROOM + side] = 0


# Step times; see `core.latency`.


@_inner
def _regime_of(table, i, kind, size):
    k = 0
    while size > table[i, kind, k, UP_TO]:
        k += 1
    return k


@_inner
def _sum(table, i, kind, k, tokens, area, prefills, decodes, context):
    return (
        table[i, kind, k, CONSTANT]
        + table[i, kind, k, PER_TOKEN] * tokens
        + table[i, kind, k, PER_AREA] * area
        + table[i, kind, k, PER_PREFILL] * prefills
        + table[i, kind, k, PER_DECODE] * decodes
        + table[i, kind, k, PER_CONTEXT] * context
    )


@_inner
def _step_s(table, i, tokens, area, prefills, decodes, context):
    if prefills == 0:
        k = _regime_of(table, i, OF_DECODE, decodes)
        return max(0.0, _sum(table, i, OF_DECODE, k, ZERO, area, prefills, decodes, context))
    if decodes == 0:
        k = _regime_of(table, i, OF_PREFILL, tokens)
        return max(0.0, _sum(table, i, OF_PREFILL, k, tokens, area, prefills, decodes, context))
    every = tokens + decodes
    if not math.isnan(table[i, OF_MIXED, 0, UP_TO]):
        k = _regime_of(table, i, OF_MIXED, every)
        return max(0.0, _sum(table, i, OF_MIXED, k, tokens, area, prefills, decodes, context))
    context_s = table[i, OF_DECODE, _regime_of(table, i, OF_DECODE, decodes), PER_CONTEXT] * context
    k = _regime_of(table, i, OF_PREFILL, every)
    return max(0.0, _sum(table, i, OF_PREFILL, k, every, area, prefills, decodes, context) + context_s)


# What happens.


@_inner
def _least_loaded(E, first, last):
    best = first
    for i in range(first + 1, last):
        for column in (LOAD_TOKENS, LOAD_REQUESTS, LAST_CHOSEN):
            if E[i, column] != E[best, column]:
                if E[i, column] < E[best, column]:
                    best = i
                break
    return best


@_inner
def _carry(E, S, R, i, r):
    S[CHOICES] += 1
    E[i, LOAD_TOKENS] += R[r, PROMPT]
    E[i, LOAD_REQUESTS] += 1
    E[i, LAST_CHOSEN] = S[CHOICES]


@_inner
def _finish(E, R, T, S, log, i, r, now_s):
    E[i, LOAD_TOKENS] -= R[r, PROMPT]
    E[i, LOAD_REQUESTS] -= 1
    T[r, FINISHED] = now_s
    _note(S, log, FINISH, now_s, now_s, i, r, 0.0, 0.0, 0.0)


@_inner
def _token(T, r, now_s):
    if math.isnan(T[r, LAST_TOKEN]):
        T[r, FIRST_TOKEN] = now_s
        T[r, LONGEST_GAP] = 0.0
    elif now_s - T[r, LAST_TOKEN] > T[r, LONGEST_GAP]:
        T[r, LONGEST_GAP] = now_s - T[r, LAST_TOKEN]
    T[r, LAST_TOKEN] = now_s


@_inner
def _never_fits(E, S, R, r):
    for i in range(len(E)):
        tokens = R[r, TOTAL] if i >= S[NUM_PREFILL] else R[r, PROMPT]
        if _blocks(E, i, tokens) > E[i, BLOCKS]:
            return True
        if E[i, POLICY] == PREFILL_FIRST and R[r, PROMPT] > E[i, BUDGET]:
            return True
    return False


@_inner
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
    _note(S, log, DISPATCH, now_s, now_s, decode, r, float(R[r, P]), 0.0, 0.0)
    if S[PHASE] == DECODE_ONLY:
        R[r, KNOWN] += 1
        R[r, SPLIT] = R[r, REMOTE] = 1
        T[r, PREFILL_START] = T[r, PREFILL_END] = T[r, FIRST_TOKEN] = T[r, LAST_TOKEN] = now_s
        if R[r, KNOWN] == R[r, TOTAL]:
            _finish(E, R, T, S, log, decode, r, now_s)
        else:
            _append(E, R, decode, WAITING, WAITING_LAST, r)
            _mark(S, decode)
    elif X[DISPATCH_S] > 0:
        _push(S, heap, now_s + X[DISPATCH_S], QUEUED, r)
    else:
        _append(E, R, place, WAITING, WAITING_LAST, r)
        _mark(S, place)


@_inner
def _end_prompt(R, T, E, S, X, ids, left, heap, log, i, r, now_s):
    E[i, LOAD_TOKENS] -= R[r, PROMPT]
    E[i, LOAD_REQUESTS] -= 1
    T[r, PREFILL_END] = now_s
    if S[FIRST_FROM_PREFILL] == 1:
        R[r, KNOWN] += 1
        _token(T, r, now_s)
        if R[r, KNOWN] == R[r, TOTAL]:
            _release(E, R, ids, left, i, r)
            _finish(E, R, T, S, log, R[r, D], r, now_s)
            return
    T[r, HOLD_UNTIL] = now_s + X[HOLD_CAP]
    R[r, NEXT_HOLD] = NONE
    if E[i, HOLD] == NONE:
        E[i, HOLD] = r
    else:
        R[E[i, HOLD_LAST], NEXT_HOLD] = r
    E[i, HOLD_LAST] = r
    R[r, ON_DECODE] = R[r, REMOTE] = 1
    _push(S, heap, now_s + X[HANDOFF], HANDED_OVER, r)


@_inner
def _leave_running(E, i, r):
    at = ZERO
    while E[i, NUM_E + at] != r:
        at += 1
    E[i, RUNNING] -= 1
    for k in range(at, E[i, RUNNING]):
        E[i, NUM_E + k] = E[i, NUM_E + k + 1]


@_inner
def _end_step(R, T, E, S, X, parts, ids, left, heap, log, i, now_s):
    slot = E[i, STEP_FIRST]
    E[i, STEP_FIRST] = (slot + 1) % E[i, STAGES]
    E[i, STEP_COUNT] -= 1
    for k in range(parts[i, slot, 0, 0]):
        r = parts[i, slot, k + 1, 0]
        if parts[i, slot, k + 1, 1] != R[r, EPOCH]:  # NONE for a chunk that ends inside its prompt
            continue
        if R[r, SPLIT] == 1:
            if R[r, ON_DECODE] == 0:
                _leave_running(E, i, r)
                _end_prompt(R, T, E, S, X, ids, left, heap, log, i, r, now_s)
                continue
            if math.isnan(T[r, FIRST_DECODE]):
                T[r, FIRST_DECODE] = now_s
        elif math.isnan(T[r, PREFILL_END]):
            T[r, PREFILL_END] = now_s
        R[r, KNOWN] += 1
        _token(T, r, now_s)
        if R[r, KNOWN] == R[r, TOTAL]:
            _leave_running(E, i, r)
            _release(E, R, ids, left, i, r)
            _finish(E, R, T, S, log, i, r, now_s)


@_inner
def _preempt(R, E, S, ids, left, log, i, r, now_s):
    _note(S, log, PREEMPTION, now_s, now_s, i, r, float(R[r, COMPUTED]), 0.0, 0.0)
    _release(E, R, ids, left, i, r)
    R[r, COMPUTED] = 0
    R[r, EPOCH] += 1
    R[r, PREEMPTIONS] += 1
    _prepend(E, R, i, WAITING, WAITING_LAST, r)


@_inner
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
    _publish(E, R, ids, left, i, r, computed + new)
    k = parts[i, slot, 0, 0] + 1
    parts[i, slot, 0, 0] = k
    parts[i, slot, k, 0] = r
    parts[i, slot, k, 1] = R[r, EPOCH] if computed + new == R[r, KNOWN] else NONE


@_inner
def _continue_decoding(R, E, S, parts, i, slot, position, budget):
    """The common case of `_continue_running`, without a call for each request: one new token, and room for it. Stops at
    the first request that needs more, and returns its position."""
    room, last, caches = ROOM + E[i, SIDE], E[i, RUNNING], E[i, CHUNK_TOKENS] > 0
    k, context = parts[i, slot, 0, 0], ZERO
    first = k
    while position < last and k - first < budget:
        r = E[i, NUM_E + position]
        computed = R[r, COMPUTED]
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
    return position


@_inner
def _continue_running(R, E, S, parts, ids, left, log, i, slot, budget, now_s):
    position, preempted = ZERO, False
    while position < E[i, RUNNING] and budget > 0:
        before = position
        position = _continue_decoding(R, E, S, parts, i, slot, position, budget)
        budget -= position - before
        if position >= E[i, RUNNING] or budget == 0:
            break
        r = E[i, NUM_E + position]
        new = min(R[r, KNOWN] - R[r, COMPUTED], budget)
        if new == 0:
            position += 1
            continue
        alive = True
        while alive and _missing(E, R, i, r, R[r, COMPUTED] + new) > E[i, FREE]:
            E[i, RUNNING] -= 1
            victim = E[i, NUM_E + E[i, RUNNING]]
            _preempt(R, E, S, ids, left, log, i, victim, now_s)
            preempted, alive = True, victim != r
        if not alive:
            break
        _grow(E, R, left, i, r, R[r, COMPUTED] + new)
        budget -= new
        _schedule(R, E, S, parts, ids, left, i, slot, r, new)
        position += 1
    return budget, preempted


@_inner
def _reserved(R, E, i):
    blocks = 0
    for k in range(E[i, RUNNING]):
        r = E[i, NUM_E + k]
        if R[r, KNOWN] - R[r, COMPUTED] > 1:
            blocks += _missing(E, R, i, r, R[r, KNOWN])
    return blocks


@_inner
def _release_hold(R, E, S, ids, left, r):
    if R[r, P] != NONE and R[r, HELD] == 1:
        _release(E, R, ids, left, R[r, P], r)
        _mark(S, R[r, P])


@_inner
def _start_pull(R, T, E, S, X, heap, log, i, r, hit, now_s):
    R[r, REMOTE] = 0
    R[r, COMPUTED] = min(R[r, PROMPT], R[r, KNOWN] - 1)
    T[r, TRANSFER_START] = now_s
    sender = R[r, P]
    end_s = now_s
    blocks = _blocks(E, i, R[r, PROMPT]) - hit // E[i, BLOCK_SIZE]
    if sender != NONE:
        out, into = E[sender, END], E[i, END]
        begin_s = max(now_s, X[NUM_X + 2 * out], X[NUM_X + 2 * into + 1])
        end_s = begin_s + (X[LATENCY] + blocks * E[i, BLOCK_SIZE] * S[KV_BYTES] / X[BANDWIDTH])
        X[NUM_X + 2 * out] = X[NUM_X + 2 * into + 1] = end_s
    limit_s = now_s + X[PULL_TIMEOUT]
    R[r, PULL_FAILED] = 1 if end_s > limit_s or end_s > T[r, HOLD_UNTIL] else 0
    _note(S, log, TRANSFER, now_s, end_s, i, r, float(sender), float(blocks), 1.0 - R[r, PULL_FAILED])
    _push(S, heap, min(end_s, limit_s), PULLED, r)


@_inner
def _fetch_early(R, T, E, S, X, ids, left, heap, log, i, r, now_s):
    if S[EARLY] == 0 or E[i, STEP_COUNT] == 0 or T[r, HOLD_UNTIL] <= now_s:
        return False
    known = R[r, KNOWN]
    found = _find(E, R, ids, left, i, r)
    hit = _hit_tokens(E, i, found, known)
    if R[r, PROMPT] - hit <= 1:
        return False
    if _price(E, R, ids, left, i, r, found, known) + _reserved(R, E, i) > E[i, FREE] // RESERVE_SHARE:
        return False
    _hold(E, R, ids, left, i, r, found, known)
    _start_pull(R, T, E, S, X, heap, log, i, r, hit, now_s)
    return True


@_inner
def _end_pull(R, T, E, S, ids, left, r, now_s):
    i = R[r, D]
    _release_hold(R, E, S, ids, left, r)
    if R[r, PULL_FAILED] == 1:
        _release(E, R, ids, left, i, r)
        R[r, COMPUTED] = 0
        T[r, TRANSFER_START] = math.nan
        _prepend(E, R, i, WAITING, WAITING_LAST, r)
        return
    T[r, TRANSFER_END] = now_s
    _publish(E, R, ids, left, i, r, R[r, PROMPT])
    _append(E, R, i, FETCHED, FETCHED_LAST, r)


@_inner
def _admit(
    R, T, E, S, X, parts, ids, left, heap, log, i, slot, budget, now_s,
):  # fmt: skip
    while budget > 0 and E[i, RUNNING] < E[i, MAX_SEQS]:
        if E[i, FETCHED] != NONE:
            r = E[i, FETCHED]
            new = R[r, KNOWN] - R[r, COMPUTED]
            if new > budget or _missing(E, R, i, r, R[r, KNOWN]) > E[i, FREE]:
                return
            _take_first(E, R, i, FETCHED)
            _grow(E, R, left, i, r, R[r, KNOWN])
        elif E[i, WAITING] != NONE:
            r = E[i, WAITING]
            if R[r, REMOTE] == 1 and T[r, HOLD_UNTIL] <= now_s:
                R[r, REMOTE] = 0
            known = R[r, KNOWN]
            found = _find(E, R, ids, left, i, r)
            hit = _hit_tokens(E, i, found, known)
            watermark = E[i, WATERMARK] if E[i, RUNNING] > 0 else 0
            price = _price(E, R, ids, left, i, r, found, known)
            if R[r, REMOTE] == 1 and R[r, PROMPT] - hit > 1:
                if price + watermark > E[i, FREE] or price + watermark + _reserved(R, E, i) > E[i, FREE]:
                    return
                _take_first(E, R, i, WAITING)
                _hold(E, R, ids, left, i, r, found, known)
                _start_pull(R, T, E, S, X, heap, log, i, r, hit, now_s)
                continue
            new = known - hit
            if E[i, POLICY] != CHUNKED and new > budget:
                return
            if price + watermark > E[i, FREE]:
                return
            new = min(new, budget)
            _take_first(E, R, i, WAITING)
            if R[r, REMOTE] == 1:
                _release_hold(R, E, S, ids, left, r)
            _hold(E, R, ids, left, i, r, found, hit + new)
            R[r, COMPUTED] = hit
            if R[r, CACHED] < 0:
                R[r, CACHED] = hit
        else:
            return
        column = DECODE_START if R[r, SPLIT] == 1 and R[r, ON_DECODE] == 1 else PREFILL_START
        if math.isnan(T[r, column]):
            T[r, column] = now_s
        E[i, NUM_E + E[i, RUNNING]] = r
        E[i, RUNNING] += 1
        budget -= new
        _schedule(R, E, S, parts, ids, left, i, slot, r, new)


@_inner
def _form(
    R, T, E, S, X, parts, ids, left, heap, log, i, slot, now_s,
):  # fmt: skip
    while True:
        parts[i, slot, 0, 0] = 0
        S[TOKENS] = S[AREA] = S[PREFILLS] = S[DECODES] = S[CONTEXT] = 0
        budget = E[i, BUDGET]
        head = E[i, WAITING]
        if head != NONE and R[head, REMOTE] == 1 and T[head, HOLD_UNTIL] <= now_s:
            R[head, REMOTE] = 0
        grown = E[i, POLICY] == PREFILL_FIRST and head != NONE and R[head, KNOWN] > R[head, PROMPT]
        if (E[i, POLICY] == WHOLE or grown) and head != NONE and R[head, REMOTE] == 0:
            found = _find(E, R, ids, left, i, head)
            budget = max(budget, R[head, KNOWN] - _hit_tokens(E, i, found, R[head, KNOWN]))
        preempted = False
        if E[i, POLICY] == PREFILL_FIRST:
            _admit(
                R, T, E, S, X, parts, ids, left, heap, log, i, slot, budget, now_s,
            )  # fmt: skip
            if parts[i, slot, 0, 0] == 0:
                budget, preempted = _continue_running(R, E, S, parts, ids, left, log, i, slot, budget, now_s)
        else:
            budget, preempted = _continue_running(R, E, S, parts, ids, left, log, i, slot, budget, now_s)
            if not preempted:
                _admit(
                    R, T, E, S, X, parts, ids, left,
                    heap, log, i, slot, budget, now_s,
                )  # fmt: skip
        if parts[i, slot, 0, 0] > 0 or not preempted:
            return


@_inner
def _expire_holds(R, E, T, ids, left, i, now_s):
    while E[i, HOLD] != NONE and T[E[i, HOLD], HOLD_UNTIL] <= now_s:
        r = E[i, HOLD]
        E[i, HOLD] = R[r, NEXT_HOLD]
        if R[r, HELD] == 1:
            _release(E, R, ids, left, i, r)


@_inner
def _wake_at_expiry(R, T, E, F, S, heap, i):
    while E[i, HOLD] != NONE and R[E[i, HOLD], HELD] == 0:
        E[i, HOLD] = R[E[i, HOLD], NEXT_HOLD]
    if E[i, HOLD] != NONE and F[i, WAKE_AT] != T[E[i, HOLD], HOLD_UNTIL]:
        F[i, WAKE_AT] = T[E[i, HOLD], HOLD_UNTIL]
        _push(S, heap, F[i, WAKE_AT], WAKE, i)


@_inner
def _step(
    R, T, E, F, S, X, table, parts, ids, left,
    heap, log, i, now_s,
):  # fmt: skip
    _expire_holds(R, E, T, ids, left, i, now_s)
    stages = E[i, STAGES]
    if E[i, STEP_COUNT] >= stages or F[i, NUM_F] > now_s:
        return
    slot = (E[i, STEP_FIRST] + E[i, STEP_COUNT]) % stages
    _form(
        R, T, E, S, X, parts, ids, left, heap,
        log, i, slot, now_s,
    )  # fmt: skip
    num = parts[i, slot, 0, 0]
    if num == 0:
        if E[i, WAITING] != NONE and E[i, HOLD] != NONE:
            _wake_at_expiry(R, T, E, F, S, heap, i)
        return
    one_s = _step_s(table, i, S[TOKENS], S[AREA], S[PREFILLS], S[DECODES], S[CONTEXT]) / stages + F[i, HOP]
    end_s = now_s + (F[i, STEP_OVERHEAD] + F[i, REQUEST_OVERHEAD] * num) + one_s
    F[i, NUM_F] = end_s
    for stage in range(1, stages):
        end_s = max(end_s, F[i, NUM_F + stage]) + one_s
        F[i, NUM_F + stage] = end_s
    E[i, STEP_COUNT] += 1
    S[STEPS] += 1
    used = E[i, BLOCKS] - E[i, FREE]
    _note(S, log, STEP, now_s, end_s, i, NONE, float(S[TOKENS]), float(S[DECODES]), float(used))
    if stages > 1:
        _push(S, heap, F[i, NUM_F], STAGE_FREE, i)
    _push(S, heap, end_s, STEP_END, i)


@_compiled
def run(
    R, T, E, F, S, X, table, parts, ids, left, heap, log,
):  # fmt: skip
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
            _pop(S, heap)
            place = subject
            if kind == STEP_END:
                _end_step(
                    R, T, E, S, X, parts, ids, left, heap, log,
                    subject, now_s,
                )  # fmt: skip
            elif kind in (QUEUED, HANDED_OVER, PULLED):
                place = R[subject, D] if R[subject, ON_DECODE] == 1 else R[subject, P]
                if kind == PULLED:
                    _end_pull(R, T, E, S, ids, left, subject, now_s)
                elif kind == QUEUED or not _fetch_early(R, T, E, S, X, ids, left, heap, log, place, subject, now_s):
                    _append(E, R, place, WAITING, WAITING_LAST, subject)
            _mark(S, place)
        while S[DIRTY] > 0:
            i = S[NUM_S + 0]
            S[DIRTY] -= 1
            for k in range(S[DIRTY]):
                S[NUM_S + k] = S[NUM_S + k + 1]
            _step(
                R, T, E, F, S, X, table, parts, ids,
                left, heap, log, i, now_s,
            )  # fmt: skip
