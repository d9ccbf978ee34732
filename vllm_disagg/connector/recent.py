"""Remembers ids for a while."""

from __future__ import annotations

import threading

from vllm_disagg.core.types import TransferId

_MAX_IDS = 1_000_000


class RecentIds:
    """Ids added within the last `keep_s` seconds, oldest forgotten first. Any thread may use it."""

    def __init__(self, *, keep_s: float) -> None:
        self._keep_s = keep_s
        self._added: dict[TransferId, float] = {}
        self._lock = threading.Lock()

    def __contains__(self, transfer_id: TransferId) -> bool:
        return transfer_id in self._added

    def __len__(self) -> int:
        return len(self._added)

    def add(self, transfer_id: TransferId, *, now_s: float) -> bool:
        """Remember an id, and forget those whose time is over. False if it was known already."""
        with self._lock:
            if transfer_id in self._added:
                return False
            self._added[transfer_id] = now_s
            while len(self._added) > _MAX_IDS or next(iter(self._added.values())) < now_s - self._keep_s:
                del self._added[next(iter(self._added))]
            return True
