"""The worker half: tells where this worker's KV cache lies, and hands the step's reads to the worker's thread."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_disagg.config import EngineSettings
from vllm_disagg.connector.digests import Digester, device_reader, host_reader
from vllm_disagg.connector.metadata import StepMetadata, WorkerMetadata
from vllm_disagg.connector.probe_memory import PROBE_BYTES, ProbeMemory
from vllm_disagg.connector.secure import curve_keys
from vllm_disagg.connector.worker_thread import WorkerThread
from vllm_disagg.core.keys import derive
from vllm_disagg.core.types import EngineId
from vllm_disagg.transport import choose_transport, open_transport
from vllm_disagg.transport.base import MemoryKind, Region, Transport
from vllm_disagg.transport.layout import RankLayout, Segment

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TransportWrapper = Callable[[Transport], Transport]


class WorkerSide:
    """One worker of an engine with a role. All methods run on the worker's main thread.

    Args:
        settings: the engine's settings.
        engine_id: this run of this engine.
        key: the deployment key.
        groups: layer names of each KV cache group.
        heads: the model's KV heads that this rank holds, in each group.
        num_blocks: blocks in each layer's KV cache.
    """

    def __init__(
        self,
        *,
        settings: EngineSettings,
        engine_id: EngineId,
        key: bytes,
        groups: tuple[tuple[str, ...], ...],
        heads: tuple[range, ...],
        num_blocks: int,
    ) -> None:
        self._settings, self._engine_id, self._key = settings, engine_id, key
        self._groups, self._heads, self._num_blocks = groups, heads, num_blocks
        self._thread: WorkerThread | None = None
        self._metadata: WorkerMetadata | None = None
        self._wrap: TransportWrapper | None = None

    def wrap_transport(self, wrap: TransportWrapper) -> None:
        """Use what `wrap` makes of the transport, instead of the transport itself. Before `register`."""
        self._wrap = wrap

    def register(self, kv_caches: Mapping[str, torch.Tensor], *, pp_rank: int, tp_rank: int, isa: str) -> None:
        """Register the KV cache and start serving it.

        Args:
            kv_caches: layer name to its KV cache tensor.
            pp_rank, tp_rank: this worker's place in its engine.
            isa: instruction set that packs CPU blocks, or the platform's name elsewhere.

        Raises:
            TransportError: the transport cannot be opened or refuses the memory.
        """
        import torch

        tensors = {name: kv_caches[name] for group in self._groups for name in group}
        device = next(iter(tensors.values())).device
        layout = RankLayout(
            groups=tuple(
                tuple(
                    segment for name in group for segment in segments_of(name, tensors[name], self._num_blocks, heads)
                )
                for group, heads in zip(self._groups, self._heads, strict=True)
            ),
            device_id=device.index or 0,
        )
        transport_name, why = choose_transport(self._settings.transport)
        if self._settings.transport == "auto" and (pp_rank, tp_rank) == (0, 0):
            logger.info("transport.chosen transport=%s because=%r", transport_name, why)
        memory: MemoryKind = "DRAM" if device.type == "cpu" else "VRAM"
        probe = ProbeMemory(torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device))
        regions = [*_regions(layout), probe.region]

        def opened() -> tuple[Transport, bytes]:
            name = f"{self._engine_id}/pp{pp_rank}tp{tp_rank}"
            host = self._settings.control_host
            transport = open_transport(transport_name, name, memory=memory, host=host)
            transport = transport if self._wrap is None else self._wrap(transport)
            return transport, transport.register(regions)

        # Among ranks that hold the same, each rank of each decode engine starts counting elsewhere.
        spread = zlib.crc32(self._engine_id.encode()) + tp_rank
        read = host_reader if memory == "DRAM" else device_reader(list(tensors.values()))
        digester = Digester(layout=layout, key=derive(self._key, "kv-digest"), read=read)
        self._thread = WorkerThread(
            open_transport=opened,
            layout=layout,
            keys=curve_keys(self._key),
            digester=digester,
            spread=spread,
            probe=probe,
            stall_s=self._settings.stall_s,
        )
        descriptor = self._thread.start()
        self._metadata = WorkerMetadata(
            descriptor=descriptor,
            layout=layout,
            link=self._thread.endpoint,
            isa=isa,
            transport=transport_name,
            probe=probe.region,
        )

    @property
    def metadata(self) -> WorkerMetadata | None:
        """What the engine's core must know of this worker; None before `register`."""
        return self._metadata

    def begin_reads(self, metadata: Any) -> None:
        """Start this step's reads; returns at once."""
        if self._thread is not None and isinstance(metadata, StepMetadata):
            for job in metadata.reads:
                self._thread.submit(job)

    def shutdown(self) -> None:
        """End the thread and give the memory back. Idempotent."""
        if self._thread is not None:
            self._thread.stop()


