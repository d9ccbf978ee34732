"""The worker half: tells where this worker's KV cache lies, and hands the step's reads to the worker's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_disagg.config import EngineSettings
from vllm_disagg.connector.metadata import StepMetadata, WorkerMetadata
from vllm_disagg.connector.secure import curve_keys
from vllm_disagg.connector.worker_thread import WorkerThread
from vllm_disagg.core.types import EngineId
from vllm_disagg.transport import open_transport
from vllm_disagg.transport.base import MemoryKind, Region, Transport
from vllm_disagg.transport.layout import RankLayout, Segment

if TYPE_CHECKING:
    import torch

TransportWrapper = Callable[[Transport], Transport]


class WorkerSide:
    """One worker of an engine with a role. All methods run on the worker's main thread.

    Args:
        settings: the engine's settings.
        engine_id: this run of this engine.
        key: the deployment key.
        groups: layer names of each KV cache group.
        num_blocks: blocks in each layer's KV cache.
    """

    def __init__(
        self,
        *,
        settings: EngineSettings,
        engine_id: EngineId,
        key: bytes,
        groups: tuple[tuple[str, ...], ...],
        num_blocks: int,
    ) -> None:
        self._settings, self._engine_id, self._key = settings, engine_id, key
        self._groups, self._num_blocks = groups, num_blocks
        self._thread: WorkerThread | None = None
        self._metadata: WorkerMetadata | None = None
        self._wrap: TransportWrapper | None = None

    def wrap_transport(self, wrap: TransportWrapper) -> None:
        """Use what `wrap` makes of the transport, instead of the transport itself. Before `register`."""
        self._wrap = wrap

    def register(self, kv_caches: Mapping[str, torch.Tensor], *, rank: str, isa: str) -> None:
        """Register the KV cache and start serving it.

        Args:
            kv_caches: layer name to its KV cache tensor.
            rank: this worker's place in its engine, for the transport's name.
            isa: instruction set that packs CPU blocks, or the platform's name elsewhere.

        Raises:
            TransportError: the transport cannot be opened or refuses the memory.
        """
        tensors = {name: kv_caches[name] for group in self._groups for name in group}
        device = next(iter(tensors.values())).device
        layout = RankLayout(
            groups=tuple(
                tuple(segment for name in group for segment in segments_of(name, tensors[name], self._num_blocks))
                for group in self._groups
            ),
            device_id=device.index or 0,
        )
        memory: MemoryKind = "DRAM" if device.type == "cpu" else "VRAM"
        regions = _regions(layout)

        def opened() -> tuple[Transport, bytes]:
            transport = open_transport(self._settings.transport, f"{self._engine_id}/{rank}", memory=memory)
            transport = transport if self._wrap is None else self._wrap(transport)
            return transport, transport.register(regions)

        self._thread = WorkerThread(open_transport=opened, layout=layout, keys=curve_keys(self._key))
        descriptor = self._thread.start()
        self._metadata = WorkerMetadata(descriptor=descriptor, layout=layout, link=self._thread.endpoint, isa=isa)

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


def segments_of(name: str, tensor: torch.Tensor, num_blocks: int) -> list[Segment]:
    """Cut a layer's KV cache into arrays of blocks.

    Whatever order its dimensions have, the one of length `num_blocks` counts blocks; dimensions with larger strides
    (the K and V halves of some backends) make several arrays, the rest must lie densely inside a block.

    Args:
        name: the layer's name.
        tensor: its KV cache, a strided view with one dimension of `num_blocks`.
        num_blocks: blocks of the cache.

    Raises:
        ValueError: the tensor has no such dimension, or a block is not dense.
    """
    shape, strides, itemsize = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    candidates = [dim for dim, length in enumerate(shape) if length == num_blocks]
    if not candidates:
        raise ValueError(f"the KV cache of {name} has shape {shape}, and no dimension of {num_blocks} blocks")
    block_dim = max(candidates, key=lambda dim: strides[dim])
    outer = [dim for dim in range(len(shape)) if dim != block_dim and strides[dim] >= strides[block_dim] * num_blocks]
    inner = [dim for dim in range(len(shape)) if dim != block_dim and dim not in outer and shape[dim] > 1]
    block_elements = 1
    for dim in inner:
        block_elements *= shape[dim]
    span = 1 + sum((shape[dim] - 1) * strides[dim] for dim in inner)
    if span != block_elements or strides[block_dim] < block_elements:
        raise ValueError(f"the blocks of {name} are not dense: shape {shape}, strides {strides}")
    offsets = [0]
    for dim in outer:
        offsets = [offset + index * strides[dim] for offset in offsets for index in range(shape[dim])]
    return [
        Segment(
            name=name if len(offsets) == 1 else f"{name}#{index}",
            address=tensor.data_ptr() + offset * itemsize,
            block_stride=strides[block_dim] * itemsize,
            block_bytes=block_elements * itemsize,
            num_blocks=num_blocks,
        )
        for index, offset in enumerate(offsets)
    ]


def _regions(layout: RankLayout) -> list[Region]:
    """The memory to register: each array once, also where layers share one."""
    regions = {
        Region(
            address=segment.address,
            num_bytes=(segment.num_blocks - 1) * segment.block_stride + segment.block_bytes,
            device_id=layout.device_id,
        )
        for group in layout.groups
        for segment in group
    }
    return sorted(regions, key=lambda region: region.address)
