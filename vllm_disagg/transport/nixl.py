"""The NIXL transport: one-sided reads through UCX, over whatever it finds: RDMA, NVLink, shared memory or TCP.

Why a peer has an agent of its own
    NIXL 1.5.1 cannot abort a read. `release_xfer_handle` on one under way returns at once and the bytes arrive later
    all the same; so they do after `remove_remote_agent`, which closes the endpoint gracefully, and its `ucx_ep_close_
    force` option changes nothing in this version. Verified with a stopped peer over TCP: after either call, SIGCONT
    brought all 64 MiB into memory that had long been given to somebody else.

    What does end a read is the end of the UCX worker that runs it. So reads from each peer have an agent of their own
    (a `_Link`), and when a read must end and does not, that agent is destroyed. Verified for a peer stopped before the
    connection was up, before the read and in its middle, killed, and cut off: it takes about 0.1 s whatever the peer
    does, leaves no file descriptor, and not one byte came later. In software transports bytes move only while the
    worker is progressed, and a destroyed one never is; an RDMA queue pair is destroyed with it. The latter, like all
    of VRAM, has not yet been run.

How a read ends
    A read goes out in batches, of which `_PEER_BYTES` are under way per peer, and all reads of a peer take turns. A
    cancelled one sends no more, and usually ends with the batches it had out. If those are still out after `_DRAIN_S`,
    the link goes, and every read on it. An error of the library costs the link as well. The next read opens a new one,
    from the same descriptor. `rebuild` replaces a link on which nothing moves; the batches that were out start anew.

    The bound is not only for short cancels. UCX 1.23 emulates reads on TCP and on shared memory without CMA, and its
    answering side aborts the whole process ("unexpected error: Endpoint timeout") when it finds the reader gone while
    it still has requests of it to answer. Ending reads by draining them keeps a living peer from that; a peer that was
    frozen for longer than the drain, or a reader that was killed, can still run into it.

Who must make progress
    The owner of memory, through `progress`, while a peer connects; and throughout, where reads are emulated. Reads
    through CMA need nothing from a connected owner, but are done inside the call that starts a batch: that is why
    `poll` starts only a few. Neither side has a thread of its own that runs: idle agents use no processor time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Literal

import msgspec

from vllm_disagg.errors import TransportError
from vllm_disagg.transport.base import (
    CANCEL_BOUND_S,
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
from vllm_disagg.transport.nixl_link import Agent, Link, import_nixl
from vllm_disagg.transport.patience import Patience
from vllm_disagg.transport.regions import RegionTable, Runs, batches, plan_copies
from vllm_disagg.transport.site import Site, can_read, foresee, here
from vllm_disagg.transport.turns import turns

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the descriptor. 1: the first. 2: where the owner stands."""

_BATCH_BYTES = 32 << 20
_BATCH_COPIES = 4096
_PEER_BYTES = 2 * _BATCH_BYTES
_ALL_BYTES = 2 * _PEER_BYTES
"""The most bytes under way for one peer and for all, and the most that one `poll` starts."""

_MOST_TURNS = 16
"""Batches of one read that are looked at in one `poll`."""

_DRAIN_S = CANCEL_BOUND_S / 2
"""How long batches of a cancelled read may take before their link is destroyed, while this process is running."""

_WARM_S = 5.0
"""How long a connection that is to come up before its first read is looked after."""


