"""Whether one more request fits into the KV cache for all of its life, not only on its first step.

A request's KV grows with every token it generates. Admitted by its prompt alone it may find the cache full later, and
then somebody loses all KV and computes it again. So the lengths of past answers say how far each request will grow, and
the most blocks that all of them will need at one time have to fit: the rule of the Past-Future scheduler (Gong et al.,
ASPLOS 2025). It draws a length for each request; here each has a quantile of its own for all of its life, and the
quantiles of successive requests are spread evenly: some will end soon and make room for others that grow, and to expect
one length of all of them would leave that room empty.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Final

LEAST_QUANTILE: Final = 0.2
"""Nobody is expected to be among the shortest fifth: a little too much is expected of all."""

WINDOW: Final = 512
"""Answers of a kind that are remembered."""

ENOUGH: Final = 16
"""Answers that speak for themselves. To fewer, guesses are added up to this number."""

PRIOR: Final = 256
"""Tokens that an answer is guessed to have before anything is known."""

PROMISE_STEPS: Final = 8
"""How often `promised_blocks` are reckoned anew while nobody comes or goes."""

_GOLDEN: Final = 0.6180339887498949
_MAX_KEYS: Final = 256


def quantile_of(number: int) -> float:
    """The quantile of the number-th request. Fractions of multiples of the golden ratio lie evenly in each stretch."""
    return LEAST_QUANTILE + (1 - LEAST_QUANTILE) * (number * _GOLDEN % 1.0)


class OutputLengths:
    """A running quantile of the lengths of answers, for each kind of request and for all of them.

    A kind with too few answers is judged by all kinds; while those are too few as well, by `prior` too. The most recent
    `window` answers of a kind count; of kinds, the last `_MAX_KEYS` that had an answer.

    Args:
        window: answers that are remembered of each kind.
        prior: tokens that an answer is expected to have before anything is known.
    """

    def __init__(self, *, window: int = WINDOW, prior: int = PRIOR) -> None:
        self._window, self._prior = window, prior
        self._kinds: dict[Hashable, _Window] = {}
        self._all = _Window(window)

    def add(self, kind: Hashable, length: int) -> None:
        """An answer has come to its own end with so many tokens."""
        window = self._kinds.pop(kind, None) or _Window(self._window)
        self._kinds[kind] = window  # last in the dict's order: the one that was used last
        while len(self._kinds) > _MAX_KEYS:
            del self._kinds[next(iter(self._kinds))]
        window.add(length)
        self._all.add(length)

    def remaining(self, kind: Hashable, *, quantile: float, generated: int, most: int) -> int:
        """How many more tokens a request will generate.

        The quantile is taken of those past answers that were longer than `generated`: what a request has already
        reached is no longer in question.

        Args:
            kind: as in `add`.
            quantile: which one; see `quantile_of`.
            generated: tokens it has.
            most: tokens it may have in all, its `max_tokens`.

        Returns:
            Between 1 and what `most` leaves; 0 when nothing is left.
        """
        window = self._kinds.get(kind)
        if window is None or len(window.sorted) < ENOUGH:
            window = self._all
        lengths = window.sorted
        first = bisect.bisect_right(lengths, generated)
        return remaining_of(lengths, len(lengths), first, quantile, generated, most, self._prior)


def remaining_of(
    lengths: Sequence[int], count: int, first: int, quantile: float, generated: int, most: int, prior: int
) -> int:
    """`OutputLengths.remaining` of one window.

    Where fewer than `ENOUGH` answers are known, each missing one counts as one of `prior` tokens, or of twice what the
    request has. The first answers to end are the short ones; who is under way is compared with longer ones alone.

    Args:
        lengths: past answers, rising.
        count: how many they are.
        first: place of the first one that is longer than `generated`.
        quantile, generated, most: see there.
        prior: see `OutputLengths`.
    """
    if most <= generated:
        return 0
    longer = count - first
    if count < ENOUGH:
        missing, expected = ENOUGH - count, max(prior, 2 * generated)
        place = min(ENOUGH - 1, first + int(quantile * (ENOUGH - first)))
        if place < count and lengths[place] < expected:
            expected = lengths[place]
        elif place >= missing and lengths[place - missing] > expected:
            expected = lengths[place - missing]
    elif longer < 1:
        expected = generated + max(ENOUGH, generated // 4)
    else:
        expected = lengths[first + min(longer - 1, int(quantile * longer))]
    return min(most - generated, max(1, expected - generated))


class _Window:
    """The last lengths, sorted."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._order: deque[int] = deque()
        self.sorted: list[int] = []

    def add(self, length: int) -> None:
        if len(self._order) == self._size:
            del self.sorted[bisect.bisect_left(self.sorted, self._order.popleft())]
        self._order.append(length)
        bisect.insort(self.sorted, length)


