"""When requests arrive: renewal processes with a stated variability, and bursts on top."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.workload import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Times between arrivals are drawn from a gamma distribution; `cv` 1 is a Poisson process.

    Args:
        cv: their standard deviation divided by their mean; 0 is a constant rate.
        burst: how many times the mean rate comes during a burst; 1 without bursts.
        burst_share: share of the time that bursts last.
        burst_every: requests from one burst to the next, on average.

    Raises:
        ConfigError: a value is out of range, or bursts would bring more than all requests.
    """

    cv: float = 1.0
    burst: float = 1.0
    burst_share: float = 0.1
    burst_every: int = 500

    def __post_init__(self) -> None:
        if not (np.isfinite(self.cv) and self.cv >= 0):
            raise ConfigError(f"the variability of arrivals (cv) must be 0 or more, not {self.cv!r}")
        if not 0 < self.burst_share < 1 or self.burst_every < 2:
            raise ConfigError("bursts need a share of the time between 0 and 1 and at least 2 requests between them")
        if not 1 <= self.burst <= 1 / self.burst_share:
            raise ConfigError(
                f"the burst factor must lie between 1 and {1 / self.burst_share:g} "
                f"for bursts that last {self.burst_share:.0%} of the time, not {self.burst!r}"
            )

    def times(self, num_requests: int, rate: float, rng: np.random.Generator) -> Floats:
        """Arrival times in seconds. The same generator state gives the same pattern at every rate."""
        gaps = rng.gamma(self.cv**-2, self.cv**2, num_requests) if self.cv > 0 else np.ones(num_requests)
        return self._warped(np.cumsum(gaps)) / rate

    def _warped(self, times: Floats) -> Floats:
        """Squeeze the first part of each period and stretch the rest; the mean rate stays."""
        if self.burst == 1.0:
            return times
        in_burst = self.burst * self.burst_share  # share of the requests
        periods, within = np.divmod(times / self.burst_every, 1.0)
        squeezed = np.interp(within, [0.0, in_burst, 1.0], [0.0, self.burst_share, 1.0])
        warped: Floats = (periods + squeezed) * self.burst_every
        return warped


def fit_arrivals(arrival_s: Floats) -> Arrivals:
    """The gamma process with the variability of observed times.

    Raises:
        ConfigError: there are fewer than 3 arrivals, or all at once.
    """
    gaps = np.diff(arrival_s)
    if len(gaps) < 2 or gaps.mean() <= 0:
        raise ConfigError("arrivals can be fitted from 3 requests on that do not all come at once")
    return Arrivals(cv=float(gaps.std() / gaps.mean()))
