"""Leases: how long prefill keeps a finished prompt's KV for a decode instance.

One owner asks, with its own clock as an argument. A hold is in exactly one of these states and only moves right:

    (unknown) --grant--> held --renew--> held --release--> gone (ok)
                          |`--------------expire---------> gone (expired)
    (unknown) --forbid--> forbidden: a later grant is refused, since the client has already left
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

from vllm_disagg.core.types import BlockIds, TransferId

_MAX_FORBIDDEN = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Prefill keeps these blocks for decode until `expires_s`, on prefill's clock, but never beyond `cap_s`."""

    transfer_id: TransferId
    nonce: str
    block_ids: BlockIds
    granted_s: float
    expires_s: float
    cap_s: float

    def renewed(self, *, now_s: float, extension_s: float) -> Lease:
        """Extend the lease. A late renewal never shortens it, and none passes the cap."""
        return replace(self, expires_s=min(self.cap_s, max(self.expires_s, now_s + extension_s)))


class LeaseTable:
    """All holds of one prefill engine. Not thread-safe: its owner locks.

    Args:
        lease_s: how long a hold lives without a renewal.
        cap_s: the longest life of a hold, renewed or not.
    """

    def __init__(self, *, lease_s: float, cap_s: float) -> None:
        self._lease_s, self._cap_s = lease_s, cap_s
        self._held: dict[TransferId, Lease] = {}
        self._forbidden: dict[TransferId, float] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, transfer_id: TransferId) -> bool:
        return transfer_id in self._held

    @property
    def num_blocks(self) -> int:
        """Blocks held, over all groups."""
        return sum(len(group) for lease in self._held.values() for group in lease.block_ids)

    def oldest_age_s(self, now_s: float) -> float:
        """Age of the oldest hold; 0 with none."""
        return max((now_s - lease.granted_s for lease in self._held.values()), default=0.0)

    def grant(self, transfer_id: TransferId, nonce: str, block_ids: BlockIds, *, now_s: float) -> Lease | None:
        """Start a hold. None when the id is already held or was forbidden: then nothing may be kept.

        Args:
            transfer_id: whose blocks.
            nonce: of the handoff; a later hold under the same id has another.
            block_ids: the blocks.
            now_s: the owner's clock.
        """
        if transfer_id in self._held or self._forbidden.pop(transfer_id, None) is not None:
            return None
        lease = Lease(
            transfer_id=transfer_id,
            nonce=nonce,
            block_ids=block_ids,
            granted_s=now_s,
            expires_s=now_s + self._lease_s,
            cap_s=now_s + self._cap_s,
        )
        self._held[transfer_id] = lease
        return lease

    def renew(self, transfer_id: TransferId, *, now_s: float) -> bool:
        """Extend a hold. False when it is not held (any more)."""
        lease = self._held.get(transfer_id)
        if lease is None or lease.expires_s <= now_s:
            return False
        self._held[transfer_id] = lease.renewed(now_s=now_s, extension_s=self._lease_s)
        return True

    def release(self, transfer_id: TransferId, nonce: str) -> Lease | None:
        """End a hold because decode has read the blocks, or wants them no more.

        Returns:
            The lease if this very hold still stood, which proves that its blocks were intact until now; None
            otherwise. One past its expiry that `expire` has not collected yet still counts: its blocks are still held.
        """
        lease = self._held.get(transfer_id)
        if lease is None or lease.nonce != nonce:
            return None
        return self._held.pop(transfer_id)

    def forbid(self, transfer_id: TransferId, *, now_s: float) -> Lease | None:
        """End a hold, or refuse it in advance when its prompt is still being computed."""
        lease = self._held.pop(transfer_id, None)
        if lease is None:
            self._forbidden[transfer_id] = now_s + self._cap_s
            if len(self._forbidden) > _MAX_FORBIDDEN:
                del self._forbidden[next(iter(self._forbidden))]
        return lease

    def clear(self) -> list[Lease]:
        """End every hold, because what the blocks hold is no longer right."""
        over = list(self._held.values())
        self._held.clear()
        return over

    def expire(self, *, now_s: float) -> list[Lease]:
        """Remove and return the holds whose time is over."""
        over = [lease for lease in self._held.values() if lease.expires_s <= now_s]
        for lease in over:
            del self._held[lease.transfer_id]
        while self._forbidden and next(iter(self._forbidden.values())) <= now_s:  # in order of time
            del self._forbidden[next(iter(self._forbidden))]
        return over

    def next_expiry_s(self) -> float | None:
        """When `expire` next has something to do; None with no holds and no refusals."""
        times = [lease.expires_s for lease in self._held.values()]
        times.extend(islice(self._forbidden.values(), 1))
        return min(times, default=None)
