"""In which order waiting prompts are computed.

Three policies under one promise: whoever has waited `patience_s` goes before everybody who has not, in order of
arrival. So nobody is overtaken by a request that came after that, whatever policy, priorities and deadlines say.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Policy = Literal["fcfs", "sjf", "edf"]
"""First come first served; shortest job first, with ageing; earliest deadline first, for as many as can meet theirs."""

FCFS, SJF, EDF = range(3)
"""`Policy` as numbers, in its order."""

AGEING = 0.5
"""Of `sjf`: seconds of work that a second of waiting makes good."""

Rank = tuple[int, int, int, float, float]
"""Where a prompt stands in line: smaller goes first."""


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
    number = get_args(Policy).index(policy)

    def key(place: int) -> tuple[Rank, int]:
        prompt = prompts[place]
        return rank(
            number, place in kept, now_s - prompt.arrived_s >= patience_s, prompt.priority, prompt.arrived_s,
            prompt.run_s, prompt.deadline_s, ageing,
        ), place  # fmt: skip

    return sorted(range(len(prompts)), key=key)


def rank(
    policy: int, kept: bool, patient: bool, priority: int, arrived_s: float, run_s: float, deadline_s: float,
    ageing: float,
) -> Rank:  # fmt: skip
    """Where one prompt stands; equals go by their place.

    Args:
        policy: `FCFS`, `SJF` or `EDF`.
        kept: of `edf`, whether it is among those that can be in time.
        patient: whether its patience is over.
        priority, arrived_s, run_s, deadline_s: see `Prompt`.
        ageing: see `order`.
    """
    if patient:
        return (0, 0, 0, arrived_s, 0.0)
    if policy == SJF:
        return (1, priority, 0, run_s + ageing * arrived_s, arrived_s)
    if policy == EDF and kept:
        return (1, priority, 0, deadline_s, arrived_s)
    return (1, priority, 1, arrived_s, 0.0)


def on_time(prompts: Sequence[Prompt], *, now_s: float) -> frozenset[int]:
    """The largest set of prompts that can all meet their deadlines, one after the other from now on.

    Moore and Hodgson's rule (Management Science 15, 1968): go by deadline, and whenever one would be late, give up the
    longest so far. No other set has more members. Prompts without a deadline are left out.
    """
    promised = [place for place, prompt in enumerate(prompts) if prompt.deadline_s != math.inf]
    promised.sort(key=lambda place: prompts[place].deadline_s)
    run_s, deadline_s = ([getattr(prompts[place], name) for place in promised] for name in ("run_s", "deadline_s"))
    return frozenset(promised[place] for _, place in keep_on_time(run_s, deadline_s, len(promised), now_s))


def keep_on_time(
    run_s: Sequence[float], deadline_s: Sequence[float], num: int, now_s: float
) -> list[tuple[float, int]]:
    """Moore and Hodgson's rule over prompts by rising deadline. Returns `(-run_s, place)` of those that are kept."""
    longest = [(0.0, 0)]
    longest.pop()
    end_s = now_s
    for place in range(num):
        heapq.heappush(longest, (-run_s[place], place))
        end_s += run_s[place]
        if end_s > deadline_s[place]:
            end_s += heapq.heappop(longest)[0]
    return longest


def own_s(tokens: int, batch_tokens: int, constant_s: float, per_token_s: float, per_area_s: float) -> float:
    """How long the device works on one prompt: of what a step costs in any case, it bears its share of L_m.

    Args:
        tokens: its length.
        batch_tokens: L_m.
        constant_s, per_token_s, per_area_s: of the regime of steps with so many tokens (`core.latency`).
    """
    return min(1.0, tokens / batch_tokens) * constant_s + per_token_s * tokens + per_area_s * tokens * tokens
