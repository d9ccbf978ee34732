"""When an emulated device is done with a step, and waiting until then without spinning."""

from __future__ import annotations

import ctypes
import math
import random
import sys
import time

_PR_SET_TIMERSLACK = 29


class DeviceClock:
    """The stages of one device pipeline, each of which works on one step at a time.

    Args:
        num_stages: pipeline degree; a stage takes that part of a step's time.
        dilation: how many times slower than modelled the device runs.
        overhead_s: added to every step.
        jitter: standard deviation of the logarithm of a factor on each step's time; its mean is 1.
        seed: of the jitter.
        hides_host: a step begins when the one before it ends, as under asynchronous scheduling, if the host needed no
            longer for what lies between them than that step took and the engine had work all the while.
    """

    def __init__(
        self,
        *,
        num_stages: int = 1,
        dilation: float = 1.0,
        overhead_s: float = 0.0,
        jitter: float = 0.0,
        seed: int = 0,
        hides_host: bool = False,
    ) -> None:
        self._hides_host, self._last_stage_s = hides_host, 0.0
        self._free_s = [0.0] * num_stages
        self._dilation, self._overhead_s, self._jitter = dilation, overhead_s, jitter
        self._random = random.Random(seed)  # noqa: S311 - timing noise

    def launch(self, step_s: float, now_s: float, *, goes_on: bool = False) -> float:
        """Hand a step to the device.

        Args:
            step_s: how long it takes at pipeline degree 1, by the profile.
            now_s: when.
            goes_on: whether it continues requests of the last step, so that the engine had work all the while.

        Returns:
            When the last stage has finished it, on the same clock; before `now_s` where the host was too slow. Steps
            finish in the order of their launch.
        """
        noise = math.exp(self._random.gauss(-(self._jitter**2) / 2, self._jitter)) if self._jitter else 1.0
        stage_s = (step_s * noise + self._overhead_s) * self._dilation / len(self._free_s)
        at_s = now_s - (self._last_stage_s if self._hides_host and goes_on else 0.0)
        self._last_stage_s = stage_s
        for stage, free_s in enumerate(self._free_s):
            at_s = max(at_s, free_s) + stage_s
            self._free_s[stage] = at_s
        return at_s


def wait_until(deadline_s: float) -> float:
    """Sleep until `time.monotonic()` reaches the deadline. Returns how late the call itself came, seconds."""
    left_s = deadline_s - time.monotonic()
    late_s = max(0.0, -left_s)
    while left_s > 0:
        time.sleep(left_s)
        left_s = deadline_s - time.monotonic()
    return late_s


def sharpen_sleep() -> None:
    """Ask the kernel to wake this thread on time, instead of up to 50 microseconds later as it does by default."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
