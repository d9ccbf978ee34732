"""How many free blocks a busy decode instance sets aside, so that KV can come in before the scheduler has seen its
request (`connector/reserve.py`)."""

from __future__ import annotations

from typing import Final

SHARE_OF_FREE: Final = 4
"""One in so many free blocks may be set aside or hold early KV. So the reserve goes before memory gets short."""

PROMPTS_AHEAD: Final = 2
"""How many of the longest recent prompts the reserve has room for."""

RECENT_PROMPTS: Final = 32
"""How many prompts are recent."""


def reserve_target(
    num_free: int, num_reserved: int, num_lent: int, longest: int, num_running: int, num_promised: int = 0
) -> int:
    """How many blocks should lie in reserve.

    Args:
        num_free: blocks in vLLM's pool that nobody uses.
        num_reserved: blocks in reserve now.
        num_lent: blocks with early KV that no request has taken over yet.
        longest: blocks of the longest recent prompt.
        num_running: requests whose next step may want a block each.
        num_promised: blocks that the running requests are expected to grow by.
    """
    if num_running == 0:
        return 0
    available = num_free + num_reserved + num_lent - max(num_running, num_promised)
    return max(0, min(PROMPTS_AHEAD * longest, available // SHARE_OF_FREE - num_lent))
