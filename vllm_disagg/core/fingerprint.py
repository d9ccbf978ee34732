"""What two engines must have in common before one may read the other's KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from vllm_disagg.errors import IncompatiblePeer

Fingerprint = Mapping[str, str]
"""Factor name, as the user would change it, to its value. Compared factor by factor, never as one opaque hash."""


def check_compatible(ours: Fingerprint, theirs: Fingerprint) -> None:
    """Refuse a peer whose KV cannot be used here.

    Raises:
        IncompatiblePeer: names the first factor that differs, in our order; one that a side lacks counts as absent.
    """
    for factor in [*ours, *(name for name in theirs if name not in ours)]:
        mine, other = ours.get(factor, "absent"), theirs.get(factor, "absent")
        if mine != other:
            raise IncompatiblePeer(factor, ours=mine, theirs=other)


def digest_of(value: object) -> str:
    """A short stable digest of a plain value, for factors too long to show."""
    return hashlib.blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=8).hexdigest()
