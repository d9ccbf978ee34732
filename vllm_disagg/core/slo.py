"""Latency targets of a request, and what meeting them means."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_disagg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Both have to be met by the same request.

    Args:
        ttft_s: arrival to first token, at most.
        tpot_s: (last token - first token) / (output tokens - 1), at most; a request with one output token has none and
            is judged on TTFT alone.
    """

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if math.isnan(value) or value <= 0:
                raise ConfigError(f"the SLO's {name} must be a positive number of seconds, not {value!r}")

    def scaled(self, factor: float) -> SLO:
        """Both targets times `factor`: DistServe's SLO scale (section 6.2); below 1 is tighter."""
        return SLO(ttft_s=self.ttft_s * factor, tpot_s=self.tpot_s * factor)

    def met_by(self, *, ttft_s: float, tpot_s: float | None) -> bool:
        """Whether one request was served in time. A request that failed has infinite times."""
        return ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)
