"""Digests of KV blocks in this worker's memory, made on a thread of their own: they take time that neither reads nor
the serving of peers can spare.

SHA-256 under a key of the deployment and the hold, cut to 64 bits and added up (`core.verify`). Without the key nobody
can change bytes on their way so that the sums stay the same, but by luck once in 2^64.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_disagg.core.types import TransferId
from vllm_disagg.core.verify import DigestJob, HeadSums, packed
from vllm_disagg.transport.layout import RankLayout, Segment

logger = logging.getLogger(__name__)

Reader = Callable[[int, int], memoryview]
"""The bytes at an address of this worker's KV cache, as host memory."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Digested:
    """Its end. `error` is empty if all went well."""

    transfer_id: TransferId
    sums: tuple[HeadSums, ...]
    error: str = ""


class Digester:
    """Makes digests, one job after the other. The thread starts with the first one.

    Args:
        layout: this worker's KV cache.
        key: the deployment key.
        read: gives its bytes.
    """

    def __init__(self, *, layout: RankLayout, key: bytes, read: Reader) -> None:
        self._layout, self._key, self._read = layout, key, read
        self._jobs: queue.SimpleQueue[tuple[DigestJob, Callable[[Digested], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: DigestJob, done: Callable[[Digested], None]) -> None:
        """Start a job; `done` is called on the digester's thread, once, whatever happens."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="disagg-digest", daemon=True)
            self._thread.start()
        self._jobs.put((job, done))

    def stop(self) -> None:
        """End the thread, after the job under way. Idempotent."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=5.0)
            self._thread = None

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            try:
                result = Digested(job.transfer_id, digest(self._layout, self._key, self._read, job))
            except Exception as error:  # told to whoever waits for it: nothing may be taken for compared
                logger.exception("digest.failed transfer=%s", job.transfer_id)
                result = Digested(job.transfer_id, (), f"digest: {error!r}")
            done(result)


def digest(layout: RankLayout, key: bytes, read: Reader, job: DigestJob) -> tuple[HeadSums, ...]:
    """The sums over this worker's layers of each of its heads, for each block of a job."""
    totals: dict[tuple[int, int], list[int]] = {}
    marks = [place.to_bytes(8, "little") for place in job.places]
    for group, (segments, blocks) in enumerate(zip(layout.groups, job.blocks, strict=True)):
        for segment in segments:
            heads = range(segment.num_heads if segment.head_stride else 1)
            names = [f"\0{job.nonce}\0{segment.name}\0{segment.first_head + head}\0" for head in heads]
            begun = [hashlib.sha256(key + name.encode()) for name in names]
            sums = [totals.setdefault((group, segment.first_head + head), [0] * len(marks)) for head in heads]
            for index, (mark, block) in enumerate(zip(marks, blocks, strict=True)):
                span = _block(segment, read, block)
                for head in heads:
                    cell = begun[head].copy()
                    cell.update(mark)
                    for row in _rows(segment, span, head):
                        cell.update(row)
                    number = int.from_bytes(cell.digest()[:8], "little")
                    sums[head][index] = (sums[head][index] + number) & _MASK
    return tuple(HeadSums(group, head, packed(sums)) for (group, head), sums in sorted(totals.items()))


def host_reader(address: int, num_bytes: int) -> memoryview:
    """Bytes of this process's own memory, in place."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def device_reader(tensors: Sequence[Any]) -> Reader:
    """Bytes of accelerator memory, copied to the host. Not yet run on a GPU.

    Args:
        tensors: the KV caches; every address that is asked for lies in the storage of one of them.
    """
    import torch

    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        storages[storage.data_ptr()] = flat

    def read(address: int, num_bytes: int) -> memoryview:
        for begin, flat in storages.items():
            if begin <= address and address + num_bytes <= begin + flat.numel():
                found = flat[address - begin : address - begin + num_bytes].cpu().numpy()
                return memoryview(found)
        raise ValueError(f"address {address} is in no KV cache")

    return read


def _block(segment: Segment, read: Reader, block: int) -> memoryview:
    """From a block's first byte to its last."""
    if not 0 <= block < segment.num_blocks:
        raise ValueError(f"block {block} lies outside the {segment.num_blocks} of {segment.name}")
    last_head = (segment.num_heads - 1) * segment.head_stride
    return read(segment.address + block * segment.block_stride, last_head + _row_span(segment))


def _rows(segment: Segment, span: memoryview, head: int) -> list[memoryview]:
    """One head's bytes of a block, in their order; in one piece where they are."""
    at = head * segment.head_stride
    if segment.row_stride == segment.row_bytes:
        return [span[at : at + _row_span(segment)]]
    starts = range(at, at + segment.num_rows * segment.row_stride, segment.row_stride)
    return [span[start : start + segment.row_bytes] for start in starts]


def _row_span(segment: Segment) -> int:
    return (segment.num_rows - 1) * segment.row_stride + segment.row_bytes
