"""What a server's processes use: threads, memory, and file descriptors by what they are for."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.e2e.engines import Server


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Of all processes of a server together."""

    threads: int = 0
    memory_bytes: int = 0
    descriptors: Counter[str] = field(default_factory=Counter)
    """How many there are of each kind. Two kinds are the same if only numbers that the kernel gives away differ."""

    def __str__(self) -> str:
        return f"{self.threads} threads, {self.descriptors.total()} descriptors, {self.memory_bytes / 2**20:.1f} MiB"

    def most(self, other: Footprint) -> Footprint:
        """The greater of each, kind by kind."""
        return Footprint(
            threads=max(self.threads, other.threads),
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
            descriptors=self.descriptors | other.descriptors,
        )

    def lasting(self, ports: Collection[int]) -> int:
        """Descriptors, but for connections at these ports."""
        passing = {f"{psutil.CONN_ESTABLISHED} {way} {port}" for way in ("of", "to") for port in ports}
        return sum(number for kind, number in self.descriptors.items() if kind not in passing)

    def since(self, before: Footprint) -> str:
        """What has become more and what less."""
        more, fewer = self.descriptors - before.descriptors, before.descriptors - self.descriptors
        memory = (self.memory_bytes / before.memory_bytes - 1) * 100
        return f"{self.threads - before.threads:+} threads, +{dict(more)} -{dict(fewer)}, memory {memory:+.2f} %"


def footprint(server: Server) -> Footprint:
    """As it is now."""
    processes = [item for item in server.tree() if item.is_running() and item.status() != psutil.STATUS_ZOMBIE]
    ports = {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    return Footprint(
        threads=sum(item.num_threads() for item in processes),
        memory_bytes=sum(item.memory_info().rss for item in processes),
        descriptors=sum((_descriptors(item, ports) for item in processes), Counter[str]()),
    )


def _descriptors(process: psutil.Process, ports: set[int]) -> Counter[str]:
    connections = {item.fd: _socket_kind(item, ports) for item in process.net_connections("all")}
    found = Counter[str]()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            found[connections.get(int(entry.name)) or re.sub(r"\d+", "N", str(entry.readlink()))] += 1
    return found


def _socket_kind(item: object, ports: set[int]) -> str:
    """A connection by the port that says what it is for: ours, if we listen there."""
    family, status, local, remote = (getattr(item, name) for name in ("family", "status", "laddr", "raddr"))
    if family not in (socket.AF_INET, socket.AF_INET6):
        return re.sub(r"[0-9a-f]{8}[0-9a-f-]*|\d+", "N", f"unix {local}")
    if not remote:
        return f"{status} at {local.port if local else '?'}"
    return f"{status} of {local.port}" if local.port in ports else f"{status} to {remote.port}"
