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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from vllm_disagg.emulation.faults import Fault, Faults
from vllm_disagg.emulation.settings import LinkName
from vllm_disagg.emulation.stamps import seed_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.transport.base import Copy, Outcome, PeerName, Region, TransferHandle, Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of one device's link. Nominal figures of data sheets, without protocol overhead."""

    bytes_per_s: float
    latency_s: float

    def seconds(self, num_bytes: float) -> float:
        """How long one transfer takes alone."""
        return self.latency_s + num_bytes / self.bytes_per_s


LINKS: Final[dict[LinkName, Link]] = {
    "nvlink": Link(bytes_per_s=300e9, latency_s=5e-6),
    "pcie5": Link(bytes_per_s=64e9, latency_s=10e-6),
    "200g": Link(bytes_per_s=25e9, latency_s=20e-6),
    "25g": Link(bytes_per_s=3.125e9, latency_s=50e-6),
}
"""NVLink 3 of an A100, half of its 600 GB/s; PCIe 5 x16; Ethernet or InfiniBand of 200 and 25 Gb/s."""


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
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            slots = [self._slot(end) for end in ends]
            busy_s: list[float] = [self._SLOT.unpack_from(self._slots, slot)[1] for slot in slots]
            end_s = max(now_s, *busy_s) + seconds
            for end, slot in zip(ends, slots, strict=True):
                self._SLOT.pack_into(self._slots, slot, seed_of(end) or 1, end_s)
            return end_s
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _slot(self, end: str) -> int:
        """Open addressing; a full table makes strangers share a slot, which only makes them slower."""
        key = seed_of(end) or 1
        for step in range(self._NUM_SLOTS):
            offset = (key + step) % self._NUM_SLOTS * self._SLOT.size
            if self._SLOT.unpack_from(self._slots, offset)[0] in (0, key):
                return offset
        return key % self._NUM_SLOTS * self._SLOT.size


@dataclass(slots=True)
class _Pending:
    """A read under way: what it occupies, and what will be done to its bytes."""

    end_s: float
    copies: Sequence[Copy]
    faults: tuple[Fault, ...]
    outcome: Outcome | None = None
    started_s: float = 0.0
    cancelled: bool = False
    kept: list[tuple[int, bytes]] = field(default_factory=list)


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
        self._late: list[tuple[float, list[tuple[int, bytes]]]] = []
        self._num_reads = 0

    def register(self, regions: Sequence[Region]) -> bytes:
        return self.inner.register(regions)

    def connect(self, descriptor: bytes) -> PeerName:
        return self.inner.connect(descriptor)

    def disconnect(self, peer: PeerName) -> None:
        self.inner.disconnect(peer)

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        self._num_reads += 1
        faults = self._faults.of_read(self._num_reads)
        kept = [_saved(copies[0])] if any(fault.kind == "drop_block" for fault in faults) else []
        handle = self.inner.read(peer, copies)
        now_s = self._now()
        end_s = now_s
        if self._link is not None:
            seconds = self._link.seconds(self._scale * sum(copy.num_bytes for copy in copies)) * self._dilation
            end_s = self._ledger.reserve([f"out {peer}", f"in {self._own_name}"], seconds, now_s)
        self._pending[id(handle)] = (handle, _Pending(end_s, copies, faults, started_s=now_s, kept=kept))
        return handle

    def poll(self) -> Sequence[Outcome]:
        now_s = self._now()
        self._deliver_late(now_s)
        for outcome in self.inner.poll():
            self._pending[id(outcome.handle)][1].outcome = outcome
        over = [
            (key, pending)
            for key, (_, pending) in self._pending.items()
            if pending.outcome is not None
            and (pending.outcome.state != "done" or pending.cancelled or now_s >= pending.end_s)
        ]
        return [self._end(key, pending, now_s) for key, pending in over]

    def cancel(self, handle: TransferHandle) -> None:
        if id(handle) in self._pending:
            self._pending[id(handle)][1].cancelled = True
        self.inner.cancel(handle)

    @property
    def num_active(self) -> int:
        return len(self._pending) + len(self._late)

    def progress(self) -> None:
        self.inner.progress()

    def close(self) -> None:
        self.inner.close()

    def _end(self, key: int, pending: _Pending, now_s: float) -> Outcome:
        del self._pending[key]
        outcome = pending.outcome
        assert outcome is not None
        if outcome.state != "done":
            return outcome
        error = self._harm(pending, now_s)
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
        error = ""
        for fault in pending.faults:
            first = pending.copies[0]
            if fault.kind == "corrupt_read":
                byte = ctypes.c_uint8.from_address(first.local + self._num_reads % first.num_bytes)
                byte.value ^= 1 << self._num_reads % 8
            elif fault.kind == "drop_block":
                for address, content in pending.kept:
                    ctypes.memmove(address, content, len(content))
            elif fault.kind == "late_block":
                late = _saved(first)
                ctypes.memset(first.local, 0, first.num_bytes)
                self._late.append((now_s + fault.seconds, [late]))
            elif fault.kind == "fail_read":
                error = "a fault was asked for"
            logger.warning("emulation.fault kind=%s read=%d", fault.kind, self._num_reads)
        return error

    def _deliver_late(self, now_s: float) -> None:
        due = [item for item in self._late if item[0] <= now_s]
        self._late = [item for item in self._late if item[0] > now_s]
        for _, contents in due:
            for address, content in contents:
                ctypes.memmove(address, content, len(content))


def _saved(copy: Copy) -> tuple[int, bytes]:
    return copy.local, ctypes.string_at(copy.local, copy.num_bytes)
