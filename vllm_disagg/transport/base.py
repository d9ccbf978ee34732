"""The transport contract. Every implementation passes `vllm_disagg.testing.check_transport`.

One thread owns a transport: it makes every call after `register`. One-sided libraries read the owner's memory without
its help, apart from `progress`; two-sided ones bring a serving thread of their own behind the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NewType, Protocol

import msgspec

MemoryKind = Literal["DRAM", "VRAM"]
"""Where regions lie: host memory or an accelerator's."""

PeerName = NewType("PeerName", str)
"""Who a peer says it is inside its descriptor; unique over all peers a transport ever connects to."""


class Region(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A run of memory that may be read by peers and written by own reads. Regions do not overlap; naming one twice is
    harmless. No copy may cross from one into the next, even where they touch.

    Attributes:
        address: first byte, as the owner's process sees it.
        num_bytes: length.
        device_id: accelerator index; 0 for host memory.
    """

    address: int
    num_bytes: int
    device_id: int = 0


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """One contiguous copy of a read: `num_bytes` from `remote` in the peer's memory to `local` in ours."""

    local: int
    remote: int
    num_bytes: int


class TransferHandle(Protocol):
    """One read under way. Opaque; compared by identity."""


State = Literal["done", "failed", "cancelled"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a read ended. After this has been returned nothing is written to the read's local memory any more.

    Attributes:
        handle: what `read` returned.
        state: `done` only when every byte has arrived.
        seconds: from `read` until the end was noticed.
        num_bytes: bytes asked for.
        num_descriptors: copies to hand to the library, after joining neighbours and cutting very long ones.
        error: why it failed, for logs; empty unless `state` is `failed`.
    """

    handle: TransferHandle
    state: State
    seconds: float
    num_bytes: int
    num_descriptors: int
    error: str = ""


class WireInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What carries reads from one peer.

    Attributes:
        transport: whose implementation: `nixl`, `nccl`, `loopback`.
        wire: `cma` (a copy between two processes of one host), `rdma`, `tcp`, `tcp or shared memory`, `gloo`, `nccl`,
            `memory`, or `unknown` where nobody can tell.
        sent_by_owner: whether the owner's process must send the bytes, so that reads stand still with it; None where
            nobody can tell.
        evidence: how this is known, one sentence for people.
    """

    transport: str
    wire: str
    sent_by_owner: bool | None
    evidence: str


class Movement(msgspec.Struct, frozen=True, kw_only=True):
    """Whether reads from one peer get on.

    Attributes:
        num_arrived: pieces of reads that have arrived since it was connected. Only its changes mean something.
        bytes_under_way: of the pieces that the library has been asked for and that have not arrived.
    """

    num_arrived: int
    bytes_under_way: int


class Transport(Protocol):
    """Reads from peers' registered memory into own registered memory."""

    name: str

    def register(self, regions: Sequence[Region]) -> bytes:
        """Make memory readable and writable by this transport. Called once, before anything else.

        Returns:
            The descriptor that peers hand to `connect`. Whoever holds it can read this memory: it is a secret.

        Raises:
            TransportError: the library refuses the memory.
        """

    def connect(self, descriptor: bytes) -> PeerName:
        """Get ready to read from a peer. Idempotent: the same descriptor gives the same name and no new resources.
        May return before the connection is up; the first read then waits for it. A peer that cannot be reached is not
        an error here: reads from it fail. It stays connected until `disconnect`, and a read after a failed one tries
        again.

        Raises:
            TransportError: the descriptor is malformed or of another kind of transport, or another peer is connected
                under its name.
        """

    def disconnect(self, peer: PeerName) -> None:
        """Forget a peer. Reads under way from it end as `failed`, through `poll`. Unknown peers are ignored."""

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        """Queue copying from a peer's memory into ours; `poll` does the work. Returns at once and never raises for
        what a peer did: such a read ends as `failed` in `poll`. Reads from one peer may take turns.

        Raises:
            TransportError: the peer is not connected, there are no copies, one is empty, or one leaves our or its
                regions. Nothing has been started then.
        """

    def wire(self, peer: PeerName) -> WireInfo:
        """What carries reads from a peer, as far as can be told: after reads have ended more than before. Cheap; for
        logs and diagnosis.

        Raises:
            TransportError: the peer is not connected.
        """

    def warm(self, peer: PeerName) -> None:
        """Bring the connection to a peer up ahead of the first read, through `poll`, as long as that takes or for some
        seconds. No outcome tells of it, and a peer that does not answer costs nothing else. Unknown peers are
        ignored."""

    def movement(self, peer: PeerName) -> Movement:
        """Whether reads from a peer get on. Cheap.

        Raises:
            TransportError: the peer is not connected.
        """

    def rebuild(self, peer: PeerName) -> None:
        """Replace the connection to a peer, because nothing moves on it. Nothing of the old one is written any more
        when this returns. Reads go on over a new one with what had not arrived; cancelled ones end. Where reads are
        emulated an owner that does not run just now may be harmed by it (`WireInfo.sent_by_owner`). Unknown peers are
        ignored."""

    def poll(self) -> Sequence[Outcome]:
        """Drive reads under way and return those that ended since the last call, each exactly once. Takes
        milliseconds, rarely a tenth of a second; never waits for a peer."""

    def cancel(self, handle: TransferHandle) -> None:
        """Ask for a read to end soon. It still ends through `poll`, as whatever it then is (`done` included), within
        `CANCEL_BOUND_S` at the latest, if need be at the price of the connection to its peer and all reads from it.
        A handle that has already ended is ignored.
        """

    @property
    def num_active(self) -> int:
        """Reads whose outcome `poll` has not returned yet, and connections that are coming up. While positive the
        owner calls `poll` often."""

    def progress(self) -> None:
        """Let peers connect to this memory and read it. The owner calls it often while a peer may be doing so, and
        never otherwise: an idle transport uses no processor time."""

    def close(self) -> None:
        """End all reads, forget all peers and give the memory back. Idempotent. Reads that were under way end as
        `failed`; one last `poll` returns them."""


CANCEL_BOUND_S = 2.0
"""The longest that a cancelled read may take to end, whatever its peer does."""
