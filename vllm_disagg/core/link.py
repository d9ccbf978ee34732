"""How long KV takes over a link between two engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of one end.

    Args:
        bytes_per_s: what it carries.
        latency_s: added to every transfer.
    """

    bytes_per_s: float
    latency_s: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        """How long one transfer takes alone."""
        return self.latency_s + num_bytes / self.bytes_per_s


LINKS: Final[dict[str, Link]] = {
    "nvlink": Link(bytes_per_s=300e9, latency_s=5e-6),
    "pcie5": Link(bytes_per_s=64e9, latency_s=10e-6),
    "200g": Link(bytes_per_s=25e9, latency_s=20e-6),
    "25g": Link(bytes_per_s=3.125e9, latency_s=50e-6),
    "none": Link(bytes_per_s=float("inf")),
}
"""Nominal figures of data sheets, without protocol overhead: NVLink 3 of an A100, half of its 600 GB/s; PCIe 5 x16;
Ethernet or InfiniBand of 200 and 25 Gb/s; and no time at all."""
