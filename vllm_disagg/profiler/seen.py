"""Steps as a client can tell them from when tokens came: for engines that write no log of them.

A step hands each of its requests a token, all at about the same moment. From one such moment to the next is one step,
the host's share of it included.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.profiler.drive import Batch, Seen, Stream, Window

_TOGETHER: Final = 0.25
"""Tokens that are further apart than this part of a step's time were not made by the same one."""

_TOGETHER_S: Final = 0.002
"""Tokens that came within so many seconds came together: the client itself is no quicker."""

_EACH_S: Final = 0.001
"""What an API server takes at most to send one of many tokens of a step."""


def steps_seen(seen: Seen) -> list[RecordedStep]:
    """All steps of which it is clear what they computed."""
    found = [step for batch in seen.batches for step in _of_batch(batch)]
    return found + [step for window in seen.windows for step in _of_window(window)]


def _of_batch(batch: Batch) -> Iterable[RecordedStep]:
    firsts = sorted(stream.arrivals[0][0] for stream in batch.prompts)
    step_s = firsts[0] - batch.blocker_s
    together_s = _TOGETHER_S + _EACH_S * len(firsts)
    if step_s > 0 and firsts[-1] - firsts[0] <= min(_TOGETHER * step_s, together_s):
        yield RecordedStep(
            at_s=batch.blocker_s,
            step_s=step_s,
            requests=tuple((0, stream.num_prompt_tokens) for stream in batch.prompts),
        )


class _Moment:
    """Tokens that came together: `(computed, new)` of each stream and prompt that got one."""

    def __init__(self, at_s: float) -> None:
        self.at_s = self.last_s = at_s
        self.requests: dict[int, tuple[int, int]] = {}
        self.is_clear = True


def _of_window(window: Window) -> Iterable[RecordedStep]:
    events = sorted(
        (
            (at_s, number, stream, before)
            for number, stream in enumerate((*window.streams, *window.prompts))
            for at_s, before in _numbered(stream)
            if window.begin_s <= at_s <= window.end_s
        ),
        key=lambda event: event[:2],
    )
    apart_s = max(_TOGETHER_S, _TOGETHER * _median_gap_s(window.streams))
    moments: list[_Moment] = []
    for at_s, number, stream, before in events:
        if not moments or number in moments[-1].requests or at_s - moments[-1].last_s > apart_s:
            moments.append(_Moment(at_s))
        moments[-1].last_s = at_s
        if before is None:
            moments[-1].is_clear = False
        elif before == 0:
            moments[-1].requests[number] = (0, stream.num_prompt_tokens)
        else:
            moments[-1].requests[number] = (stream.num_prompt_tokens + before - 1, 1)
    everyone = set(range(len(window.streams)))
    for before_it, moment in pairwise(moments):
        if all(item.is_clear and everyone <= item.requests.keys() for item in (before_it, moment)):
            yield RecordedStep(
                at_s=before_it.at_s, step_s=moment.at_s - before_it.at_s, requests=tuple(moment.requests.values())
            )


def _numbered(stream: Stream) -> Iterable[tuple[float, int | None]]:
    """When each token came and how many had come before; None for tokens that came together."""
    before = 0
    for at_s, number in stream.arrivals:
        yield at_s, before if number == 1 else None
        before += number


def _median_gap_s(streams: Sequence[Stream]) -> float:
    gaps = [later - earlier for stream in streams for (earlier, _), (later, _) in pairwise(stream.arrivals)]
    return statistics.median(gaps) if gaps else 0.0
