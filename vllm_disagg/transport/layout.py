"""Where the KV of blocks and heads lies in memory, and which copies bring one engine's to another's, whatever the
tensor and pipeline parallelism of the two.

Pure arithmetic on addresses. What one head keeps of one block is opaque: on CPU it is packed for the instruction set,
so tokens are never cut out, and a partly filled block moves whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from vllm_disagg.core.types import BlockIds
from vllm_disagg.errors import IncompatiblePeer
from vllm_disagg.transport.regions import CopyTable

Blocks = NDArray[np.int64]

NULL_BLOCK = 0
"""vLLM's block 0 is a placeholder that holds nothing (`BlockPool.null_block`)."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One rank's part of one array of blocks: a layer's KV cache, or its K or V half where those lie apart.

    What head `first_head + h` keeps of block `b` are `num_rows` runs of `row_bytes`, the r-th of them at
    `address + b * block_stride + h * head_stride + r * row_stride`. Where a head's bytes are in one piece there is one
    row; where tokens lie outside heads there is one for each token.

    Attributes:
        name: layer name, with the half where there are two; equal on all ranks and on both engines.
        address: of block 0.
        num_blocks: how many blocks there are.
        block_stride: bytes from one block to the next.
        first_head: the first of this rank's KV heads, counted over the whole model.
        num_heads: how many of them this rank holds, one after the other.
        head_stride: bytes from one head to the next; 0 where they cannot be told apart. The rows are then those of all
            heads together, and can only be read by a rank with the same heads.
        num_rows, row_stride, row_bytes: see above.
    """

    name: str
    address: int
    num_blocks: int
    block_stride: int
    first_head: int
    num_heads: int
    head_stride: int
    num_rows: int
    row_stride: int
    row_bytes: int

    @property
    def num_bytes(self) -> int:
        """From the first byte to the last, with whatever lies between."""
        strides = (self.num_blocks - 1) * self.block_stride + (self.num_rows - 1) * self.row_stride
        return strides + (self.num_heads - 1) * self.head_stride + self.row_bytes

    @property
    def end_head(self) -> int:
        """The first head after this rank's."""
        return self.first_head + self.num_heads

    @property
    def cell_bytes(self) -> int:
        """What one head keeps of one block; all heads, where they cannot be told apart."""
        return self.num_rows * self.row_bytes


