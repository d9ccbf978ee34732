"""The log of an engine's steps, one JSON line for each: what a step computed, and how long it took."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from vllm_disagg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """One step.

    Args:
        at_s: when it was handed to the workers, on the engine's monotonic clock.
        step_s: from then until its tokens were back in the engine.
        requests: `(computed, new)` of each request in it: tokens already in the KV cache, tokens to compute.
    """

    at_s: float
    step_s: float
    requests: tuple[tuple[int, int], ...]

    def line(self) -> str:
        """As one line of JSON."""
        return msgspec.json.encode((round(self.at_s, 6), round(self.step_s, 6), self.requests)).decode() + "\n"


def requests_of(step: Any) -> tuple[tuple[int, int], ...]:
    """`(computed, new)` of each request in a step, in the scheduler's order.

    Args:
        step: vLLM's `SchedulerOutput`.
    """
    computed = {request.req_id: request.num_computed_tokens for request in step.scheduled_new_reqs}
    cached, new = step.scheduled_cached_reqs, step.num_scheduled_tokens
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return tuple(zip(map(computed.__getitem__, new), new.values(), strict=True))


def read_steps(path: Path) -> list[RecordedStep]:
    """All steps of a file, in their order.

    Raises:
        ConfigError: a line is malformed; one that is still being written at the end is left out.
    """
    return parse_steps(path.read_text(encoding="utf-8"), origin=str(path))


def parse_steps(text: str, *, origin: str) -> list[RecordedStep]:
    """All steps of a log, or of a part of it that begins with a line.

    Args:
        text: the lines; one without its end is left out.
        origin: the file, for error texts.

    Raises:
        ConfigError: a line is malformed.
    """
    lines = text.splitlines(keepends=True)
    return [_parsed(line, f"{origin}:{number}") for number, line in enumerate(lines, 1) if line.endswith("\n")]


def cycles_s(steps: Sequence[RecordedStep]) -> list[tuple[RecordedStep, float]]:
    """Each step that another one followed without a pause, and the time from its launch to the other's.

    A step whose successor goes on with a request that has KV already was followed without a pause; this needs an engine
    without prefix cache.

    Args:
        steps: in their order.
    """
    return [
        (step, following.at_s - step.at_s)
        for step, following in pairwise(steps)
        if any(computed for computed, _ in following.requests)
    ]


def _parsed(line: str, origin: str) -> RecordedStep:
    try:
        at_s, step_s, requests = json.loads(line)
        return RecordedStep(at_s=float(at_s), step_s=float(step_s), requests=_pairs(requests))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: expected [at_s, step_s, [[computed, new], ...]], not {line[:60]!r}") from error


def _pairs(requests: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(computed), int(new)) for computed, new in requests)
