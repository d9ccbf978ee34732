"""Who gives way where the KV cache is full: the stream that can best afford to compute everything again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PREEMPTIONS = 2
"""Who gave way so often gives way again only after everybody who did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One running request.

    Args:
        ahead_s: how far it is ahead of the pace it was promised (`ahead_s`); negative when behind.
        recompute_s: how long its tokens take to be computed again.
        num_preemptions: how often it has given way.
        priority: smaller is more important, as in vLLM.
    """

    ahead_s: float
    recompute_s: float
    num_preemptions: int = 0
    priority: int = 0


def ahead_s(num_tokens: int, tpot_s: float, since_first_s: float) -> float:
    """How far a stream is ahead of its pace: the time its tokens were due in, less the time they took.

    Args:
        num_tokens: tokens after the first one.
        tpot_s: its target per token.
        since_first_s: seconds since its first token.
    """
    return num_tokens * tpot_s - since_first_s


def keep_order(streams: Sequence[Stream]) -> list[int]:
    """The places of `streams`, the one that gives way first at the end.

    First by how often they gave way, then by priority, then by slack: what a stream is ahead, less what it costs to
    compute again. Stable, so that equals keep their order.
    """

    def key(place: int) -> tuple[int, int, float]:
        stream = streams[place]
        return rank(stream.num_preemptions, stream.priority, stream.ahead_s, stream.recompute_s)

    return sorted(range(len(streams)), key=key)


def rank(num_preemptions: int, priority: int, ahead_s: float, recompute_s: float) -> tuple[int, int, float]:
    """Where one stream stands among those that should not give way: smaller is kept longer. See `Stream`."""
    return (0 if num_preemptions >= MAX_PREEMPTIONS else 1, priority, ahead_s - recompute_s)