class RankLayout(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One worker's KV cache: the segments of each KV cache group."""

    groups: tuple[tuple[Segment, ...], ...]
    device_id: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """What one of our segments takes from one of a peer's: in each block the same pieces, each of them its offset in
    our block, its offset in the peer's, and its length."""

    local: Segment
    remote: Segment
    pieces: tuple[tuple[int, int, int], ...]


Routes = tuple[tuple[Route, ...], ...]
"""All that one rank takes from one rank of a peer, for each KV cache group."""


def plan_routes(local: RankLayout, remotes: Sequence[RankLayout], *, spread: int = 0) -> dict[int, Routes]:
    """From which ranks of a peer one of our ranks reads what: every head of every layer it holds, once.

    Args:
        local: our rank's layout.
        remotes: those of all ranks of the peer.
        spread: chooses among ranks that hold the same; ranks with different numbers share the load.

    Returns:
        The routes from each remote rank that has to be read, by its index.

    Raises:
        IncompatiblePeer: the peer does not hold what we need, or it cannot be cut out of what it holds.
    """
    found: dict[int, list[list[Route]]] = {}
    for number, group in enumerate(local.groups):
        holders = _holders(number, len(local.groups), remotes)
        for segment in group:
            for index, route in _routes_of(segment, holders.get(segment.name, []), spread):
                found.setdefault(index, [[] for _ in local.groups])[number].append(route)
    return {index: tuple(tuple(group) for group in found[index]) for index in sorted(found)}


class ReadPlan:
    """What does not change between reads from one remote rank, worked out once.

    Args:
        routes: from that rank, by `plan_routes`.
    """

    def __init__(self, routes: Routes) -> None:
        self._groups = [_strips(group) for group in routes]

    def copies(self, local_blocks: BlockIds, remote_blocks: BlockIds) -> CopyTable:
        """The copies that fill `local_blocks` from `remote_blocks`, pairwise within each group.

        Neighbouring blocks that follow each other on both sides become one copy where they are read whole. The copies
        are in the order of our memory, so that all that follow each other on both sides, heads and layers too, are
        neighbours, and the transport can join them wherever one region holds both. Placeholder blocks are left out.

        Args:
            local_blocks: our block numbers, one tuple per group.
            remote_blocks: the peer's, as many in each group.

        Raises:
            ValueError: the block lists do not pair up, or a block number is outside its cache.
        """
        parts: list[NDArray[np.int64]] = []
        for group, mine, other in zip(self._groups, local_blocks, remote_blocks, strict=True):
            pairs = _pairs(mine, other)
            parts.extend(strip.copies(*pairs) for strip in group)
        table = np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
        return CopyTable(table[np.argsort(table[:, 0], kind="stable")])


def plan_reads(routes: Routes, local_blocks: BlockIds, remote_blocks: BlockIds) -> CopyTable:
    """`ReadPlan.copies` of a plan that is used once."""
    return ReadPlan(routes).copies(local_blocks, remote_blocks)


def describe_heads(layouts: Iterable[RankLayout]) -> list[list[object]]:
    """What an engine's KV cache is like, the same for each way to share it among ranks: for each segment of each group
    the number of all heads, and the bytes that each keeps of a block. Plain values, to be compared with a peer's."""
    heads: dict[tuple[int, str], tuple[int, int]] = {}
    for layout in layouts:
        for number, group in enumerate(layout.groups):
            for segment in group:
                most, _ = heads.get((number, segment.name), (0, 0))
                cell = segment.cell_bytes if segment.head_stride else 0
                heads[number, segment.name] = max(most, segment.end_head), cell
    return [[number, name, *heads[number, name]] for number, name in sorted(heads)]


_Holder = tuple[int, Segment]
"""A remote rank's index and what it holds."""


def _holders(number: int, num_groups: int, remotes: Sequence[RankLayout]) -> dict[str, list[_Holder]]:
    found: dict[str, list[_Holder]] = {}
    for index, remote in enumerate(remotes):
        if len(remote.groups) != num_groups:
            raise IncompatiblePeer("number of KV cache groups", ours=str(num_groups), theirs=str(len(remote.groups)))
        for segment in remote.groups[number]:
            found.setdefault(segment.name, []).append((index, segment))
    return found


def _routes_of(near: Segment, holders: Sequence[_Holder], spread: int) -> Iterator[tuple[int, Route]]:
    """Go through our heads, and take from one holder at a time as many as it has."""
    if not holders:
        raise IncompatiblePeer(f"KV cache of {near.name}", ours="present", theirs="absent")
    holders = _separable(near, holders)
    for _, far in holders:
        _check_cells(near, far)
    head = near.first_head
    while head < near.end_head:
        having = [(index, far) for index, far in holders if far.first_head <= head < far.end_head]
        if not having:
            raise IncompatiblePeer(
                f"KV heads of {near.name}",
                ours=_span(near),
                theirs=", ".join(sorted({_span(far) for _, far in holders})),
            )
        end = max(far.end_head for _, far in having)
        having = [(index, far) for index, far in having if far.end_head == end]
        index, far = having[spread % len(having)]
        end = min(end, near.end_head)
        yield index, Route(near, far, _pieces(near, far, head, end))
        head = end


def _separable(near: Segment, holders: Sequence[_Holder]) -> Sequence[_Holder]:
    """Those whose heads can be cut as we need them, or need not be cut."""
    heads = near.first_head, near.num_heads
    kept = [
        (index, far)
        for index, far in holders
        if (near.head_stride and far.head_stride) or (far.first_head, far.num_heads) == heads
    ]
    if not kept:
        raise IncompatiblePeer(
            "tensor parallel size",
            ours=f"such that a rank holds heads {_span(near)} of {near.name} inseparably",
            theirs=f"such that a rank holds heads {_span(holders[0][1])} inseparably",
        )
    return kept


def _check_cells(near: Segment, far: Segment) -> None:
    if near.cell_bytes != far.cell_bytes or bool(near.head_stride) != bool(far.head_stride):
        raise IncompatiblePeer(
            f"bytes per block of a KV head of {near.name}", ours=str(near.cell_bytes), theirs=str(far.cell_bytes)
        )
    if max(near.row_bytes, far.row_bytes) % min(near.row_bytes, far.row_bytes):
        raise IncompatiblePeer(
            f"bytes in one piece of a KV head of {near.name}", ours=str(near.row_bytes), theirs=str(far.row_bytes)
        )


def _pieces(near: Segment, far: Segment, first: int, end: int) -> tuple[tuple[int, int, int], ...]:
    """Where in a block the heads from `first` up to, not including, `end` lie on both sides, in as few pieces as can
    be."""
    size = min(near.row_bytes, far.row_bytes)
    heads = range(first, end) if near.head_stride else range(first, first + 1)
    places = sorted(
        (_offset(near, head, at), _offset(far, head, at)) for head in heads for at in range(0, near.cell_bytes, size)
    )
    pieces: list[tuple[int, int, int]] = []
    for local, remote in places:
        if pieces and (local, remote) == (pieces[-1][0] + pieces[-1][2], pieces[-1][1] + pieces[-1][2]):
            pieces[-1] = (*pieces[-1][:2], pieces[-1][2] + size)
        else:
            pieces.append((local, remote, size))
    return tuple(pieces)


def _offset(segment: Segment, head: int, at: int) -> int:
    """Of a head's byte `at`, from the beginning of its block."""
    row, inside = divmod(at, segment.row_bytes)
    return (head - segment.first_head) * segment.head_stride + row * segment.row_stride + inside


def _span(segment: Segment) -> str:
    last = segment.end_head - 1
    return f"{segment.first_head}-{last}" if last > segment.first_head else str(last)


def _pairs(mine: Sequence[int], other: Sequence[int]) -> tuple[Blocks, Blocks]:
    """Blocks to fill and to read, without placeholders."""
    if len(mine) != len(other):
        raise ValueError(f"{len(mine)} local blocks for {len(other)} remote ones")
    near, far = np.array(mine, np.int64), np.array(other, np.int64)
    real = (near != NULL_BLOCK) & (far != NULL_BLOCK)
    return near[real], far[real]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strips:
    """Pieces of one KV cache group, layer by layer, as arrays with a place for each: where it lies in block 0 on both
    sides, the bytes from block to block, and its length.

    Attributes:
        joins: whether each is a whole block on both sides, so that neighbouring blocks are one piece.
        num_local, num_remote: blocks that all of the caches have.
    """

    local: Blocks
    remote: Blocks
    local_stride: Blocks
    remote_stride: Blocks
    num_bytes: Blocks
    joins: bool
    num_local: int
    num_remote: int

    def copies(self, mine: Blocks, other: Blocks) -> NDArray[np.int64]:
        """Rows of `(local, remote, num_bytes)`."""
        outside = (np.minimum(mine, other) < 0) | (mine >= self.num_local) | (other >= self.num_remote)
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            raise ValueError(f"blocks {mine[at]} and {other[at]} lie outside the caches")
        counts = np.ones(len(mine), np.int64)
        if self.joins and len(mine):
            first = np.flatnonzero(np.concatenate(([True], (np.diff(mine) != 1) | (np.diff(other) != 1))))
            counts = np.diff(np.append(first, len(mine)))
            mine, other = mine[first], other[first]
        table = np.empty((len(self.local), len(mine), 3), np.int64)
        table[:, :, 0] = self.local[:, None] + self.local_stride[:, None] * mine
        table[:, :, 1] = self.remote[:, None] + self.remote_stride[:, None] * other
        table[:, :, 2] = self.num_bytes[:, None] * counts
        return table.reshape(-1, 3)


def _strips(group: Sequence[Route]) -> list[_Strips]:
    """The pieces of a group: those that are whole blocks, and the others."""
    found: list[_Strips] = []
    for joins in (True, False):
        routes = [route for route in group if _reads_whole_blocks(route) is joins]
        if not routes:
            continue
        rows = [
            (
                route.local.address + local,
                route.remote.address + remote,
                route.local.block_stride,
                route.remote.block_stride,
                num_bytes,
            )
            for route in routes
            for local, remote, num_bytes in route.pieces
        ]
        columns = np.array(rows, np.int64).reshape(-1, 5).T
        found.append(
            _Strips(
                local=columns[0],
                remote=columns[1],
                local_stride=columns[2],
                remote_stride=columns[3],
                num_bytes=columns[4],
                joins=joins,
                num_local=min(route.local.num_blocks for route in routes),
                num_remote=min(route.remote.num_blocks for route in routes),
            )
        )
    return found


def _reads_whole_blocks(route: Route) -> bool:
    size = route.local.block_stride
    return size == route.remote.block_stride and all(num_bytes == size for _, _, num_bytes in route.pieces)
