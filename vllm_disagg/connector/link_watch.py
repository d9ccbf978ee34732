"""Whether reads from each peer get on: judged by what arrives, of any read of that peer.

A link can stand still for good while both of its ends live. Without this its reads would wait for their pull timeout,
one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm_disagg.transport.base import Movement, PeerName
from vllm_disagg.transport.patience import Patience

LOOK_S = 0.05
"""Between two looks. Far below `patience.SLICE_S`: time in which this process stood still does not count."""

SLOWEST_BYTES_PER_S = 8 * 1024 * 1024
"""A link that brings this much is slow and stands not still: pieces arrive as a whole, and nothing tells of their
parts."""


@dataclass(slots=True)
class _Seen:
    num_arrived: int
    patience: Patience
    num_stalls: int = 0


class LinkWatch:
    """Looks at every peer's movement. Used by one thread.

    Args:
        limit_s: how long nothing may arrive while something is under way; longer where much is.
        clock: monotonic seconds.
    """

    def __init__(self, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._seen: dict[PeerName, _Seen] = {}
        self._look_at_s = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time for a round of `look`."""
        now_s = self._clock()
        due = now_s >= self._look_at_s
        if due:
            self._look_at_s = now_s + LOOK_S
        return due

    def look(self, peer: PeerName, movement: Movement) -> int:
        """Whether a limit has just passed without anything moving.

        Returns:
            How many have since something last moved, once for each; else 0.
        """
        seen = self._seen.get(peer)
        if seen is None or seen.num_arrived != movement.num_arrived or not movement.bytes_under_way:
            self._seen[peer] = _Seen(movement.num_arrived, Patience(self._limit_s, clock=self._clock))
            return 0
        if seen.patience.waited_s() < max(self._limit_s, movement.bytes_under_way / SLOWEST_BYTES_PER_S):
            return 0
        seen.patience.renew()
        seen.num_stalls += 1
        return seen.num_stalls

    def stands_still(self, peer: PeerName) -> bool:
        """Whether nothing has moved for a limit at least."""
        seen = self._seen.get(peer)
        return seen is not None and seen.num_stalls > 0

    def forget(self, peer: PeerName) -> None:
        """The peer has gone, or has a new link."""
        self._seen.pop(peer, None)
