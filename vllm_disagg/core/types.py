"""Names of things that travel between processes."""

from __future__ import annotations

import secrets
from typing import NewType, TypeGuard

TransferId = NewType("TransferId", str)
"""One request's KV on its way from prefill to decode. Authored by the proxy; 128 random bits, 32 hex digits."""

EngineId = NewType("EngineId", str)
"""One run of one engine: a restart is another id, so that nothing of an earlier run is ever mistaken for this one."""

RequestId = NewType("RequestId", str)
"""vLLM's internal id of a request inside one engine. Prefill's and decode's never match."""

BlockIds = tuple[tuple[int, ...], ...]
"""KV block numbers, one tuple per KV cache group of the engine."""


def new_nonce() -> str:
    """64 random bits, 16 hex digits."""
    return secrets.token_hex(8)


_HEX = frozenset("0123456789abcdef")


def new_transfer_id() -> TransferId:
    """A fresh, unguessable transfer id."""
    return TransferId(secrets.token_hex(16))


def is_transfer_id(value: object) -> TypeGuard[TransferId]:
    """Whether `value` has the form that `new_transfer_id` makes."""
    return isinstance(value, str) and len(value) == 32 and set(value) <= _HEX
