"""The transport that chooses for each peer: NIXL where its reads go past the owner's process, messages where they do
not.

Over TCP, and over shared memory without CMA, UCX emulates reads, and ends the process of an owner that finds its reader
gone with requests unanswered: a decode engine that dies or gives up can take a prefill engine with it. The `nccl`
transport has no such case. So each engine offers both, and the reader chooses from what it can find out about the two
hosts and processes (`site.py`). The owner has no part in it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import msgspec

from vllm_disagg.errors import TransportError
from vllm_disagg.transport.base import Copy, Movement, Outcome, PeerName, Region, TransferHandle, WireInfo
from vllm_disagg.transport.nccl import NcclTransport
from vllm_disagg.transport.nixl import NixlTransport

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the descriptor. 1: the first."""


class _Descriptor(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    kind: Literal["auto"] = "auto"
    version: int
    nixl: bytes
    nccl: bytes


_decoder = msgspec.msgpack.Decoder(_Descriptor)


class AutoTransport:
    """See `Transport`.

    Args:
        nixl, nccl: the two, with the same agent name and nothing registered yet. This closes them.
    """

    name = "auto"

    def __init__(self, nixl: NixlTransport, nccl: NcclTransport) -> None:
        self._nixl, self._nccl = nixl, nccl
        self._peers: dict[PeerName, tuple[bytes, NixlTransport | NcclTransport]] = {}
        self._reads: dict[int, NixlTransport | NcclTransport] = {}

    def register(self, regions: Sequence[Region]) -> bytes:
        nixl, nccl = self._nixl.register(regions), self._nccl.register(regions)
        return msgspec.msgpack.encode(_Descriptor(version=VERSION, nixl=nixl, nccl=nccl))

    def connect(self, descriptor: bytes) -> PeerName:
        try:
            offer = _decoder.decode(descriptor)
        except msgspec.MsgspecError as error:
            raise TransportError(f"not a descriptor of the auto transport: {error}") from None
        if offer.version != VERSION:
            raise TransportError(f"auto descriptor of version {offer.version}; this side speaks {VERSION}")
        name, other = self._nixl.name_of(offer.nixl), self._nccl.name_of(offer.nccl)
        if name != other:
            raise TransportError(f"the descriptor of {name!r} carries that of {other!r}")
        known = self._peers.get(name)
        if known is not None and known[0] != descriptor:
            raise TransportError(f"another peer is connected as {name!r}: disconnect it first")
        if known is None:
            self._peers[name] = bytes(descriptor), self._connected(name, offer)
        return name

    def disconnect(self, peer: PeerName) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            known[1].disconnect(peer)

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        via = self._via(peer)
        handle = via.read(peer, copies)
        self._reads[id(handle)] = via
        return handle

    def wire(self, peer: PeerName) -> WireInfo:
        via = self._via(peer)
        wire = via.wire(peer)
        if via is self._nixl:
            return wire
        avoided = self._nixl.foresee(_decoder.decode(self._peers[peer][0]).nixl)
        return msgspec.structs.replace(
            wire, evidence=f"{wire.evidence}, since NIXL would emulate reads over {avoided.wire}: {avoided.evidence}"
        )

    def warm(self, peer: PeerName) -> None:
        if peer in self._peers:
            self._via(peer).warm(peer)

    def movement(self, peer: PeerName) -> Movement:
        return self._via(peer).movement(peer)

    def rebuild(self, peer: PeerName) -> None:
        if peer in self._peers:
            self._via(peer).rebuild(peer)

    def poll(self) -> Sequence[Outcome]:
        outcomes = [*self._nixl.poll(), *self._nccl.poll()]
        for outcome in outcomes:
            self._reads.pop(id(outcome.handle), None)
        return outcomes

    def cancel(self, handle: TransferHandle) -> None:
        via = self._reads.get(id(handle))
        if via is not None:
            via.cancel(handle)

    @property
    def num_active(self) -> int:
        return self._nixl.num_active + self._nccl.num_active

    def progress(self) -> None:
        self._nixl.progress()
        self._nccl.progress()

    def close(self) -> None:
        self._peers.clear()
        self._nixl.close()
        self._nccl.close()

    def _via(self, peer: PeerName) -> NixlTransport | NcclTransport:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"no connection to {peer!r}")
        return known[1]

    def _connected(self, name: PeerName, offer: _Descriptor) -> NixlTransport | NcclTransport:
        foreseen = self._nixl.foresee(offer.nixl)
        if not foreseen.sent_by_owner:
            via: NixlTransport | NcclTransport = self._nixl
            via.connect(offer.nixl)
        else:
            via = self._nccl
            via.connect(offer.nccl)
        why = f"NIXL would read over {foreseen.wire}: {foreseen.evidence}"
        logger.info("transport.pair peer=%s transport=%s because=%r", name, via.name, why)
        return via