class _Descriptor(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    kind: Literal["nixl"] = "nixl"
    version: int
    agent_name: str
    memory: MemoryKind
    regions: tuple[Region, ...]
    metadata: bytes
    """What NIXL needs to reach the agent, addresses and memory keys."""
    digest: bytes
    """Of the metadata, so that nothing damaged reaches NIXL's parser."""
    site: Site


_decoder = msgspec.msgpack.Decoder(_Descriptor)


class NixlTransport:
    """See `Transport`.

    Args:
        agent_name: what peers call this side; never used again by a later process.
        memory: where the regions lie. `VRAM` has not yet been run on a GPU.
        clock: seconds, for the length of reads and the bound of cancels.

    Raises:
        ConfigError: NIXL is not installed.
    """

    name = "nixl"

    def __init__(
        self, agent_name: str, *, memory: MemoryKind = "DRAM", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        import_nixl()
        self._agent_name, self._memory, self._clock = agent_name, memory, clock
        self._owner: Agent | None = None
        self._regions: RegionTable | None = None
        self._peers: dict[PeerName, _Peer] = {}
        self._ended: list[Outcome] = []
        self._link_numbers = count()
        self._turn_numbers = count(1)
        self._undead: list[tuple[Link[_Read], list[_Read]]] = []

    def register(self, regions: Sequence[Region]) -> bytes:
        assert self._regions is None, "register is called once"
        self._regions = RegionTable(regions)
        self._owner = Agent(self._agent_name, self._memory, self._regions)
        metadata = self._owner.metadata()
        return msgspec.msgpack.encode(
            _Descriptor(
                version=VERSION,
                agent_name=self._agent_name,
                memory=self._memory,
                regions=self._regions.regions,
                metadata=metadata,
                digest=_digest(metadata),
                site=here(),
            )
        )

    def connect(self, descriptor: bytes) -> PeerName:
        offer = self._decode(descriptor)
        name = PeerName(offer.agent_name)
        known = self._peers.get(name)
        if known is None:
            self._peers[name] = peer = _Peer(bytes(descriptor), offer, RegionTable(offer.regions))
            self._try_open(peer)
        elif known.descriptor != descriptor:
            raise TransportError(f"another peer is connected as {name!r}: disconnect it first")
        return name

    def disconnect(self, peer: PeerName) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            self._drop(known, "disconnected")

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        known = self._peers.get(peer)
        if known is None or self._regions is None:
            raise TransportError(f"no connection to {peer!r}")
        runs = plan_copies(copies, ours=self._regions, theirs=known.regions, max_bytes=_BATCH_BYTES)
        read = _Read(
            waiting=deque(batches(runs, max_bytes=_BATCH_BYTES, max_copies=_BATCH_COPIES)),
            num_bytes=runs.total,
            num_descriptors=len(runs),
            started_s=self._clock(),
        )
        known.reads.append(read)
        return read

    def wire(self, peer: PeerName) -> WireInfo:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"no connection to {peer!r}")
        return _observed(self._foresee(known.offer), known.num_in_call, known.num_later)

    def name_of(self, descriptor: bytes) -> PeerName:
        """Whose descriptor it is.

        Raises:
            TransportError: the descriptor is malformed or of another kind of transport.
        """
        return PeerName(self._decode(descriptor).agent_name)

    def foresee(self, descriptor: bytes) -> WireInfo:
        """What will carry reads from a peer, before it is connected.

        Raises:
            TransportError: the descriptor is malformed or of another kind of transport.
        """
        return self._foresee(self._decode(descriptor))

    def warm(self, peer: PeerName) -> None:
        known = self._peers.get(peer)
        if known is None or (known.link is None and self._try_open(known)):
            return
        assert known.link is not None
        known.warming = Patience(_WARM_S, clock=self._clock)
        try:
            known.link.warm(known.offer.regions[0])
            return
        except TransportError as failure:
            error = str(failure)
        self._drop(known, error)

    def movement(self, peer: PeerName) -> Movement:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"no connection to {peer!r}")
        under_way = 0 if known.link is None else known.link.bytes_under_way
        return Movement(num_arrived=known.num_arrived, bytes_under_way=under_way)

    def rebuild(self, peer: PeerName) -> None:
        known = self._peers.get(peer)
        if known is None or known.link is None:
            return
        unread = self._destroyed(known, "nothing moves on it")
        for read, batch in reversed(unread or ()):
            read.num_under_way -= 1
            if read.drain is None:
                read.waiting.appendleft(batch)

    def poll(self) -> Sequence[Outcome]:
        busy = [peer for peer in self._peers.values() if peer.reads or peer.is_warming]
        for peer in busy:
            self._drive(peer)
        if busy:
            self._start_batches([peer for peer in busy if peer.reads])
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, handle: TransferHandle) -> None:
        assert isinstance(handle, _Read)
        if handle.drain is None:
            handle.drain = Patience(_DRAIN_S, clock=self._clock)

    @property
    def num_active(self) -> int:
        return len(self._ended) + sum(len(peer.reads) + peer.is_warming for peer in self._peers.values())

    def progress(self) -> None:
        if self._owner is not None:
            self._owner.progress()

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        if self._owner is not None:
            self._owner.destroy()
            self._owner = None

    def _decode(self, descriptor: bytes) -> _Descriptor:
        try:
            offer = _decoder.decode(descriptor)
        except msgspec.MsgspecError as error:
            raise TransportError(f"not a descriptor of the nixl transport: {error}") from None
        if offer.version != VERSION:
            raise TransportError(f"nixl descriptor of version {offer.version}; this side speaks {VERSION}")
        if offer.digest != _digest(offer.metadata):
            raise TransportError("the nixl descriptor is damaged: its metadata does not match its digest")
        if self._regions is None:
            raise TransportError("register own memory before connecting to a peer")
        return offer

    def _foresee(self, offer: _Descriptor) -> WireInfo:
        return foresee(here(), offer.site, memory=(self._memory, offer.memory), can_read=can_read(offer.site))

    def _try_open(self, peer: _Peer) -> str:
        """Give the peer a link. Returns why it has none, or nothing."""
        assert self._regions is not None and peer.link is None
        name = f"{self._agent_name}#{next(self._link_numbers)}"
        try:
            offer = peer.offer
            peer.link = Link(
                name, self._memory, self._regions,
                peer=offer.agent_name, peer_memory=offer.memory, metadata=offer.metadata,
            )  # fmt: skip
        except TransportError as error:
            logger.info("transport.unreachable peer=%s error=%s", peer.offer.agent_name, error)
            return str(error)
        return ""

    def _drive(self, peer: _Peer) -> None:
        """One step of all reads from a peer."""
        if peer.link is None and (error := self._try_open(peer)):
            self._drop(peer, error)
            return
        if error := self._collect(peer):
            self._drop(peer, error)
            return
        if peer.warming is not None and (not peer.link_is_warming or peer.warming.is_over()):
            peer.warming = None
        self._end_reads(peer)
        if any(read.drain is not None and read.drain.is_over() for read in peer.reads):
            self._drop(peer, f"the peer did not answer within {_DRAIN_S} s of a cancel")

    def _end_reads(self, peer: _Peer) -> None:
        for read in [read for read in peer.reads if read.is_over]:
            peer.reads.remove(read)
            self._end(read, "cancelled" if read.waiting else "done")

    def _collect(self, peer: _Peer) -> str:
        """Take note of batches that have ended. Returns what went wrong, as text: the exception holds frames that hold
        the agent, and must be gone before the link is destroyed."""
        assert peer.link is not None
        try:
            for read in peer.link.collect():
                read.num_under_way -= 1
                peer.num_arrived += 1
        except TransportError as error:
            return str(error)
        return ""

    def _start_batches(self, peers: list[_Peer]) -> None:
        """Start what may be under way, and put whoever was served behind the others."""
        peers.sort(key=lambda peer: peer.served)
        reads = [list(peer.reads) for peer in peers]
        sizes = [
            [[] if read.drain else [batch.total for batch in islice(read.waiting, _MOST_TURNS)] for read in of_peer]
            for of_peer in reads
        ]
        under_way = [peer.link.bytes_under_way if peer.link else 0 for peer in peers]
        for index, number in turns(sizes, under_way, per_peer=_PEER_BYTES, in_all=_ALL_BYTES):
            peer, read = peers[index], reads[index][number]
            if peer.link is None:  # an earlier batch of this round has failed
                continue
            if error := self._start(peer, peer.link, read):
                self._drop(peer, error)
                continue
            peer.served = next(self._turn_numbers)
            peer.reads.remove(read)
            peer.reads.append(read)
        for peer in peers:
            self._end_reads(peer)

    def _start(self, peer: _Peer, link: Link[_Read], read: _Read) -> str:
        """Start a read's next batch. Returns what went wrong, as text, like `_collect`."""
        was_up = link.is_up
        try:
            under_way = link.start(read, read.waiting[0])
        except TransportError as error:
            return str(error)
        read.waiting.popleft()
        read.num_under_way += under_way
        peer.num_arrived += not under_way
        peer.num_later += was_up and under_way
        peer.num_in_call += was_up and not under_way
        return ""

    def _drop(self, peer: _Peer, error: str) -> None:
        """Destroy the peer's link, and only then end its reads: from here on nothing writes to their memory."""
        self._destroyed(peer, error)
        while peer.reads:
            read = peer.reads.popleft()
            if read.drain is not None:
                self._end(read, "cancelled")
            else:
                self._end(read, "failed", error)

    def _destroyed(self, peer: _Peer, error: str) -> list[tuple[_Read, Runs]] | None:
        """Destroy the peer's link, if it has one. Returns the batches that were under way. Where it cannot be
        destroyed its reads are never reported, so that their memory is never used again; other peers go on."""
        link, peer.link, peer.warming = peer.link, None, None
        if link is None:
            return []
        try:
            unread = link.destroy()
        except Exception:
            logger.exception("transport.link_undead: its memory stays out of use until this engine restarts")
            self._undead.append((link, list(peer.reads)))
            peer.reads.clear()
            return None
        logger.info("transport.link_dropped peer=%s error=%s", link.peer, error)
        return unread

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


