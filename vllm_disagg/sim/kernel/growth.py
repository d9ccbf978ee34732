"""What requests are expected to take yet. Those who hold blocks are counted in `G` by how many they will still take."""

from __future__ import annotations

from vllm_disagg.core.scheduling import growth as rules
from vllm_disagg.sim.kernel.compiled import inner, inner_in_loops
from vllm_disagg.sim.kernel.state import (
    ANSWERS,
    BLOCK_SIZE,
    BLOCKS,
    BY_LENGTH,
    BY_ORDER,
    COMPUTED,
    COUNT,
    ENDS_AT,
    FIRST_WINDOW,
    FOLLOWING,
    GROWS,
    HEADROOM,
    HELD_BY,
    HOLDERS,
    HOLDERS_ALL,
    HOLDERS_HELD,
    HOLDS,
    HOLDS_FOR,
    KIND,
    KNOWN,
    LEAVING_BY,
    LONGER,
    MOST,
    MOST_GROWTH,
    NEXT,
    NONE,
    NUM_E,
    NUM_FORMED,
    NUM_PARKED,
    OURS_DECODE,
    PARKED,
    POLICY,
    PROMISED,
    PROMISED_TO,
    PROMPT,
    QUANTILE,
    RUNNING,
    WINDOW_SIZE,
    ZERO,
)  # fmt: skip

_remaining_of = inner(rules.remaining_of)
_holding = inner(rules.holding)
_peak_of = inner(rules.peak_of)


@inner
def _longer_than(lengths, count, generated):
    """The place of the first length above `generated`."""
    low, high = ZERO, count
    while low < high:
        middle = (low + high) // 2
        if lengths[middle] <= generated:
            low = middle + 1
        else:
            high = middle
    return low


@inner_in_loops
def remaining(R, T, E, W, i, r):
    most = min(R[r, MOST], E[i, BLOCKS] * E[i, BLOCK_SIZE] - R[r, PROMPT])
    generated = R[r, KNOWN] - R[r, PROMPT]
    window = FIRST_WINDOW + (R[r, KIND] + 1) * WINDOW_SIZE
    if W[i, window + COUNT] < rules.ENOUGH:
        window = FIRST_WINDOW
    count, lengths = W[i, window + COUNT], W[i, window + BY_LENGTH : window + BY_ORDER]
    first = min(R[r, LONGER], count)  # as it was: from one step to the next it hardly moves
    while first > 0 and lengths[first - 1] > generated:
        first -= 1
    while first < count and lengths[first] <= generated:
        first += 1
    R[r, LONGER] = first
    return _remaining_of(lengths, count, first, T[r, QUANTILE], generated, most, rules.PRIOR)


@inner_in_loops
def _count_in(S, G, held, growth, number):
    G[HELD_BY, growth] += number * held
    G[LEAVING_BY, growth] += number
    S[HOLDERS] += number
    S[HOLDERS_HELD] += number * held
    S[HOLDERS_ALL] += number * (held + growth)
    S[MOST_GROWTH] = max(S[MOST_GROWTH], growth)


@inner
def holders_of(R, T, E, S, W, G, i):
    for k in range(E[i, RUNNING]):
        _count_holder(R, T, E, S, W, G, i, E[i, NUM_E + k])
    r = E[i, PARKED]
    while r != NONE:
        _count_holder(R, T, E, S, W, G, i, r)
        r = R[r, NEXT]


@inner_in_loops
def _count_holder(R, T, E, S, W, G, i, r):
    """From one step to the next most hold as many blocks and will grow by as many: that saves divisions."""
    known, computed, block_size = R[r, KNOWN], R[r, COMPUTED], E[i, BLOCK_SIZE]
    rest = remaining(R, T, E, W, i, r)
    missing = R[r, HOLDS_FOR] - computed
    if R[r, ENDS_AT] != known + rest or missing < 0 or missing >= block_size:
        held, growth = _holding(known, computed, rest, block_size)
        R[r, ENDS_AT], R[r, HOLDS_FOR], R[r, HOLDS], R[r, GROWS] = known + rest, held * block_size, held, growth
    _count_in(S, G, R[r, HOLDS], R[r, GROWS], 1)


@inner
def forget_holders(S, G):
    """The scratch paper is clean for the next step."""
    for growth in range(S[MOST_GROWTH] + 1):
        G[HELD_BY, growth] = G[LEAVING_BY, growth] = 0
    S[HOLDERS] = S[HOLDERS_HELD] = S[HOLDERS_ALL] = S[MOST_GROWTH] = 0


@inner
def promise_is_due(E, i):
    return E[i, NUM_FORMED] % rules.PROMISE_STEPS == 0 or E[i, RUNNING] + E[i, NUM_PARKED] != E[i, PROMISED_TO]


@inner
def promise(E, S, G, i):
    E[i, PROMISED_TO] = S[HOLDERS]
    E[i, PROMISED] = _peak_of(G[HELD_BY], G[LEAVING_BY], S[MOST_GROWTH]) - S[HOLDERS_HELD]


@inner
def may_come_in(R, T, E, F, S, W, G, i, r, free):
    if S[HOLDERS] == 0:
        return True
    usable = S[HOLDERS_HELD] + free
    held, growth = _holding(R[r, KNOWN], R[r, KNOWN], remaining(R, T, E, W, i, r), E[i, BLOCK_SIZE])
    _count_in(S, G, held, growth, 1)
    room = int(usable * (1 - F[i, HEADROOM]))
    # What they hold and will ever take is no less than the peak, and is at hand.
    fits = S[HOLDERS_ALL] <= room or _peak_of(G[HELD_BY], G[LEAVING_BY], S[MOST_GROWTH]) <= room
    _count_in(S, G, held, growth, -1)
    return fits


@inner
def came_in(R, T, E, S, W, G, i, r):
    held, growth = _holding(R[r, KNOWN], R[r, KNOWN], remaining(R, T, E, W, i, r), E[i, BLOCK_SIZE])
    _count_in(S, G, held, growth, 1)


@inner
def _add(W, i, window, length):
    """An answer more in a window; the oldest one leaves a full one."""
    count, at, lengths = W[i, window + COUNT], W[i, window + FOLLOWING], window + BY_LENGTH
    if count == ANSWERS:
        place = lengths + _longer_than(W[i, lengths : lengths + count], count, W[i, window + BY_ORDER + at] - 1)
        for k in range(place, lengths + count - 1):
            W[i, k] = W[i, k + 1]
        count -= 1
    place = lengths + count
    while place > lengths and W[i, place - 1] > length:
        W[i, place] = W[i, place - 1]
        place -= 1
    W[i, place] = W[i, window + BY_ORDER + at] = length
    W[i, window + COUNT], W[i, window + FOLLOWING] = count + 1, (at + 1) % ANSWERS


@inner
def learn(R, E, W, i, r):
    if E[i, POLICY] == OURS_DECODE:
        length = R[r, KNOWN] - R[r, PROMPT]
        _add(W, i, FIRST_WINDOW + (R[r, KIND] + 1) * WINDOW_SIZE, length)
        _add(W, i, FIRST_WINDOW, length)
