"""The queue of events, the log, and queues of requests."""

from __future__ import annotations

from vllm_disagg.sim.kernel.compiled import inner
from vllm_disagg.sim.kernel.state import DIRTY, HEAP, LOGGED, NEXT, NONE, NUM_S, PREVIOUS, PUSHED, ZERO

# The queue of events: a binary heap over (time, order of pushing).


@inner
def before(heap, a, b):
    return heap[a, 0] < heap[b, 0] or (heap[a, 0] == heap[b, 0] and heap[a, 1] < heap[b, 1])


@inner
def swap(heap, a, b):
    for k in range(4):
        heap[a, k], heap[b, k] = heap[b, k], heap[a, k]


@inner
def push(S, heap, time_s, kind, subject):
    S[PUSHED] += 1
    at = S[HEAP]
    S[HEAP] += 1
    heap[at, 0], heap[at, 1], heap[at, 2], heap[at, 3] = time_s, S[PUSHED], kind, subject
    while at > 0 and before(heap, at, (at - 1) // 2):
        swap(heap, at, (at - 1) // 2)
        at = (at - 1) // 2


@inner
def pop(S, heap):
    """Drop the first event."""
    S[HEAP] -= 1
    size = S[HEAP]
    swap(heap, ZERO, size)
    at = ZERO
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and before(heap, child + 1, child):
            child += 1
        if not before(heap, child, at):
            return
        swap(heap, child, at)
        at = child


@inner
def note(S, log, kind, start_s, end_s, engine, request, a, b, c):
    if len(log) == 0:
        return
    row = S[LOGGED]
    S[LOGGED] += 1
    if row < len(log):
        log[row, 0], log[row, 1], log[row, 2], log[row, 3] = kind, start_s, end_s, engine
        log[row, 4], log[row, 5], log[row, 6], log[row, 7] = request, a, b, c


@inner
def mark(S, engine):
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


# Queues of requests: linked by NEXT and PREVIOUS. A queue is known by the columns of its first and its last one.


@inner
def append(E, R, i, first, last, r):
    R[r, NEXT], R[r, PREVIOUS] = NONE, E[i, last]
    if E[i, last] == NONE:
        E[i, first] = r
    else:
        R[E[i, last], NEXT] = r
    E[i, last] = r


@inner
def prepend(E, R, i, first, last, r):
    R[r, NEXT], R[r, PREVIOUS] = E[i, first], NONE
    if E[i, first] == NONE:
        E[i, last] = r
    else:
        R[E[i, first], PREVIOUS] = r
    E[i, first] = r


@inner
def insert_before(E, R, i, first, other, r):
    """`other` is somewhere in the queue."""
    before = R[other, PREVIOUS]
    R[r, NEXT], R[r, PREVIOUS], R[other, PREVIOUS] = other, before, r
    if before == NONE:
        E[i, first] = r
    else:
        R[before, NEXT] = r


@inner
def take(E, R, i, first, last, r):
    """Out of the queue, wherever it is."""
    before, after = R[r, PREVIOUS], R[r, NEXT]
    if before == NONE:
        E[i, first] = after
    else:
        R[before, NEXT] = after
    if after == NONE:
        E[i, last] = before
    else:
        R[after, PREVIOUS] = before