@dataclass(slots=True, eq=False, kw_only=True)
class _Read:
    """A read that has not ended: the batches still to start, how many are under way, and, once it is cancelled, how
    long those may take."""

    waiting: deque[Runs]
    num_bytes: int
    num_descriptors: int
    started_s: float
    num_under_way: int = 0
    drain: Patience | None = None

    @property
    def is_over(self) -> bool:
        return self.num_under_way == 0 and (not self.waiting or self.drain is not None)


@dataclass(slots=True, eq=False)
class _Peer:
    """A connected peer. Its link comes and goes, it stays.

    Attributes:
        served: when one of its batches was last started, in turns of all peers.
        num_in_call: batches, on a connection that was up, that were done when the call that began them returned.
        num_later: those that took longer.
        num_arrived: all batches that have arrived.
        warming: how long its link is looked after while it comes up without a read.
    """

    descriptor: bytes
    offer: _Descriptor
    regions: RegionTable
    served: int = 0
    num_in_call: int = 0
    num_later: int = 0
    num_arrived: int = 0
    warming: Patience | None = None
    link: Link[_Read] | None = None
    reads: deque[_Read] = field(default_factory=deque)

    @property
    def is_warming(self) -> bool:
        return self.warming is not None

    @property
    def link_is_warming(self) -> bool:
        return self.link is not None and self.link.is_warming


def _observed(foreseen: WireInfo, num_in_call: int, num_later: int) -> WireInfo:
    """What was foreseen, held against what reads have shown: UCX copies with CMA inside the call that begins a read,
    and nothing else does."""
    num = num_in_call + num_later
    if not num:
        return msgspec.structs.replace(foreseen, evidence=f"{foreseen.evidence}; not yet confirmed by reads")
    evidence = f"{foreseen.evidence}; {num_in_call} of {num} batches were read within the call that began them"
    if (num_in_call > num_later) == (foreseen.wire == "cma"):
        return msgspec.structs.replace(foreseen, evidence=evidence)
    copied = num_in_call > num_later
    return msgspec.structs.replace(
        foreseen, wire="unknown", sent_by_owner=False if copied else None, evidence=f"{evidence}, unlike foreseen"
    )


def _digest(metadata: bytes) -> bytes:
    return hashlib.blake2b(metadata, digest_size=16).digest()
