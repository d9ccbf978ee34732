"""In which order waiting prompts are computed.

Three policies under one promise: whoever has waited `patience_s` goes before everybody who has not, in order of
arrival. So nobody is overtaken by a request that came after that, whatever policy, priorities and deadlines say.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Policy = Literal["fcfs", "sjf", "edf"]
"""First come first served; shortest job first, with ageing; earliest deadline first, for as many as can meet theirs."""

AGEING = 0.5
"""Of `sjf`: seconds of work that a second of waiting makes good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One waiting prompt.

    Args:
        arrived_s: when it came, on any clock.
        run_s: how long the device will work on it, predicted.
        deadline_s: when its first token is due, on the same clock; infinite for never.
        priority: smaller goes first, as in vLLM.
    """

    arrived_s: float
    run_s: float
    deadline_s: float = math.inf
    priority: int = 0


def order(
    prompts: Sequence[Prompt], policy: Policy, *, now_s: float, patience_s: float, ageing: float = AGEING
) -> list[int]:
    """The places of `prompts` in the order in which they should be computed.

    `fcfs` goes by arrival. `sjf` goes by run_s + ageing * arrived_s: every second of waiting is worth `ageing` seconds
    of work, so that a prompt is only ever overtaken by shorter ones that came less than (the difference of their run
    times) / ageing after it. `edf` goes by deadline, and puts back those that cost others their deadlines or have
    missed their own (`on_time`); these follow by arrival.

    Args:
        prompts: those that wait.
        policy: see above. Priorities come before it, patience before both.
        now_s: on the clock of `arrived_s`.
        patience_s: see the module's docstring.
        ageing: of `sjf`.
    """
    kept = on_time(prompts, now_s=now_s) if policy == "edf" else frozenset()

    def rank(place: int) -> tuple[int, int, int, float, float, int]:
        prompt = prompts[place]
        if now_s - prompt.arrived_s >= patience_s:
            return (0, 0, 0, prompt.arrived_s, 0.0, place)
        if policy == "sjf":
            return (1, prompt.priority, 0, prompt.run_s + ageing * prompt.arrived_s, prompt.arrived_s, place)
        if policy == "edf" and place in kept:
            return (1, prompt.priority, 0, prompt.deadline_s, prompt.arrived_s, place)
        return (1, prompt.priority, 1, prompt.arrived_s, 0.0, place)

    return sorted(range(len(prompts)), key=rank)


def on_time(prompts: Sequence[Prompt], *, now_s: float) -> frozenset[int]:
    """The largest set of prompts that can all meet their deadlines, one after the other from now on.

    Moore and Hodgson's rule (Management Science 15, 1968): go by deadline, and whenever one would be late, give up the
    longest so far. No other set has more members. Prompts without a deadline are left out.
    """
    longest: list[tuple[float, int]] = []
    end_s = now_s
    for place in sorted(range(len(prompts)), key=lambda place: (prompts[place].deadline_s, place)):
        prompt = prompts[place]
        if prompt.deadline_s == math.inf:
            break
        heapq.heappush(longest, (-prompt.run_s, place))
        end_s += prompt.run_s
        if end_s > prompt.deadline_s:
            end_s += heapq.heappop(longest)[0]
    return frozenset(place for _, place in longest)
