"""What the connector reads off a vLLM request."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_disagg.connector.engine_fingerprint import WEIGHT_SUFFIXES, weights_digest

if TYPE_CHECKING:
    from vllm.v1.request import Request

_NOTHING: Mapping[str, Any] = {}


def kv_params(request: Request) -> Mapping[str, Any]:
    """The request's `kv_transfer_params`; empty for anything that is not a mapping, whoever sent it."""
    params = request.kv_transfer_params
    return params if isinstance(params, Mapping) else _NOTHING


@functools.lru_cache(maxsize=1024)
def _adapter_digest(path: str, lora_id: int) -> str:
    """An adapter by what is in its files: one name may mean two versions on two engines. A reload has another id."""
    return weights_digest(path, "", suffixes=(*WEIGHT_SUFFIXES, ".json"))


def prompt_salt(request: Request) -> str:
    """Whatever else than its token ids a prompt's KV depends on: adapter, cache salt, images."""
    lora = request.lora_request
    adapter = [] if lora is None else [lora.lora_name, _adapter_digest(lora.lora_path, lora.lora_int_id)]
    media = [feature.identifier for feature in request.mm_features]
    return msgspec.json.encode([adapter, request.cache_salt or "", media]).decode()


def was_aborted(request: Request) -> bool:
    """Whether a finished request ended because its client left."""
    from vllm.v1.request import RequestStatus

    return bool(request.status == RequestStatus.FINISHED_ABORTED)


def is_rejection_notice(request: Request) -> bool:
    """Whether this may be no request: with one made-up token vLLM's API server tells connectors of a request that it
    has refused, or whose client has left it (`AsyncLLM.notify_kv_transfer_request_rejected`), and aborts it at once."""
    return bool(request.prompt_token_ids == [0] and request.max_tokens == 1)
