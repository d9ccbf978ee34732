"""The time that KV of full size would take over a link, and a transport that takes it.

A transfer occupies the sender's and the receiver's end of the link, one after the other in the order of arrival; it
ends when it would have ended there, and not before its real bytes have arrived.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from vllm_disagg.core.link import Link
from vllm_disagg.emulation.faults import Fault, Faults
from vllm_disagg.emulation.shape import CELL_BYTES
from vllm_disagg.emulation.stamps import seed_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.transport.base import Copy, Movement, Outcome, PeerName, Region, TransferHandle, Transport, WireInfo

logger = logging.getLogger(__name__)


class Ledger(Protocol):
    """Who notes until when each end of a link is busy."""

    def reserve(self, ends: Sequence[str], seconds: float, now_s: float) -> float:
        """Occupy all ends at once, as soon as the last of them is free.

        Returns:
            When the occupation ends.
        """


class OwnLedger:
    """Of one process alone."""

    def __init__(self) -> None:
        self._free_s: dict[str, float] = {}

    def reserve(self, ends: Sequence[str], seconds: float, now_s: float) -> float:
        end_s = max(now_s, *(self._free_s.get(end, 0.0) for end in ends)) + seconds
        self._free_s.update(dict.fromkeys(ends, end_s))
        return end_s


class SharedLedger:
    """Of all processes of this host that name the same file. Its times are of the host's monotonic clock.

    Args:
        path: the file; made when it is not there.

    Raises:
        ConfigError: it cannot be opened, or is not such a file.
    """

    _SLOT: Final = struct.Struct("=Qd")
    _NUM_SLOTS: Final = 1024

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            size = self._SLOT.size * self._NUM_SLOTS
            if os.fstat(self._file).st_size not in (0, size):
                raise ConfigError(f"--emulate-link-ledger {path} is some other file: name a new one")
            os.ftruncate(self._file, size)
            self._slots = mmap.mmap(self._file, size)
        except OSError as error:
            raise ConfigError(f"--emulate-link-ledger {path}: {error.strerror}") from error

    def reserve(self, ends: Sequence[str], seconds: float, now_s: float) -> float:
        fcntl.flock(self._file, fcntl.LOCK_EX)  # unlike `lockf` also between the ranks' threads of one engine
        try:
            slots = [self._slot(end) for end in ends]
            busy_s: list[float] = [self._SLOT.unpack_from(self._slots, slot)[1] for slot in slots]
            end_s = max(now_s, *busy_s) + seconds
            for end, slot in zip(ends, slots, strict=True):
                self._SLOT.pack_into(self._slots, slot, seed_of(end) or 1, end_s)
            return end_s
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _slot(self, end: str) -> int:
        """Open addressing; a full table makes strangers share a slot, which only makes them slower."""
        key = seed_of(end) or 1
        for step in range(self._NUM_SLOTS):
            offset = (key + step) % self._NUM_SLOTS * self._SLOT.size
            if self._SLOT.unpack_from(self._slots, offset)[0] in (0, key):
                return offset
        return key % self._NUM_SLOTS * self._SLOT.size


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A read under way: until when it occupies the link, and what will be done to its bytes.

    `cut` says why it does not wait for that any more.
    """

    number: int
    peer: PeerName
    started_s: float
    end_s: float
    first: Copy
    faults: tuple[Fault, ...]
    kept: tuple[int, bytes] | None
    outcome: Outcome | None = None
    cancelled: bool = False
    cut: str = ""

    def is_over(self, now_s: float) -> bool:
        if self.outcome is None:
            return False
        return self.outcome.state != "done" or self.cancelled or bool(self.cut) or now_s >= self.end_s