def holding(num_tokens: int, num_computed: int, remaining: int, block_size: int) -> tuple[int, int]:
    """`(held, growth)` of a request: blocks that it has, and those that it will still take.

    Args:
        num_tokens: its prompt and what it has generated.
        num_computed: of these, tokens whose KV is here. For a request that holds nothing yet, `num_tokens`: as if its
            prompt were here.
        remaining: tokens that it will still generate.
        block_size: tokens per block.
    """
    held = -(-num_computed // block_size)
    return held, max(0, -(-(num_tokens + remaining) // block_size) - held)


def peak_blocks(requests: Iterable[tuple[int, int]]) -> int:
    """The most blocks that these requests hold at one time, if each generates a token per step and then leaves.

    Args:
        requests: `(held, growth)` of each: blocks it holds now, blocks it will still take.
    """
    return peak_of(*_by_growth(list(requests)))


def peak_of(held: Sequence[int], leaving: Sequence[int], most: int) -> int:
    """`peak_blocks` of requests that are counted by their growth.

    With the requests in falling order of what they still grow, the peak comes at the end of one of them: then it and
    all that outlive it hold what they have now, and have grown by as much as it. The largest of these sums is the peak
    (Past-Future's "future required memory", there in tokens).

    Args:
        held: for each growth from 0 to `most`, what those hold now that will grow by so many blocks.
        leaving: how many they are.
        most: the largest growth.
    """
    peak = held_in_all = count = 0
    for growth in range(most, -1, -1):
        if leaving[growth] > 0:
            held_in_all += held[growth]
            count += leaving[growth]
            peak = max(peak, held_in_all + count * growth)
    return peak


def promised_blocks(requests: Sequence[tuple[int, int]]) -> int:
    """Blocks by which these requests will have grown together when they hold the most.

    Args:
        requests: as in `peak_blocks`.
    """
    return peak_blocks(requests) - sum(held for held, _ in requests)


def has_room(running: Iterable[tuple[int, int]], candidate: tuple[int, int], *, usable_blocks: int) -> bool:
    """Whether one more request may be admitted.

    An engine that has nothing to do admits it in any case: waiting would not make more room.

    Args:
        running: `(held, growth)` of the requests that hold blocks, as in `peak_blocks`.
        candidate: the blocks that its prompt will hold, and its growth.
        usable_blocks: what `running` hold plus what is free.
    """
    others = list(running)
    return not others or peak_blocks([*others, candidate]) <= usable_blocks


def _by_growth(requests: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], int]:
    most = max((growth for _, growth in requests), default=0)
    held, leaving = [0] * (most + 1), [0] * (most + 1)
    for blocks, growth in requests:
        held[growth] += blocks
        leaving[growth] += 1
    return held, leaving, most


def next_headroom(headroom: float, preempted: int) -> float:
    """The share of the usable blocks that admission leaves free beyond what it expects, from one step to the next.

    A preemption says that expectations were too low: it adds 2 %, up to 20 %; calm steps take it back slowly, half of
    it in about 700 steps.

    Args:
        headroom: until now.
        preempted: requests that gave way in the last step.
    """
    return min(0.2, headroom + 0.02 * preempted) if preempted > 0 else headroom * 0.999
