"""Bounds of registered memory, and the copies of a read checked against them. Pure arithmetic on addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from vllm_disagg.errors import TransportError
from vllm_disagg.transport.base import Copy, Region

Addresses = NDArray[np.uint64]

ADDRESS_LIMIT = 2**63
"""Addresses and lengths lie below it, so that their sums do not overflow."""


class RegionTable:
    """The regions of one transport, to find the one a run of bytes lies in.

    Raises:
        TransportError: there is no region, or one is empty, overlaps another or lies outside the address space.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        ordered = sorted(set(regions), key=lambda region: region.address)
        if not ordered:
            raise TransportError("no memory to register: give at least one region")
        for region in ordered:
            if region.num_bytes <= 0 or region.address < 0 or region.address + region.num_bytes >= ADDRESS_LIMIT:
                raise TransportError(f"{region} is empty or outside the address space")
        for one, following in pairwise(ordered):
            if one.address + one.num_bytes > following.address:
                raise TransportError(f"{following} overlaps {one}: register each run of memory once")
        self.regions = tuple(ordered)
        self._starts = np.array([region.address for region in ordered], np.uint64)
        self._ends = np.array([region.address + region.num_bytes for region in ordered], np.uint64)
        self.device_ids = np.array([region.device_id for region in ordered], np.uint64)

    def find(self, starts: Addresses, sizes: Addresses, *, whose: str) -> NDArray[np.intp]:
        """The region index of each run.

        Raises:
            TransportError: a run is not inside one region; the text names it and `whose` memory was meant.
        """
        index = np.searchsorted(self._starts, starts, side="right") - 1
        outside = (index < 0) | (starts + sizes > self._ends[index])
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise TransportError(
                f"copy {at} of the read, {int(sizes[at])} bytes at {int(starts[at]):#x}, is not in {whose} regions"
            )
        return index


class CopyTable(Sequence[Copy]):
    """Copies as rows of `(local, remote, num_bytes)`: tens of thousands of them cost no object each.

    Args:
        rows: `[num_copies, 3]`.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: NDArray[np.int64]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Copy: ...
    @overload
    def __getitem__(self, index: slice) -> CopyTable: ...
    def __getitem__(self, index: int | slice) -> Copy | CopyTable:
        if isinstance(index, slice):
            return CopyTable(self.rows[index])
        return Copy(*self.rows[index].tolist())

    def __iter__(self) -> Iterator[Copy]:
        return (Copy(*row) for row in self.rows.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Copies of one read as parallel arrays."""

    local: Addresses
    remote: Addresses
    num_bytes: Addresses
    local_device: Addresses
    remote_device: Addresses

    def __len__(self) -> int:
        return len(self.local)

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return int(self.num_bytes.sum())

    def part(self, begin: int, end: int) -> Runs:
        """The copies from `begin` up to, not including, `end`."""
        cut = slice(begin, end)
        return Runs(
            local=self.local[cut],
            remote=self.remote[cut],
            num_bytes=self.num_bytes[cut],
            local_device=self.local_device[cut],
            remote_device=self.remote_device[cut],
        )


def plan_copies(copies: Sequence[Copy], *, ours: RegionTable, theirs: RegionTable, max_bytes: int) -> Runs:
    """Check the copies of a read and make as few of them as possible.

    Neighbours that follow each other on both sides become one, unless a region ends between them. Then none is left
    longer than `max_bytes`.

    Raises:
        TransportError: there are none, one is empty, or one leaves a region.
    """
    local, remote, num_bytes = _columns(copies)
    local_region = ours.find(local, num_bytes, whose="our own")
    remote_region = theirs.find(remote, num_bytes, whose="the peer's")
    follows = (
        (local[1:] == local[:-1] + num_bytes[:-1])
        & (remote[1:] == remote[:-1] + num_bytes[:-1])
        & (local_region[1:] == local_region[:-1])
        & (remote_region[1:] == remote_region[:-1])
    )
    first = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    joined = Runs(
        local=local[first],
        remote=remote[first],
        num_bytes=np.add.reduceat(num_bytes, first),
        local_device=ours.device_ids[local_region[first]],
        remote_device=theirs.device_ids[remote_region[first]],
    )
    return _cut(joined, max_bytes)


def batches(runs: Runs, *, max_bytes: int, max_copies: int) -> list[Runs]:
    """Cut a read into consecutive parts of at most `max_bytes` and `max_copies` each. No copy is longer than that."""
    ends = np.cumsum(runs.num_bytes)
    parts, begin, done = [], 0, 0
    while begin < len(runs):
        end = min(int(np.searchsorted(ends, done + max_bytes, side="right")), begin + max_copies)
        parts.append(runs.part(begin, end))
        begin, done = end, int(ends[end - 1])
    return parts


def _columns(copies: Sequence[Copy]) -> tuple[Addresses, Addresses, Addresses]:
    if not copies:
        raise TransportError("a read needs at least one copy")
    if isinstance(copies, CopyTable):
        table = copies.rows
    else:
        try:
            table = np.array([(copy.local, copy.remote, copy.num_bytes) for copy in copies], np.int64)
        except OverflowError:
            raise TransportError("a copy of the read lies outside the address space") from None
    if table.min() < 0 or table[:, 2].min() == 0:
        raise TransportError("a copy of the read is empty or has a negative address or length")
    local, remote, num_bytes = table.astype(np.uint64).T
    return local, remote, num_bytes


def _cut(runs: Runs, max_bytes: int) -> Runs:
    if int(runs.num_bytes.max()) <= max_bytes:
        return runs
    pieces = -(-runs.num_bytes.astype(np.int64) // max_bytes)
    owner = np.repeat(np.arange(len(runs)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = (number * max_bytes).astype(np.uint64)
    return Runs(
        local=runs.local[owner] + offset,
        remote=runs.remote[owner] + offset,
        num_bytes=np.minimum(runs.num_bytes[owner] - offset, np.uint64(max_bytes)),
        local_device=runs.local_device[owner],
        remote_device=runs.remote_device[owner],
    )