class EmulatedLink:
    """A `Transport` around another one. Real bytes move through that; this adds the modelled time and the faults.

    Args:
        inner: moves the bytes.
        link: modelled; None adds no time.
        scale: bytes of the modelled KV for each real byte.
        dilation: how much slower the link is than modelled.
        own_name: this end of the link.
        ledger: until when the ends are busy.
        faults: what happens to reads.
        now: seconds.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        link: Link | None,
        scale: float,
        dilation: float,
        own_name: str,
        ledger: Ledger,
        faults: Faults,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = inner.name
        self.inner = inner
        self._link, self._scale, self._dilation = link, scale, dilation
        self._own_name, self._ledger, self._faults, self._now = own_name, ledger, faults, now
        self._pending: dict[int, tuple[TransferHandle, _Pending]] = {}
        self._late: list[tuple[float, tuple[int, bytes]]] = []
        self._num_reads = 0

    def register(self, regions: Sequence[Region]) -> bytes:
        return self.inner.register(regions)

    def connect(self, descriptor: bytes) -> PeerName:
        return self.inner.connect(descriptor)

    def disconnect(self, peer: PeerName) -> None:
        self.inner.disconnect(peer)
        for _, pending in self._pending.values():
            if pending.peer == peer:
                pending.cut = "disconnected"

    def wire(self, peer: PeerName) -> WireInfo:
        return self.inner.wire(peer)

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        return self._read(peer, copies, self._link)

    def read_unmodelled(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        """A read that is no KV, and takes the time of the real link alone. Faults meet it all the same."""
        return self._read(peer, copies, None)

    def _read(self, peer: PeerName, copies: Sequence[Copy], link: Link | None) -> TransferHandle:
        faults = self._faults.of_read(self._num_reads + 1) if copies else ()
        kept = _saved(copies[0]) if any(fault.kind == "drop_block" for fault in faults) else None
        handle = self.inner.read(peer, copies)
        self._num_reads += 1
        now_s = self._now()
        end_s = now_s
        if link is not None:
            seconds = link.seconds(self._scale * sum(copy.num_bytes for copy in copies)) * self._dilation
            end_s = self._ledger.reserve([f"out {peer}", f"in {self._own_name}"], seconds, now_s)
        pending = _Pending(
            number=self._num_reads,
            peer=peer,
            started_s=now_s,
            end_s=end_s,
            first=copies[0],
            faults=faults,
            kept=kept,
        )
        self._pending[id(handle)] = (handle, pending)
        return handle

    def warm(self, peer: PeerName) -> None:
        self.inner.warm(peer)

    def movement(self, peer: PeerName) -> Movement:
        return self.inner.movement(peer)

    def rebuild(self, peer: PeerName) -> None:
        self.inner.rebuild(peer)

    def poll(self) -> Sequence[Outcome]:
        now_s = self._now()
        self._deliver_late(now_s)
        for outcome in self.inner.poll():
            self._pending[id(outcome.handle)][1].outcome = outcome
        over = [(key, pending) for key, (_, pending) in self._pending.items() if pending.is_over(now_s)]
        return [self._end(key, pending, now_s) for key, pending in over]

    def cancel(self, handle: TransferHandle) -> None:
        if id(handle) in self._pending:
            self._pending[id(handle)][1].cancelled = True
        self.inner.cancel(handle)

    @property
    def num_active(self) -> int:
        warming = max(0, self.inner.num_active - len(self._pending))
        return len(self._pending) + len(self._late) + warming

    def progress(self) -> None:
        self.inner.progress()

    def close(self) -> None:
        self.inner.close()
        self._late.clear()  # the memory may be gone
        for _, pending in self._pending.values():
            pending.cut = "closed"

    def _end(self, key: int, pending: _Pending, now_s: float) -> Outcome:
        del self._pending[key]
        outcome = pending.outcome
        assert outcome is not None
        if outcome.state != "done":
            return outcome
        error = pending.cut or self._harm(pending, now_s)
        return Outcome(
            handle=outcome.handle,
            state="failed" if error else "done",
            seconds=max(outcome.seconds, now_s - pending.started_s),
            num_bytes=outcome.num_bytes,
            num_descriptors=outcome.num_descriptors,
            error=error,
        )

    def _harm(self, pending: _Pending, now_s: float) -> str:
        """Do what the faults say to the bytes that have arrived. Returns why the read failed, if it did."""
        error, first = "", pending.first
        for fault in pending.faults:
            if fault.kind == "corrupt_read":
                # The share of a block's first token: the rest of a prompt's last block means nothing yet.
                byte = ctypes.c_uint8.from_address(first.local + pending.number % min(CELL_BYTES, first.num_bytes))
                byte.value ^= 1 << pending.number % 8
            elif fault.kind == "drop_block" and pending.kept is not None:
                _restore(pending.kept)
            elif fault.kind == "late_block":
                self._late.append((now_s + fault.seconds, _saved(first)))
                ctypes.memset(first.local, 0, first.num_bytes)
            elif fault.kind == "fail_read":
                error = "a fault was asked for"
            logger.warning("emulation.fault kind=%s read=%d", fault.kind, pending.number)
        return error

    def _deliver_late(self, now_s: float) -> None:
        due = [item for item in self._late if item[0] <= now_s]
        self._late = [item for item in self._late if item[0] > now_s]
        for _, saved in due:
            _restore(saved)


def _saved(copy: Copy) -> tuple[int, bytes]:
    return copy.local, ctypes.string_at(copy.local, copy.num_bytes)


def _restore(saved: tuple[int, bytes]) -> None:
    address, content = saved
    ctypes.memmove(address, content, len(content))
