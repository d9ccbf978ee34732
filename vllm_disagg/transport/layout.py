"""Where the blocks of a KV cache lie in memory, and which copies bring one engine's blocks to another's.

Pure arithmetic on addresses. A block is opaque: on CPU its inside is packed for the instruction set, so whole blocks
move, the partly filled last one too.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_disagg.core.types import BlockIds
from vllm_disagg.errors import IncompatiblePeer
from vllm_disagg.transport.base import Copy

NULL_BLOCK = 0
"""vLLM's block 0 is a placeholder that holds nothing (`BlockPool.null_block`)."""


class Segment(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One array of blocks: a layer's KV cache, or its K or V half where those lie apart.

    Attributes:
        name: layer name, with the half where there are two; equal on both engines.
        address: of block 0.
        block_stride: bytes from one block to the next.
        block_bytes: bytes of one block's own data.
        num_blocks: how many blocks there are.
    """

    name: str
    address: int
    block_stride: int
    block_bytes: int
    num_blocks: int


class RankLayout(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One worker's KV cache: the segments of each KV cache group."""

    groups: tuple[tuple[Segment, ...], ...]
    device_id: int = 0


def check_same_shape(local: RankLayout, remote: RankLayout) -> None:
    """Refuse a peer whose blocks are cut otherwise than ours.

    Raises:
        IncompatiblePeer: another number of groups, other layers, or another block size in bytes.
    """
    ours, theirs = [_shape(group) for group in local.groups], [_shape(group) for group in remote.groups]
    if len(ours) != len(theirs):
        raise IncompatiblePeer("number of KV cache groups", ours=str(len(ours)), theirs=str(len(theirs)))
    for mine, other in zip(ours, theirs, strict=True):
        for name in [*mine, *(name for name in other if name not in mine)]:
            if mine.get(name) != other.get(name):
                raise IncompatiblePeer(
                    f"block bytes of {name}", ours=str(mine.get(name, "absent")), theirs=str(other.get(name, "absent"))
                )


def plan_reads(local: RankLayout, remote: RankLayout, local_blocks: BlockIds, remote_blocks: BlockIds) -> list[Copy]:
    """The copies that fill `local_blocks` from `remote_blocks`, pairwise within each group.

    Neighbouring blocks that follow each other on both sides become one copy. Placeholder blocks are left out.

    Args:
        local: our layout; same shape as `remote` (`check_same_shape`).
        remote: the peer's layout.
        local_blocks: our block numbers, one tuple per group.
        remote_blocks: the peer's, as many in each group.

    Raises:
        ValueError: the block lists do not pair up, or a block number is outside its cache.
    """
    copies: list[Copy] = []
    for ours, theirs, mine, other in zip(local.groups, remote.groups, local_blocks, remote_blocks, strict=True):
        runs = _runs(mine, other)
        far = {segment.name: segment for segment in theirs}
        for segment in ours:
            copies.extend(_copies(segment, far[segment.name], runs))
    return copies


def _shape(group: Sequence[Segment]) -> dict[str, int]:
    return {segment.name: segment.block_bytes for segment in group}


def _runs(mine: Sequence[int], other: Sequence[int]) -> list[tuple[int, int, int]]:
    """Join pairs of blocks into runs `(first local, first remote, length)`."""
    if len(mine) != len(other):
        raise ValueError(f"{len(mine)} local blocks for {len(other)} remote ones")
    runs: list[tuple[int, int, int]] = []
    for near, far in zip(mine, other, strict=True):
        if NULL_BLOCK in (near, far):
            continue
        if runs and near == runs[-1][0] + runs[-1][2] and far == runs[-1][1] + runs[-1][2]:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((near, far, 1))
    return runs


def _copies(near: Segment, far: Segment, runs: Sequence[tuple[int, int, int]]) -> list[Copy]:
    dense = near.block_stride == near.block_bytes and far.block_stride == far.block_bytes
    copies: list[Copy] = []
    for local, remote, length in runs:
        if local + length > near.num_blocks or remote + length > far.num_blocks or min(local, remote) < 0:
            raise ValueError(f"blocks {local} and {remote} (+{length}) lie outside the caches")
        pieces = [(0, length)] if dense else [(index, 1) for index in range(length)]
        for first, count in pieces:
            copies.append(
                Copy(
                    near.address + (local + first) * near.block_stride,
                    far.address + (remote + first) * far.block_stride,
                    count * near.block_bytes,
                )
            )
    return copies
