"""The blocks that prefill keeps for decode, shared by its scheduler and its control channel.

vLLM's main thread grants holds and gives blocks back to the pool; the control thread renews, releases and expires.
A release is answered `ok` under the same lock under which a hold expires, and blocks return to the pool only after
they have left this table: `ok` therefore proves that nobody else has written to them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

from vllm_disagg.core.lease import Lease, LeaseTable
from vllm_disagg.core.lifetime import PREFILL, Lives, State
from vllm_disagg.core.types import BlockIds, TransferId

HoldEvent = Literal["granted", "released", "expired", "forbidden", "refused", "reset"]
"""What is counted of holds: events of `core.lifetime.PREFILL`."""


class Holds:
    """A lease table with a lock, a clock and the queue of blocks that nobody holds any more.

    Args:
        lease_s: life of a hold without renewal.
        cap_s: longest life of a hold.
        on_freed: called, on any thread, when `take_freed` has something to return.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, lease_s: float, cap_s: float, on_freed: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lives = Lives(PREFILL)
        """The steps of all requests of this prefill engine."""
        self._table = LeaseTable(lease_s=lease_s, cap_s=cap_s)
        self._lock = threading.Lock()
        self._freed: deque[BlockIds] = deque()
        self._on_freed, self._clock = on_freed, clock

    def grant(self, transfer_id: TransferId, nonce: str, block_ids: BlockIds) -> bool:
        """Start a hold on blocks the caller has pinned. False: refused, and the caller unpins them itself."""
        with self._lock:
            granted = self._table.grant(transfer_id, nonce, block_ids, now_s=self._clock()) is not None
            self.lives.step(State.PREFILLING, "granted" if granted else "refused")
        return granted

    def renew(self, transfer_ids: Iterable[TransferId]) -> tuple[TransferId, ...]:
        """Extend holds. Returns those that are gone."""
        now_s = self._clock()
        with self._lock:
            return tuple(item for item in transfer_ids if not self._renew(item, now_s))

    def release(self, transfer_id: TransferId, nonce: str) -> bool:
        """End a hold. True proves that its blocks were intact until now."""
        with self._lock:
            return self._free(self._table.release(transfer_id, nonce), "released")

    def forbid(self, transfer_id: TransferId) -> bool:
        """End a hold, or refuse it in advance. True if there was one."""
        with self._lock:
            return self._free(self._table.forbid(transfer_id, now_s=self._clock()), "forbidden")

    def expire(self) -> int:
        """End the holds whose time is over. Returns how many."""
        with self._lock:
            over = self._table.expire(now_s=self._clock())
            for lease in over:
                self._free(lease, "expired")
        return len(over)

    def reset(self) -> None:
        """End every hold: the cache is being reset, so what decode would read is no longer right."""
        with self._lock:
            for lease in self._table.clear():
                self._free(lease, "reset")

    def take_freed(self) -> list[BlockIds]:
        """Blocks to give back to the pool, each set exactly once."""
        taken = []
        while self._freed:
            taken.append(self._freed.popleft())
        return taken

    @property
    def has_freed(self) -> bool:
        """Whether `take_freed` would return something."""
        return bool(self._freed)

    def __contains__(self, transfer_id: TransferId) -> bool:
        return transfer_id in self._table

    def __len__(self) -> int:
        return len(self._table)

    def usage(self) -> tuple[int, int, float]:
        """Holds, blocks held, and the age of the oldest hold in seconds."""
        with self._lock:
            return len(self._table), self._table.num_blocks, self._table.oldest_age_s(self._clock())

    def seconds_to_expiry(self) -> float | None:
        """Until `expire` next has something to do; None for never."""
        with self._lock:
            next_s = self._table.next_expiry_s()
        return None if next_s is None else max(0.0, next_s - self._clock())

    def _renew(self, transfer_id: TransferId, now_s: float) -> bool:
        renewed = self._table.renew(transfer_id, now_s=now_s)
        if renewed:
            self.lives.step(State.HELD, "renewed")
        return renewed

    def _free(self, lease: Lease | None, event: HoldEvent) -> bool:
        if lease is None:
            return False
        self.lives.step(State.HELD, event)
        self._freed.append(lease.block_ids)
        self._on_freed()
        return True
