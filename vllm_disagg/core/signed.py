"""Short messages that travel over HTTP, signed with a key derived from the deployment key for one purpose each."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from vllm_disagg.core.keys import derive

_MAC_BYTES = 32


def sign(body: bytes, key: bytes, purpose: str) -> bytes:
    """A message's way through HTTP: base64 of its signature and itself."""
    return base64.urlsafe_b64encode(_mac(body, key, purpose) + body)


def verified(raw: bytes, key: bytes, purpose: str, *, max_bytes: int) -> bytes | None:
    """The message, if it was signed with the same key for the same purpose and is no longer than that; else None."""
    try:
        text = base64.b64decode(raw, altchars=b"-_", validate=True) if len(raw) <= max_bytes else b""
    except binascii.Error:
        text = b""
    mac, body = text[:_MAC_BYTES], text[_MAC_BYTES:]
    return body if hmac.compare_digest(mac, _mac(body, key, purpose)) else None


def _mac(body: bytes, key: bytes, purpose: str) -> bytes:
    return hmac.new(derive(key, purpose), body, hashlib.sha256).digest()
