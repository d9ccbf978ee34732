"""What the connector reads off a vLLM request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from vllm.v1.request import Request

_NOTHING: Mapping[str, Any] = {}


def kv_params(request: Request) -> Mapping[str, Any]:
    """The request's `kv_transfer_params`; empty for anything that is not a mapping, whoever sent it."""
    params = request.kv_transfer_params
    return params if isinstance(params, Mapping) else _NOTHING


def prompt_salt(request: Request) -> str:
    """Whatever else than its token ids a prompt's KV depends on: adapter, cache salt, images."""
    adapter = request.lora_request.lora_name if request.lora_request is not None else ""
    media = [feature.identifier for feature in request.mm_features]
    return msgspec.json.encode([adapter, request.cache_salt or "", media]).decode()
