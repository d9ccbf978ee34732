"""How long to wait for a peer, without taking this host's own standstill for the peer's."""

from __future__ import annotations

import time
from collections.abc import Callable

SLICE_S = 0.25
"""The longest that one turn of waiting counts. Whoever waits asks at least as often."""


class Patience:
    """A limit to waiting that is asked again and again, and counts each turn for at most `SLICE_S`: a process that was
    stopped, or a host that its hypervisor froze, has not waited meanwhile. Peers get time to answer once it goes on.

    Args:
        limit_s: how long it lasts.
        clock: seconds.
    """

    def __init__(self, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self.renew()

    def renew(self) -> None:
        """Something has happened: begin anew."""
        self._waited_s, self._asked_s = 0.0, self._clock()

    def is_over(self) -> bool:
        """Whether the limit has been waited out. Counts the time since the last call."""
        return self.waited_s() >= self._limit_s

    def waited_s(self) -> float:
        """How long it has been waited. Counts the time since the last call."""
        now_s = self._clock()
        self._waited_s += min(now_s - self._asked_s, SLICE_S)
        self._asked_s = now_s
        return self._waited_s
