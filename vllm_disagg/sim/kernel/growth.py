"""What requests are expected to take yet. Those who hold blocks are counted in `W` by how many they will still take."""

from __future__ import annotations

from vllm_disagg.core.scheduling import growth as rules
from vllm_disagg.sim.kernel.compiled import inner, inner_in_loops
from vllm_disagg.sim.kernel.state import (
    ANSWERED,
    ANSWERS,
    BLOCK_SIZE,
    BLOCKS,
    BY_GROWTH,
    BY_LENGTH,
    BY_ORDER,
    COMPUTED,
    COUNT,
    ENDS_AT,
    FIRST_WINDOW,
    FOLLOWING,
    FOUND_AT,
    FOUND_TO,
    GROWS,
    HEADROOM,
    HOLDERS,
    HOLDERS_ALL,
    HOLDERS_HELD,
    HOLDS,
    HOLDS_FOR,
    KIND,
    KNOWN,
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
def _most_of(R, E, i, r):
    """No request outgrows the KV cache."""
    return min(R[r, MOST], E[i, BLOCKS] * E[i, BLOCK_SIZE] - R[r, PROMPT])


@inner_in_loops
def _window_of(R, W, i, r):
    """The answers of its kind; of all kinds, where these are few."""
    window = FIRST_WINDOW + (R[r, KIND] + 1) * WINDOW_SIZE
    return window if W[i, window + COUNT] >= rules.ENOUGH else FIRST_WINDOW


@inner_in_loops
def _first_longer(R, lengths, count, r, generated):
    first = min(R[r, LONGER], count)  # as it was: from one step to the next it hardly moves
    while first > 0 and lengths[first - 1] > generated:
        first -= 1
    while first < count and lengths[first] <= generated:
        first += 1
    return first


@inner_in_loops
def remaining(R, T, E, W, i, r):
    generated, window = R[r, KNOWN] - R[r, PROMPT], _window_of(R, W, i, r)
    count, lengths = W[i, window + COUNT], W[i, window + BY_LENGTH : window + BY_ORDER]
    first = _first_longer(R, lengths, count, r, generated)
    R[r, LONGER] = first
    return _remaining_of(lengths, count, first, T[r, QUANTILE], generated, _most_of(R, E, i, r), rules.PRIOR)


@inner_in_loops
def _count(E, W, i, held, growth, number):
    """Counts holders in, or out with a negative number."""
    place = E[i, BY_GROWTH] + growth
    W[i, place] += number * held
    W[i, place + E[i, BLOCKS] + 1] += number
    E[i, HOLDERS] += number
    E[i, HOLDERS_HELD] += number * held
    E[i, HOLDERS_ALL] += number * (held + growth)
    E[i, MOST_GROWTH] = max(E[i, MOST_GROWTH], growth)


@inner
def _peak(E, W, i):
    held, leaving, most = E[i, BY_GROWTH], E[i, BY_GROWTH] + E[i, BLOCKS] + 1, E[i, MOST_GROWTH]
    while most > 0 and W[i, leaving + most] == 0:
        most -= 1
    E[i, MOST_GROWTH] = most
    return _peak_of(W[i, held:leaving], W[i, leaving : leaving + most + 1], most)


@inner
def holders_of(R, T, E, W, i):
    """Everybody who holds blocks is counted already, as was last found; from one step to the next few change."""
    for k in range(E[i, RUNNING]):
        r = E[i, NUM_E + k]
        if not _stays(R, E, i, r):
            _count_again(R, T, E, W, i, r)
    r = E[i, PARKED]
    while r != NONE:
        if not _stays(R, E, i, r):
            _count_again(R, T, E, W, i, r)
        r = R[r, NEXT]


@inner_in_loops
def _stays(R, E, i, r):
    """Whether it holds as many blocks and will grow by as many as was last found."""
    computed, holds_for = R[r, COMPUTED], R[r, HOLDS_FOR]
    return (
        R[r, FOUND_AT] == E[i, ANSWERED]
        and R[r, KNOWN] <= R[r, FOUND_TO]
        and computed <= holds_for
        and computed > holds_for - E[i, BLOCK_SIZE]
    )


@inner_in_loops
def _count_again(R, T, E, W, i, r):
    known, computed, ends_at, block_size = R[r, KNOWN], R[r, COMPUTED], R[r, ENDS_AT], E[i, BLOCK_SIZE]
    if R[r, FOUND_AT] != E[i, ANSWERED] or known > R[r, FOUND_TO]:
        ends_at = _find_end(R, T, E, W, i, r)
    missing = R[r, HOLDS_FOR] - computed
    if R[r, ENDS_AT] == ends_at and missing >= 0 and missing < block_size:  # that saves divisions
        return
    held, growth = _holding(known, computed, ends_at - known, block_size)
    _count(E, W, i, R[r, HOLDS], R[r, GROWS], -1)
    _count(E, W, i, held, growth, 1)
    R[r, ENDS_AT], R[r, HOLDS_FOR], R[r, HOLDS], R[r, GROWS] = ends_at, held * block_size, held, growth


@inner_in_loops
def _find_end(R, T, E, W, i, r):
    """At how many tokens it is expected to end. As long as it has no more than FOUND_TO, and no answer more is known,
    that stays."""
    known, prompt, most, window = R[r, KNOWN], R[r, PROMPT], _most_of(R, E, i, r), _window_of(R, W, i, r)
    count, lengths = W[i, window + COUNT], W[i, window + BY_LENGTH : window + BY_ORDER]
    first = _first_longer(R, lengths, count, r, known - prompt)
    found_to = known
    if count >= rules.ENOUGH and first < count:
        found_to = prompt + min(lengths[first] - 1, most)
    rest = _remaining_of(lengths, count, first, T[r, QUANTILE], known - prompt, most, rules.PRIOR)
    R[r, LONGER], R[r, FOUND_AT], R[r, FOUND_TO] = first, E[i, ANSWERED], found_to
    return known + rest


@inner
def promise_is_due(E, i):
    return E[i, NUM_FORMED] % rules.PROMISE_STEPS == 0 or E[i, RUNNING] + E[i, NUM_PARKED] != E[i, PROMISED_TO]


@inner
def promise(E, W, i):
    E[i, PROMISED_TO] = E[i, HOLDERS]
    E[i, PROMISED] = _peak(E, W, i) - E[i, HOLDERS_HELD]


@inner
def may_come_in(R, T, E, F, W, i, r, free):
    if E[i, HOLDERS] == 0:
        return True
    usable = E[i, HOLDERS_HELD] + free
    held, growth = _holding(R[r, KNOWN], R[r, KNOWN], remaining(R, T, E, W, i, r), E[i, BLOCK_SIZE])
    _count(E, W, i, held, growth, 1)
    room = int(usable * (1 - F[i, HEADROOM]))
    # What they hold and will ever take is no less than the peak, and is at hand.
    fits = E[i, HOLDERS_ALL] <= room or _peak(E, W, i) <= room
    _count(E, W, i, held, growth, -1)
    return fits


@inner
def came_in(R, T, E, W, i, r):
    """It is counted as if its prompt were here, and again in the next step."""
    held, growth = _holding(R[r, KNOWN], R[r, KNOWN], remaining(R, T, E, W, i, r), E[i, BLOCK_SIZE])
    _count(E, W, i, held, growth, 1)
    R[r, HOLDS], R[r, GROWS], R[r, FOUND_AT], R[r, ENDS_AT] = held, growth, NONE, NONE


@inner
def went(R, E, W, i, r):
    """It holds no blocks any more."""
    if E[i, POLICY] == OURS_DECODE:
        _count(E, W, i, R[r, HOLDS], R[r, GROWS], -1)


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
        E[i, ANSWERED] += 1
