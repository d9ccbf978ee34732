"""The `nccl` transport: point-to-point over a communicator for each pair, NCCL between GPUs and gloo between hosts'
memories. For where NIXL is not, or where its one-sided links are not wanted. Not yet run on a GPU.

Both libraries are two-sided, and cannot take a message back once it is under way. So nothing of theirs touches
registered memory:

    owner                                        reader
    serving thread: gather into a buffer    <--  link's thread: which runs it wants (authenticated channel)
                    send                    -->                 receive into a buffer
                    tell that it is out     -->                 (authenticated channel)
                                                 poll:          scatter into registered memory

A cancelled read therefore ends at once, whatever its peer does: `poll` is the only place that writes. The price are two
more copies in memory; the gain is that a read of many runs is one message.

The watchdog
    An owner that leaves a reader waiting for longer than `STALL_S` loses the connection and every read on it; the next
    read makes a new connection. It is found out by the link's own thread; nobody else waits for it. It waits on the
    channel, in short turns, so that a standstill of its own host is not taken for the owner's. It goes into the library
    only for what it need not wait for, and so is never stuck in there: the owner tells when a message is out. The
    owner's thread has to wait there for its reader, for `LIBRARY_S` at most, unless the reader hangs up before.

Who may read
    The descriptor holds a CURVE key pair that the owner has made for this run: only its holder gets past the listener.
    All requests travel there, encrypted, and the owner checks each against its registered memory: a reader can read
    that and nothing else, and cannot write. gloo's own TCP connection is neither encrypted nor authenticated. It is
    made after the channel, on addresses that are told over the channel, and is given up unless both ends prove over it
    that they are the ends of the channel too.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from vllm_disagg.errors import TransportError
from vllm_disagg.transport import nccl_wire
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
from vllm_disagg.transport.nccl_owner import VERSION, Owner
from vllm_disagg.transport.nccl_reader import NUM_BUFFERS, Chunk, Link, Place
from vllm_disagg.transport.nccl_wire import CHUNK_BYTES, CHUNK_COPIES, Staging
from vllm_disagg.transport.regions import RegionTable, batches, plan_copies

_JOIN_S = 0.5
"""How long `disconnect` and `close` wait for threads to end; those that talk to a stuck peer end later."""


class _Descriptor(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    kind: Literal["nccl"] = "nccl"
    version: int
    agent_name: str
    memory: MemoryKind
    regions: tuple[Region, ...]
    host: str
    port: int
    server_key: bytes
    reader_public: bytes
    reader_secret: bytes


_decoder = msgspec.msgpack.Decoder(_Descriptor)


@dataclass(slots=True, eq=False, kw_only=True)
class _Read:
    chunks: list[Chunk]
    """Those that have not arrived."""
    num_bytes: int
    num_descriptors: int
    started_s: float
    is_cancelled: bool = False


@dataclass(slots=True, eq=False)
class _Peer:
    """A connected peer. Its link comes and goes, it stays."""

    descriptor: bytes
    offer: _Descriptor
    regions: RegionTable
    num_arrived: int = 0
    link: Link | None = None
    reads: deque[_Read] = field(default_factory=deque)


class NcclTransport:
    """See `Transport`.

    Args:
        agent_name: what peers call this side; never used again by a later process.
        memory: where the regions lie. `VRAM` has not yet been run on a GPU.
        host: IPv4 address on which this side serves readers: one that they reach.
        clock: seconds, for the length of reads.

    Raises:
        ConfigError: PyTorch lacks the backend for this memory.
    """

    name = "nccl"

    def __init__(
        self,
        agent_name: str,
        *,
        memory: MemoryKind = "DRAM",
        host: str = "127.0.0.1",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        nccl_wire.import_torch(memory)
        self._agent_name, self._memory, self._host, self._clock = agent_name, memory, host, clock
        self._owner: Owner | None = None
        self._regions: RegionTable | None = None
        self._staging: Staging | None = None
        self._peers: dict[PeerName, _Peer] = {}
        self._ended: list[Outcome] = []

    def register(self, regions: Sequence[Region]) -> bytes:
        assert self._regions is None, "register is called once"
        self._regions = RegionTable(regions)
        self._staging = Staging(self._memory, self._device_id)
        self._owner = Owner(self._regions, memory=self._memory, host=self._host)
        return msgspec.msgpack.encode(
            _Descriptor(
                version=VERSION,
                agent_name=self._agent_name,
                memory=self._memory,
                regions=self._regions.regions,
                host=self._host,
                port=self._owner.port,
                server_key=self._owner.server_key,
                reader_public=self._owner.reader_keys[0],
                reader_secret=self._owner.reader_keys[1],
            )
        )

    def connect(self, descriptor: bytes) -> PeerName:
        offer = self._decode(descriptor)
        name = PeerName(offer.agent_name)
        known = self._peers.get(name)
        if known is None:
            self._peers[name] = peer = _Peer(bytes(descriptor), offer, RegionTable(offer.regions))
            peer.link = self._dial(offer)
        elif known.descriptor != descriptor:
            raise TransportError(f"another peer is connected as {name!r}: disconnect it first")
        return name

    def disconnect(self, peer: PeerName) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            link = known.link
            self._drop(known, "disconnected")
            if link is not None:
                link.join(_JOIN_S)

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        known = self._peers.get(peer)
        if known is None or self._regions is None:
            raise TransportError(f"no connection to {peer!r}")
        runs = plan_copies(copies, ours=self._regions, theirs=known.regions, max_bytes=CHUNK_BYTES)
        read = _Read(
            chunks=[],
            num_bytes=int(runs.num_bytes.sum()),
            num_descriptors=len(runs),
            started_s=self._clock(),
        )
        read.chunks = [Chunk(read, part) for part in batches(runs, max_bytes=CHUNK_BYTES, max_copies=CHUNK_COPIES)]
        if known.link is None or (known.link.error and not known.reads):
            known.link = self._dial(known.offer)
        known.reads.append(read)
        known.link.submit(list(read.chunks))
        return read

    def name_of(self, descriptor: bytes) -> PeerName:
        """Whose descriptor it is.

        Raises:
            TransportError: the descriptor is malformed or of another kind of transport.
        """
        return PeerName(self._decode(descriptor).agent_name)

    def wire(self, peer: PeerName) -> WireInfo:
        if peer not in self._peers:
            raise TransportError(f"no connection to {peer!r}")
        library = "nccl" if self._memory == "VRAM" else "gloo"
        return WireInfo(
            transport="nccl", wire=library, sent_by_owner=True, evidence=f"{library} for memory of kind {self._memory}"
        )

    def warm(self, peer: PeerName) -> None:
        """`connect` has begun to, on the link's own thread."""

    def movement(self, peer: PeerName) -> Movement:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"no connection to {peer!r}")
        wanted = sum(chunk.runs.total for read in known.reads for chunk in read.chunks[:NUM_BUFFERS])
        return Movement(num_arrived=known.num_arrived, bytes_under_way=min(wanted, NUM_BUFFERS * CHUNK_BYTES))

    def rebuild(self, peer: PeerName) -> None:
        known = self._peers.get(peer)
        if known is None or known.link is None:
            return
        self._drive(known)  # what has arrived until now counts
        if known.link is None:
            return
        known.link.close()
        known.link = self._dial(known.offer)
        for read in known.reads:
            known.link.submit(list(read.chunks))

    def poll(self) -> Sequence[Outcome]:
        for peer in list(self._peers.values()):
            if peer.reads or peer.link is not None:
                self._drive(peer)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, handle: TransferHandle) -> None:
        assert isinstance(handle, _Read)
        handle.is_cancelled = True

    @property
    def num_active(self) -> int:
        return len(self._ended) + sum(len(peer.reads) for peer in self._peers.values())

    def progress(self) -> None:
        """The serving threads need no help."""

    def close(self) -> None:
        links = [peer.link for peer in self._peers.values() if peer.link is not None]
        for peer in list(self._peers.values()):
            self._drop(peer, "closed")
        self._peers.clear()
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        end_s = time.monotonic() + _JOIN_S
        for link in links:
            link.join(max(0.0, end_s - time.monotonic()))

    @property
    def _device_id(self) -> int:
        assert self._regions is not None
        return int(self._regions.device_ids[0])

    def _decode(self, descriptor: bytes) -> _Descriptor:
        try:
            offer = _decoder.decode(descriptor)
        except msgspec.MsgspecError as error:
            raise TransportError(f"not a descriptor of the nccl transport: {error}") from None
        if offer.version != VERSION:
            raise TransportError(f"nccl descriptor of version {offer.version}; this side speaks {VERSION}")
        if offer.memory != self._memory:
            raise TransportError(f"the peer's memory is {offer.memory} and ours {self._memory}: nccl needs one kind")
        if self._regions is None:
            raise TransportError("register own memory before connecting to a peer")
        return offer

    def _dial(self, offer: _Descriptor) -> Link:
        place = Place(
            host=offer.host,
            port=offer.port,
            server_key=offer.server_key,
            reader_public=offer.reader_public,
            reader_secret=offer.reader_secret,
        )
        return Link(offer.agent_name, place, version=VERSION, memory=self._memory, device_id=self._device_id)

    def _drive(self, peer: _Peer) -> None:
        """Take what has arrived from a peer, and end what is over."""
        link = peer.link
        if link is None:
            return
        error = link.error  # before `take`: what arrived before the end still counts
        for chunk, buffer in link.take():
            self._arrived(chunk, buffer)
            peer.num_arrived += 1
            link.give_back(buffer)
        for read in [read for read in peer.reads if read.is_cancelled or not read.chunks]:
            peer.reads.remove(read)
            link.withdraw(read)
            self._end(read, "cancelled" if read.chunks else "done")
        if error and peer.reads:
            self._drop(peer, error)

    def _arrived(self, chunk: Chunk, buffer: object) -> None:
        read = chunk.read
        assert isinstance(read, _Read) and self._staging is not None
        if not read.is_cancelled:
            self._staging.scatter(buffer, chunk.runs.local, chunk.runs.num_bytes)
            read.chunks.remove(chunk)

    def _drop(self, peer: _Peer, error: str) -> None:
        """Give the peer's link up, and end its reads."""
        link, peer.link = peer.link, None
        if link is not None:
            link.close()
        while peer.reads:
            read = peer.reads.popleft()
            self._end(read, "cancelled" if read.is_cancelled else "failed", "" if read.is_cancelled else error)

    def _end(self, read: _Read, state: State, error: str = "") -> None:
        self._ended.append(
            Outcome(
                handle=read,
                state=state,
                seconds=self._clock() - read.started_s,
                num_bytes=read.num_bytes,
                num_descriptors=read.num_descriptors,
                error=error,
            )
        )
