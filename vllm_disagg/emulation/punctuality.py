"""Whether the host keeps up with the device it emulates."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

_REPORT_EVERY_S: Final = 30.0
_TOLERATED: Final = 0.01


class Punctuality:
    """Counts steps for which the host's own work took longer than the device's time, and says so now and then.

    Args:
        now: seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._reported_s = now, now()
        self.num_steps = self.num_late = 0
        self.late_s = self.worst_s = 0.0

    def step(self, late_s: float) -> None:
        """One more step, which ended so much too late."""
        self.num_steps += 1
        if late_s > 0:
            self.num_late += 1
            self.late_s += late_s
            self.worst_s = max(self.worst_s, late_s)
        now_s = self._now()
        if now_s - self._reported_s >= _REPORT_EVERY_S:
            if self.num_late > _TOLERATED * self.num_steps:
                logger.warning(
                    "emulation.behind late_steps=%d of=%d mean_ms=%.2f worst_ms=%.2f: raise --dilation",
                    self.num_late, self.num_steps, 1e3 * self.late_s / self.num_late, 1e3 * self.worst_s,
                )  # fmt: skip
            self._reported_s = now_s
            self.num_steps = self.num_late = 0
            self.late_s = self.worst_s = 0.0
