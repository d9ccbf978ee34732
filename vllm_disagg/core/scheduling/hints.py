"""What a client may ask for: TTFT, TPOT and priority of one request, within bounds.

They travel as `vllm_xargs`, which vLLM hands to its scheduler as they are; the proxy makes them from headers as well. A
hint only orders work. So whatever is wrong with one costs it its effect, never the request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

TTFT, TPOT, PRIORITY = "slo_ttft_ms", "slo_tpot_ms", "slo_priority"

NAMES: Final = (TTFT, TPOT, PRIORITY)
"""Keys of `vllm_xargs`."""

BOUNDS: Final[Mapping[str, tuple[float, float]]] = {TTFT: (1.0, 3.6e6), TPOT: (1.0, 60e3), PRIORITY: (-100.0, 100.0)}
"""Smallest and largest value; what lies beyond becomes that."""


HEADERS: Final[Mapping[str, str]] = {"x-slo-ttft-ms": TTFT, "x-slo-tpot-ms": TPOT, "x-slo-priority": PRIORITY}
"""Headers of a client's request to the proxy that say the same. What the body says prevails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What one request is promised, in seconds from when this was made.

    Args:
        ttft_s: until its first token.
        tpot_s: per token after it.
        priority: smaller goes first.
    """

    ttft_s: float
    tpot_s: float
    priority: int = 0


def clean(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Read hints as a client gave them.

    Args:
        values: may have other keys, which are none of ours.

    Returns:
        The usable ones, within `BOUNDS`; and for each that was not taken as it was: `clamped` or `ignored`.
    """
    taken: dict[str, float] = {}
    touched: dict[str, str] = {}
    for name in NAMES:
        if name not in values:
            continue
        value = _number(values[name])
        if value is None:
            touched[name] = "ignored"
            continue
        low, high = BOUNDS[name]
        taken[name] = min(max(value, low), high)
        if taken[name] != value:
            touched[name] = "clamped"
    return taken, touched


def hints_of(values: Mapping[str, float], *, ttft_s: float, tpot_s: float, priority: int = 0) -> Hints:
    """Cleaned values, and the deployment's own for what was not said.

    Args:
        values: from `clean`.
        ttft_s, tpot_s, priority: the deployment's.
    """
    return Hints(
        ttft_s=values[TTFT] / 1e3 if TTFT in values else ttft_s,
        tpot_s=values[TPOT] / 1e3 if TPOT in values else tpot_s,
        priority=int(values.get(PRIORITY, priority)),
    )


def after(values: Mapping[str, float], elapsed_s: float) -> dict[str, float]:
    """Cleaned values as the next one in line should read them: of the time to the first token some has gone. It travels
    as what is left, since clocks differ."""
    left = dict(values)
    if TTFT in left:
        left[TTFT] = max(BOUNDS[TTFT][0], left[TTFT] - 1e3 * elapsed_s)
    return left


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if math.isnan(number) or math.isinf(number) else number
