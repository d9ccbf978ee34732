"""A piece of memory beside the KV cache that probes read and write, so that no probe ever touches the KV cache.

Every worker registers one with its transport. Until somebody probes, nobody writes to it, and on a CPU its pages take
no memory.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vllm_disagg.transport.base import Region

if TYPE_CHECKING:
    import torch

PROBE_BYTES = 16 * 1024 * 1024
_PIECE = 1024 * 1024

T = TypeVar("T")


def last(steps: Generator[None, None, T]) -> T:
    """Run a generator to its end without pauses, for what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class ProbeMemory:
    """One worker's. The owner's side fills it once, with random bytes; the reader's side clears it before each read.

    Args:
        tensor: bytes, contiguous, on the device of the KV cache. On an accelerator **not yet run**.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._on_host = tensor.device.type == "cpu"
        self._host: NDArray[np.uint8] | None = tensor.numpy() if self._on_host else None
        self._owned: bytes | None = None
        self.region = Region(
            address=tensor.data_ptr(),
            num_bytes=tensor.numel(),
            device_id=0 if self._on_host else tensor.device.index or 0,
        )

    def fill(self) -> bytes:
        """Give it content, the first time: random, and nowhere the same. Returns the content's digest."""
        if self._owned is None:
            base = np.random.default_rng().integers(0, 256, _PIECE, np.uint8)
            for number in range(self.region.num_bytes // _PIECE):
                self._write(number * _PIECE, base ^ np.uint8(number))
            self._owned = last(self.digesting())
        return self._owned

    def clear(self) -> None:
        """Forget what was read here."""
        if self._host is not None:
            self._host.fill(0)
        else:
            self._tensor.zero_()
            self._synchronize()

    def digesting(self, piece: int = PROBE_BYTES) -> Generator[None, None, bytes]:
        """Digest the bytes as they are now, pieces of that size from the last to the first. Pauses every MiB."""
        digest, content, size = hashlib.sha256(), self._read(), min(piece, _PIECE)
        done = 0
        for first in range(len(content) - piece, -1, -piece):
            for begin in range(first, first + piece, size):
                digest.update(content[begin : begin + size].data)
                done += size
                if done % _PIECE == 0:
                    yield
        return digest.digest()

    def copy_bytes_per_s(self) -> float:
        """How fast one half of it is copied onto the other one: the best of three."""
        half = self.region.num_bytes // 2
        return half / max(1e-9, min(self._copy_half(half) for _ in range(3)))

    def _copy_half(self, half: int) -> float:
        target: Any = self._host if self._host is not None else self._tensor
        self._synchronize()
        begun_s = time.perf_counter()
        target[half:] = target[:half]
        self._synchronize()
        return time.perf_counter() - begun_s

    def _write(self, offset: int, content: NDArray[np.uint8]) -> None:
        if self._host is not None:
            self._host[offset : offset + len(content)] = content
        else:
            import torch

            self._tensor[offset : offset + len(content)].copy_(torch.from_numpy(content))
            self._synchronize()

    def _read(self) -> NDArray[np.uint8]:
        if self._host is not None:
            return self._host
        content: NDArray[np.uint8] = self._tensor.cpu().numpy()
        return content

    def _synchronize(self) -> None:
        if not self._on_host:
            import torch

            torch.accelerator.synchronize(self._tensor.device)
