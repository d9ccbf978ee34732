"""A transport between agents of one process: plain memory copies. For tests, and the smallest example of the contract.

Host memory only. A peer counts as dead once its transport was closed, and as frozen while its `frozen` is true, so
that every path of a caller can be run without a second process.
"""

from __future__ import annotations

import ctypes
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from vllm_disagg.errors import ConfigError, TransportError
from vllm_disagg.transport.base import (
    Copy,
    MemoryKind,
    Movement,
    Outcome,
    PeerName,
    Region,
    State,
    TransferHandle,
    WireInfo,
)
from vllm_disagg.transport.regions import RegionTable, Runs, plan_copies

VERSION = 1

_MAX_COPY_BYTES = 1 << 30


class _Descriptor(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    kind: Literal["loopback"] = "loopback"
    version: int
    agent_name: str
    token: bytes
    regions: tuple[Region, ...]


_decoder = msgspec.msgpack.Decoder(_Descriptor)


@dataclass(slots=True, eq=False)
class _Read:
    peer: PeerName
    runs: Runs
    num_bytes: int
    started_s: float
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _Peer:
    descriptor: bytes
    token: bytes
    regions: RegionTable


class LoopbackTransport:
    """See `Transport`.

    Args:
        agent_name: what peers call it.
        memory: must be `DRAM`.
        clock: seconds, for the length of reads.

    Attributes:
        frozen: while true, reads from this transport's memory stay under way, as if its process were stopped.
        stuck: peers from which this transport's own reads stay under way, as if nothing moved on the connection;
            `rebuild` makes a new one.

    Raises:
        ConfigError: another kind of memory was asked for.
    """

    name = "loopback"

    def __init__(
        self, agent_name: str, *, memory: MemoryKind = "DRAM", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if memory != "DRAM":
            raise ConfigError(f"kv transport loopback handles DRAM only, not {memory}: use nixl")
        self.frozen = False
        self.stuck: set[PeerName] = set()
        self._num_arrived = 0
        self._agent_name, self._clock = agent_name, clock
        self._token = secrets.token_bytes(16)
        self._regions: RegionTable | None = None
        self._peers: dict[PeerName, _Peer] = {}
        self._reads: list[_Read] = []
        self._ended: list[Outcome] = []

    def register(self, regions: Sequence[Region]) -> bytes:
        assert self._regions is None, "register is called once"
        self._regions = RegionTable(regions)
        with _lock:
            _owners[self._token] = self
        return msgspec.msgpack.encode(
            _Descriptor(version=VERSION, agent_name=self._agent_name, token=self._token, regions=self._regions.regions)
        )

    def connect(self, descriptor: bytes) -> PeerName:
        try:
            offer = _decoder.decode(descriptor)
        except msgspec.MsgspecError as error:
            raise TransportError(f"not a descriptor of the loopback transport: {error}") from None
        if offer.version != VERSION:
            raise TransportError(f"loopback descriptor of version {offer.version}; this side speaks {VERSION}")
        name = PeerName(offer.agent_name)
        known = self._peers.get(name)
        if known is not None and known.descriptor != descriptor:
            raise TransportError(f"another peer is connected as {name!r}: disconnect it first")
        self._peers[name] = known or _Peer(bytes(descriptor), offer.token, RegionTable(offer.regions))
        return name

    def disconnect(self, peer: PeerName) -> None:
        if self._peers.pop(peer, None) is not None:
            for read in [read for read in self._reads if read.peer == peer]:
                self._end(read, "failed", "disconnected")

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        known = self._peers.get(peer)
        if known is None or self._regions is None:
            raise TransportError(f"no connection to {peer!r}")
        runs = plan_copies(copies, ours=self._regions, theirs=known.regions, max_bytes=_MAX_COPY_BYTES)
        read = _Read(peer, runs, int(runs.num_bytes.sum()), self._clock())
        self._reads.append(read)
        return read

    def wire(self, peer: PeerName) -> WireInfo:
        if peer not in self._peers:
            raise TransportError(f"no connection to {peer!r}")
        return WireInfo(transport="loopback", wire="memory", sent_by_owner=False, evidence="one process")

    def warm(self, peer: PeerName) -> None:
        return

    def movement(self, peer: PeerName) -> Movement:
        if peer not in self._peers:
            raise TransportError(f"no connection to {peer!r}")
        under_way = sum(read.num_bytes for read in self._reads if read.peer == peer)
        return Movement(num_arrived=self._num_arrived, bytes_under_way=under_way)

    def rebuild(self, peer: PeerName) -> None:
        self.stuck.discard(peer)

    def poll(self) -> Sequence[Outcome]:
        for read in list(self._reads):
            self._drive(read)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, handle: TransferHandle) -> None:
        assert isinstance(handle, _Read)
        handle.is_cancelled = True

    @property
    def num_active(self) -> int:
        return len(self._reads) + len(self._ended)

    def progress(self) -> None:
        return

    def close(self) -> None:
        with _lock:
            _owners.pop(self._token, None)
        for peer in list(self._peers):
            self.disconnect(peer)

    def _drive(self, read: _Read) -> None:
        if read.is_cancelled:
            self._end(read, "cancelled")
            return
        if read.peer in self.stuck:
            return
        with _lock:
            owner = _owners.get(self._peers[read.peer].token)
            if owner is not None and not owner.frozen:
                for local, remote, num_bytes in zip(
                    read.runs.local.tolist(), read.runs.remote.tolist(), read.runs.num_bytes.tolist(), strict=True
                ):
                    ctypes.memmove(local, remote, num_bytes)
        if owner is None:
            self._end(read, "failed", "the peer is gone")
        elif not owner.frozen:
            self._num_arrived += 1
            self._end(read, "done")

    def _end(self, read: _Read, state: State, error: str = "") -> None:
        self._reads.remove(read)
        self._ended.append(
            Outcome(
                handle=read,
                state=state,
                seconds=self._clock() - read.started_s,
                num_bytes=read.num_bytes,
                num_descriptors=len(read.runs),
                error=error,
            )
        )


_lock = threading.Lock()
"""Held while memory is copied, so that nobody gives it back meanwhile."""

_owners: dict[bytes, LoopbackTransport] = {}
"""Who has memory registered in this process."""
