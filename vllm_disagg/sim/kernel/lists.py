"""The queue of events, the log, and queues of requests."""

from __future__ import annotations

from vllm_disagg.sim.kernel.compiled import inner
from vllm_disagg.sim.kernel.state import (
    AWAY,
    DIRTY,
    EARLY,
    HEAP,
    LOGGED,
    NEXT,
    NEXT_AWAY,
    NONE,
    NUM_AWAY,
    NUM_LOCAL,
    NUM_S,
    PREVIOUS,
    PUSHED,
    REMOTE,
    WAITING,
    ZERO,
)  # fmt: skip

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


# Queues of requests, linked by two columns. A queue is known by the column of its first one; the column after it is for
# its last one, as that after `links` is for the way back.


@inner
def append(E, R, i, queue, links, r):
    R[r, links], R[r, links + 1] = NONE, E[i, queue + 1]
    if E[i, queue + 1] == NONE:
        E[i, queue] = r
    else:
        R[E[i, queue + 1], links] = r
    E[i, queue + 1] = r


@inner
def prepend(E, R, i, queue, links, r):
    R[r, links], R[r, links + 1] = E[i, queue], NONE
    if E[i, queue] == NONE:
        E[i, queue + 1] = r
    else:
        R[E[i, queue], links + 1] = r
    E[i, queue] = r


@inner
def take(E, R, i, queue, links, r):
    """Out of the queue, wherever it is."""
    before, after = R[r, links + 1], R[r, links]
    if before == NONE:
        E[i, queue] = after
    else:
        R[before, links] = after
    if after == NONE:
        E[i, queue + 1] = before
    else:
        R[after, links + 1] = before


# Those that wait. Whose KV is to be fetched, or comes early, is also in the queue AWAY, in the same order: where no
# prompt may be computed, these are found behind any number of others.


@inner
def wait_last(E, R, i, r):
    append(E, R, i, WAITING, NEXT, r)
    if R[r, REMOTE] == 1:
        append(E, R, i, AWAY, NEXT_AWAY, r)
        E[i, NUM_AWAY] += 1
    else:
        E[i, NUM_LOCAL] += 1


@inner
def wait_first(E, R, i, r):
    prepend(E, R, i, WAITING, NEXT, r)
    if R[r, REMOTE] == 1:
        prepend(E, R, i, AWAY, NEXT_AWAY, r)
        E[i, NUM_AWAY] += 1
    else:
        E[i, NUM_LOCAL] += 1


@inner
def wait_before(E, R, i, other, r):
    """Its prompt is for this engine, and `other` waits."""
    before = R[other, PREVIOUS]
    if before == NONE:
        prepend(E, R, i, WAITING, NEXT, r)
    else:
        R[r, NEXT], R[r, PREVIOUS], R[other, PREVIOUS], R[before, NEXT] = other, before, r, r
    E[i, NUM_LOCAL] += 1


@inner
def wait_no_more(E, R, i, r):
    """Before anything is changed that says where its KV comes from."""
    take(E, R, i, WAITING, NEXT, r)
    if R[r, REMOTE] == 1 or R[r, EARLY] == 1:
        take(E, R, i, AWAY, NEXT_AWAY, r)
        E[i, NUM_AWAY] -= 1
    else:
        E[i, NUM_LOCAL] -= 1


@inner
def compute_here(E, R, i, r):
    """Its KV will not come: it goes on waiting, with its prompt."""
    R[r, REMOTE] = R[r, EARLY] = 0
    take(E, R, i, AWAY, NEXT_AWAY, r)
    E[i, NUM_AWAY] -= 1
    E[i, NUM_LOCAL] += 1
