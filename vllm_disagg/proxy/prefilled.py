"""What a prefill instance's answer says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_disagg.core.shapes import Api, is_token_ids
from vllm_disagg.core.types import TransferId
from vllm_disagg.proxy.instances import Instance
from vllm_disagg.proxy.upstream import LegFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """How far a prompt has got before decode sees it.

    Attributes:
        token_ids: the prompt's token ids, once a prefill instance has told them.
        handoff: what fetches its KV, if a prefill instance holds it.
        prefill: that instance.
        transfer_id: the transfer's name on both instances.
        num_cached_tokens: prompt tokens it had in its prefix cache, for the client's `usage`.
        queue_s: how long the prompt waited there.
        run_s: how long it was computed there.
    """

    token_ids: Sequence[int] | None = None
    handoff: str | None = None
    prefill: Instance | None = None
    transfer_id: TransferId | None = None
    num_cached_tokens: int | None = None
    queue_s: float = 0.0
    run_s: float = 0.0


def read_prefill_answer(api: Api, raw: bytes) -> Prefilled:
    """Read a prefill instance's answer.

    Raises:
        LegFailed: it is not one, or lacks the prompt's token ids.
    """
    try:
        answer = json.loads(raw)
        token_ids = answer["prompt_token_ids"] if api == "chat" else answer["choices"][0]["prompt_token_ids"]
        params = answer.get("kv_transfer_params") or {}
        handoff = params.get("handoff")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LegFailed("bad_answer") from error
    if not is_token_ids(token_ids) or not isinstance(handoff, str | None):
        raise LegFailed("bad_answer")
    return Prefilled(
        token_ids=token_ids,
        handoff=handoff or None,
        num_cached_tokens=_count(params.get("remote_prefill_cached_tokens")),
        queue_s=_seconds(params.get("queue_s")),
        run_s=_seconds(params.get("run_s")),
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _seconds(value: Any) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return max(0.0, float(value))
    return 0.0
