"""Who gives way where the KV cache is full: the stream that can best afford to compute everything again."""

from __future__ import annotations

MAX_PREEMPTIONS = 2
"""Who gave way so often gives way again only after everybody who did not."""


def ahead_s(num_tokens: int, tpot_s: float, since_first_s: float) -> float:
    """How far a stream is ahead of its pace: the time its tokens were due in, less the time they took.

    Args:
        num_tokens: tokens after the first one.
        tpot_s: its target per token.
        since_first_s: seconds since its first token.
    """
    return num_tokens * tpot_s - since_first_s


def rank(num_preemptions: int, priority: int, ahead_s: float, recompute_s: float) -> tuple[int, int, float]:
    """Where one running request stands among those that should not give way: who has the largest one gives way first.

    First by how often it gave way, then by priority, then by slack: what it is ahead, less what it costs to compute
    again. Equals keep their order.

    Args:
        num_preemptions: how often it has given way.
        priority: smaller is more important, as in vLLM.
        ahead_s: how far it is ahead of the pace it was promised (`ahead_s`); negative when behind.
        recompute_s: how long its tokens take to be computed again.
    """
    return (0 if num_preemptions >= MAX_PREEMPTIONS else 1, priority, ahead_s - recompute_s)
