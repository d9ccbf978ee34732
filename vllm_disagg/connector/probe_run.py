"""A worker's part of a probe: reads from each worker of a peer that it takes KV from, timed and checked.

It runs on the worker's thread, between its other work: one read at a time, and never more than some milliseconds of its
own. It uses the connections that requests use, and its own memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_disagg.connector.probe_memory import PROBE_BYTES, ProbeMemory
from vllm_disagg.core.probe import ReadTiming, SourceReport, WorkerReport
from vllm_disagg.errors import TransportError
from vllm_disagg.transport.base import Copy, Outcome, PeerName, Region, TransferHandle, Transport

SIZES = (16 << 20, 1 << 20, 64 << 10, 16 << 10, 4 << 10)
"""Bytes of one copy, from what a long prompt's neighbouring blocks make to one block of one layer."""

RUN_LIMIT_S = 15.0
_MAX_COPIES = 1024
_REPEATS = 3
_SOURCE_LIMIT_S = 3.0
"""After this long no measurement of a source is repeated, so that a slow link is not kept busy."""

_CHECKED = (16 << 20, 64 << 10)
"""Copies of these sizes cover the whole memory, in one piece and in another order: the bytes are compared."""


@dataclass(frozen=True, slots=True)
class ProbeSource:
    """A worker of the peer, the memory it offers to probes, and the digest of what lies there."""

    name: PeerName
    region: Region
    digest: bytes


_Plan = Generator[Sequence[Copy] | None, Outcome | None, None]
"""Yields copies and gets their outcome, or yields None to let the thread do its other work."""


@dataclass(slots=True)
class _Found:
    """What reading from one source has shown so far."""

    first_read_s: float = 0.0
    timings: list[ReadTiming] = field(default_factory=list)
    intact: list[bool] = field(default_factory=list)
    error: str = ""


class _Stopped(Exception):
    """A read failed, or time is up."""


class ProbeRun:
    """One probe. Its owner calls `step` while `wants_turn`, and `ended` with the outcome of `handle`.

    Args:
        transport: the worker's.
        memory: its own.
        sources: whom to read from, one after the other.
        on_done: takes the report, once.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        memory: ProbeMemory,
        sources: Sequence[ProbeSource],
        on_done: Callable[[WorkerReport], None],
    ) -> None:
        self._transport, self._memory, self._sources = transport, memory, sources
        self._on_done = on_done
        self._reports: list[SourceReport] = []
        self._copy_bytes_per_s = 0.0
        self._deadline_s = time.monotonic() + RUN_LIMIT_S
        self._reading: ProbeSource | None = None
        self._plan = self._all()
        self.handle: TransferHandle | None = None
        self.is_over = False

    @property
    def wants_turn(self) -> bool:
        """Whether it can go on without waiting."""
        return not self.is_over and self.handle is None

    def step(self) -> None:
        """Go on until the next read has begun, or for a moment."""
        self._advance(None)

    def ended(self, outcome: Outcome) -> None:
        """Its read has ended."""
        self.handle = None
        self._advance(outcome)

    def keep_time(self) -> None:
        """Give up a read that takes too long. It still ends through the transport."""
        if self.handle is not None and time.monotonic() >= self._deadline_s:
            self._transport.cancel(self.handle)

    def _advance(self, outcome: Outcome | None) -> None:
        error = ""
        try:
            copies = self._plan.send(outcome)
            if copies is not None:
                assert self._reading is not None
                # A modelled link is left out: it would take the time of KV of full size.
                read = getattr(self._transport, "read_unmodelled", self._transport.read)
                self.handle = read(self._reading.name, copies)
            return
        except StopIteration:
            pass
        except Exception as failure:  # a probe that fails tells so, and nothing else does
            error = str(failure) or type(failure).__name__
        self.is_over = True
        self._on_done(
            WorkerReport(
                sources=tuple(self._reports),
                copy_bytes_per_s=self._copy_bytes_per_s,
                error=error,
            )
        )

    def _all(self) -> _Plan:
        self._memory.clear()  # touches its pages, so that their first use is not measured
        yield None
        self._copy_bytes_per_s = self._memory.copy_bytes_per_s()
        yield None
        for source in self._sources:
            self._reading = source
            yield from self._of(source)

    def _of(self, source: ProbeSource) -> _Plan:
        found = _Found()
        try:
            yield from self._measure(source, found)
        except _Stopped as stopped:
            found.error = str(stopped)
        self._reports.append(
            SourceReport(
                peer=source.name,
                **_wire(self._transport, source.name),
                first_read_s=found.first_read_s,
                reads=tuple(found.timings),
                intact=len(found.intact) == len(_CHECKED) and all(found.intact),
                error=found.error,
            )
        )

    def _measure(self, source: ProbeSource, found: _Found) -> _Plan:
        found.first_read_s = yield from self._read(self._copies(source, min(SIZES))[:1])
        begun_s = time.monotonic()
        for size in SIZES:
            copies, seconds = self._copies(source, size), list[float]()
            if size in _CHECKED:
                self._memory.clear()
                yield None
                seconds.append((yield from self._read(copies)))
                digest = yield from self._digest(size)
                found.intact.append(digest == source.digest)
            while len(seconds) < (_REPEATS if time.monotonic() - begun_s < _SOURCE_LIMIT_S else 1):
                seconds.append((yield from self._read(copies)))
            found.timings.append(
                ReadTiming(copy_bytes=size, num_copies=len(copies), seconds=statistics.median(seconds))
            )

    def _digest(self, piece: int) -> Generator[Sequence[Copy] | None, Outcome | None, bytes]:
        steps = self._memory.digesting(piece)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return bytes(end.value)
            yield None

    def _read(self, copies: Sequence[Copy]) -> Generator[Sequence[Copy] | None, Outcome | None, float]:
        if time.monotonic() >= self._deadline_s:
            raise _Stopped(f"time was up after {RUN_LIMIT_S:g} s")
        outcome = yield copies
        assert outcome is not None
        if outcome.state == "cancelled":
            raise _Stopped(
                f"a read of {outcome.num_bytes} bytes was not over when time was up, after {RUN_LIMIT_S:g} s"
            )
        if outcome.state != "done":
            raise _Stopped(outcome.error or outcome.state)
        return outcome.seconds

    def _copies(self, source: ProbeSource, size: int) -> list[Copy]:
        """Pieces of that size, the peer's from the first to the last, ours the other way round: none follows another
        one on both sides, so that the transport joins none of them. No more than `_MAX_COPIES`."""
        near, far = self._memory.region, source.region
        total = PROBE_BYTES // size
        return [
            Copy(near.address + (total - 1 - index) * size, far.address + index * size, size)
            for index in range(min(total, _MAX_COPIES))
        ]


def _wire(transport: Transport, peer: PeerName) -> dict[str, Any]:
    """What the transport says of its wire to that peer, as far as it can."""
    try:
        wire: Any = getattr(transport, "wire")(peer)  # noqa: B009 - not every transport tells
    except (AttributeError, TransportError):
        return {}
    return {
        "wire": wire.wire, "carrier": wire.transport, "sent_by_owner": wire.sent_by_owner, "evidence": wire.evidence,
    }  # fmt: skip
