"""Where a request goes: split over two instances, local on one, or refused. Functions of plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from vllm_disagg.core.shapes import SHAPE_REASONS

Route = Literal["split", "local", "refuse"]

LOCAL_REASONS: Final[Mapping[str, str]] = {
    **SHAPE_REASONS,
    "short_prompt": "The prompt is certainly shorter than `min_split_tokens`.",
    "no_prefill": "No prefill instance is configured or up.",
    "incompatible": "Instances of both roles are up, but no pair has matching KV caches.",
    "prefill_failed": "The prefill instance failed, and so did the other one that was tried, if there was one.",
    "prefill_rejected": "The prefill instance answered 4xx; decode's own answer is what the client gets.",
    "nothing_held": "The prefill instance kept no KV, for instance because the client was thought to have left.",
    "decode_failed": "A decode instance failed before its first event; another one computes everything again.",
    "no_decode": "No decode instance is up: a prefill instance serves the whole request.",
}
"""Why a request runs on one instance: label and its meaning."""

REFUSE_REASONS: Final[Mapping[str, str]] = {
    "bad_request": "The body is not acceptable: 400, or 415 for another content type.",
    "too_large": "The body is larger than `max_body_bytes`: 413.",
    "slow_body": "The body did not arrive within `body_timeout_s`: 408.",
    "client_left": "The client left before its body had arrived.",
    "at_capacity": "`max_requests` are already in progress: 503.",
    "no_instance": "No instance of either role is up: 503.",
    "shutting_down": "The proxy ended before it could be answered: 503.",
}
"""Why a request is refused without asking any engine: label and its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one usable instance has in hand.

    Attributes:
        index: which instance of its role.
        num_tokens: prompt tokens of its outstanding requests.
        num_requests: its outstanding requests.
        last_chosen: when it was last chosen, as a growing number; the longest ago wins a tie.
    """

    index: int
    num_tokens: int
    num_requests: int
    last_chosen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a request goes, why, and to which instances.

    Both are given for `split`, and none for `refuse`. `local` names one: a decode instance, or a prefill instance that
    stands in where no decode instance is up.
    """

    route: Route
    reason: str
    prefill: int | None = None
    decode: int | None = None


def least_loaded(loads: Sequence[Load]) -> int | None:
    """The index of the instance with the least outstanding prompt tokens; None without any."""
    if not loads:
        return None
    return min(loads, key=lambda load: (load.num_tokens, load.num_requests, load.last_chosen)).index


def decide(
    *,
    shape: str | None,
    short: bool,
    prefill: Sequence[Load],
    decode: Sequence[Load],
    fits: Callable[[int, int], bool],
) -> Decision:
    """Choose the route and the instances of one request.

    Args:
        shape: why its shape cannot be split, from `shapes.unsplittable`.
        short: whether it is too short to be worth two instances.
        prefill: the usable prefill instances.
        decode: the usable decode instances.
        fits: whether this prefill and this decode instance can exchange KV.
    """
    local_on = least_loaded(decode)
    if local_on is None:
        stands_in = least_loaded(prefill)
        if stands_in is None:
            return Decision(route="refuse", reason="no_instance")
        return Decision(route="local", reason="no_decode", prefill=stands_in)
    reason = shape or ("short_prompt" if short else None) or ("no_prefill" if not prefill else None)
    if reason is not None:
        return Decision(route="local", reason=reason, decode=local_on)
    paired = least_loaded([d for d in decode if any(fits(p.index, d.index) for p in prefill)])
    if paired is None:
        return Decision(route="local", reason="incompatible", decode=local_on)
    chosen = least_loaded([p for p in prefill if fits(p.index, paired)])
    return Decision(route="split", reason="split", prefill=chosen, decode=paired)