def segments_of(name: str, tensor: torch.Tensor, num_blocks: int, heads: range) -> list[Segment]:
    """Tell where the blocks and heads of a layer's KV cache lie.

    vLLM's tensors have the dimensions blocks, heads, tokens, content, in whatever order of strides; where a kernel has
    smaller blocks than the cache, several of its blocks make one. In other tensors the largest dimension of
    `num_blocks` counts blocks, and those outside it (the K and V halves of some backends) make several segments.

    Args:
        name: the layer's name.
        tensor: its KV cache, a strided view.
        num_blocks: blocks of the cache.
        heads: the model's KV heads that this rank holds.

    Raises:
        ValueError: no dimension counts blocks, or what a head keeps of a block is in too many pieces.
    """
    shape = tuple(tensor.shape)
    strides = [stride * tensor.element_size() for stride in tensor.stride()]
    block_dim = _block_dim(name, shape, strides, num_blocks)
    parts = shape[block_dim] // num_blocks
    block_stride = parts * strides[block_dim]
    head_dim = 1 if _is_vllms(shape, num_blocks) and shape[1] == len(heads) else None
    axes = [(strides[dim], shape[dim]) for dim in range(len(shape)) if dim not in (block_dim, head_dim)]
    axes.append((strides[block_dim], parts))
    inner = sorted(axis for axis in axes if axis[0] < block_stride and axis[1] > 1)
    row_bytes, outside = _joined(tensor.element_size(), inner)
    row_stride = outside[0][0] if outside else row_bytes
    rows_bytes, left = _joined(row_stride, outside)
    if left:
        raise ValueError(f"the blocks of {name} are in too many pieces: shape {shape}, strides {strides} bytes")
    offsets = [0]
    for stride, length in sorted((axis for axis in axes if axis[0] >= block_stride and axis[1] > 1), reverse=True):
        offsets = [offset + index * stride for offset in offsets for index in range(length)]
    return [
        Segment(
            name=name if len(offsets) == 1 else f"{name}#{index}",
            address=tensor.data_ptr() + offset,
            num_blocks=num_blocks,
            block_stride=block_stride,
            first_head=heads.start,
            num_heads=len(heads),
            head_stride=block_stride if len(heads) == 1 else 0 if head_dim is None else strides[head_dim],
            num_rows=rows_bytes // row_stride,
            row_stride=row_stride,
            row_bytes=row_bytes,
        )
        for index, offset in enumerate(offsets)
    ]


def _block_dim(name: str, shape: tuple[int, ...], strides: list[int], num_blocks: int) -> int:
    if _is_vllms(shape, num_blocks):
        return 0
    candidates = [dim for dim, length in enumerate(shape) if length == num_blocks]
    if not candidates:
        raise ValueError(f"the KV cache of {name} has shape {shape}, and no dimension of {num_blocks} blocks")
    return max(candidates, key=lambda dim: strides[dim])


def _is_vllms(shape: tuple[int, ...], num_blocks: int) -> bool:
    return len(shape) == 4 and shape[0] > 0 and shape[0] % num_blocks == 0


def _joined(size: int, axes: list[tuple[int, int]]) -> tuple[int, list[tuple[int, int]]]:
    """Put dimensions `(stride, length)`, the innermost first, together while each begins where the one inside it ends.
    Returns what they span, and those left over."""
    for at, (stride, length) in enumerate(axes):
        if stride != size:
            return size, axes[at:]
        size *= length
    return size, []


def _regions(layout: RankLayout) -> list[Region]:
    """The memory to register: each run of bytes once, also where layers share one or lie among each other."""
    spans = sorted(
        (segment.address, segment.address + segment.num_bytes) for group in layout.groups for segment in group
    )
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and begin < joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return [Region(address=begin, num_bytes=end - begin, device_id=layout.device_id) for begin, end in joined]
