"""Everything that is said between engines, and between an engine's core and its workers. Version history:

1  first version
2  segments tell which heads they hold and how these lie; a worker is told of all ranks of a peer
3  digests of KV blocks
4  probes: ranks offer memory for them
5  a decode engine whose reads stand still says so
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vllm_disagg.core.probe import WorkerReport
from vllm_disagg.core.types import BlockIds, EngineId, TransferId
from vllm_disagg.core.verify import DigestJob, HeadSums
from vllm_disagg.transport.base import Region
from vllm_disagg.transport.layout import RankLayout

PROTOCOL_VERSION = 5

RENEWALS_PER_FRAME = 4096
"""Transfers in one `Renew`, so that it stays far below what prefill receives."""

M = TypeVar("M")


class _Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages: closed schema, the class name as tag."""


class RankInfo(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One worker's memory. `descriptor` is a secret: it lets its holder read the KV cache."""

    tp_rank: int
    pp_rank: int
    descriptor: bytes
    layout: RankLayout
    probe: Region | None = None
    """Memory that probes read; it is among what `descriptor` describes."""


# Decode (or a frontend of the same engine) to prefill.


class Hello(_Message, frozen=True):
    """May I read from you? `engine_id` is whom the sender expects; a restarted engine is another one."""

    version: int
    engine_id: EngineId
    fingerprint: dict[str, str]


class Renew(_Message, frozen=True):
    """I still want the KV of these transfers."""

    engine_id: EngineId
    transfer_ids: tuple[TransferId, ...]


class Release(_Message, frozen=True):
    """I have read the blocks of this transfer, or want them no more. Answered with `Released`; if `verify`, once their
    digests are known."""

    engine_id: EngineId
    transfer_id: TransferId
    nonce: str
    verify: bool = False


class Forbid(_Message, frozen=True):
    """The client has left: let this transfer's blocks go, also if its prompt is still being computed."""

    transfer_id: TransferId


class OpenProbe(_Message, frozen=True):
    """Get ready to be probed: fill the memory for it, and hold no blocks at all under a fresh transfer id."""

    engine_id: EngineId


class Nudge(_Message, frozen=True):
    """My reads from you stand still: see that your workers serve. Answered with `Nudged`."""

    engine_id: EngineId


# Prefill's answers.


class Welcome(_Message, frozen=True):
    """You may read from these ranks."""

    engine_id: EngineId
    ranks: tuple[RankInfo, ...]


class Refused(_Message, frozen=True):
    """You may not; `factor` differs. `prefill` and `decode` are the two values."""

    engine_id: EngineId
    factor: str
    prefill: str
    decode: str


class NotHere(_Message, frozen=True):
    """The engine you expect has ended; another one listens here now."""

    expected: EngineId


class Renewed(_Message, frozen=True):
    """Of the transfers you asked to keep, these are gone."""

    engine_id: EngineId
    lost: tuple[TransferId, ...]


class Released(_Message, frozen=True):
    """`ok`: the blocks were held until this moment, so what was read of them is right. Otherwise they were not. `sums`
    are what the blocks held when their prompt was complete, if that was asked for."""

    transfer_id: TransferId
    ok: bool
    sums: tuple[HeadSums, ...] = ()


class ProbeOpened(_Message, frozen=True):
    """You may read the probe memory of every rank; `digests` are of what lies there. The hold is yours to end."""

    engine_id: EngineId
    transfer_id: TransferId
    nonce: str
    digests: tuple[bytes, ...]


class Nudged(_Message, frozen=True):
    """I live, and my workers were told once more to serve."""

    engine_id: EngineId


# An engine's core to its workers.


class Progress(_Message, frozen=True):
    """Serve peers' connections and reads, or stop doing so."""

    active: bool


class ConnectPeer(_Message, frozen=True):
    """Get ready to read from that engine, whose ranks these are. Answered with `PeerState`."""

    engine_id: EngineId
    ranks: tuple[RankInfo, ...]


class DisconnectPeer(_Message, frozen=True):
    """Forget that engine."""

    engine_id: EngineId


class RebuildLinks(_Message, frozen=True):
    """That engine lives, and reads from it stand still: read over new links from those of its ranks."""

    engine_id: EngineId


class BeginRead(_Message, frozen=True):
    """Read these blocks of that engine into our own, pairwise in each group, now. Then make the digests that `verify`
    asks for, of what has arrived. Ends as one `ReadEnded`."""

    transfer_id: TransferId
    engine_id: EngineId
    local_blocks: BlockIds
    remote_blocks: BlockIds
    verify: DigestJob | None = None


class DigestBlocks(_Message, frozen=True):
    """Digest these of our own blocks. Answered with `BlocksDigested`."""

    job: DigestJob


class CancelRead(_Message, frozen=True):
    """Stop reading for this transfer. Its `ReadEnded` still comes."""

    transfer_id: TransferId


class FillProbe(_Message, frozen=True):
    """Give your probe memory content. Answered with `ProbeFilled`."""


class RunProbe(_Message, frozen=True):
    """Read the probe memory of that engine's ranks. `digests` are of theirs, in their order. Answered with
    `ProbeEnded`."""

    engine_id: EngineId
    digests: tuple[bytes, ...]


# A worker to its engine's core.


class PeerState(_Message, frozen=True):
    """Whether this worker can read from that engine; `error` is empty if so, `misfit` says that it never can."""

    engine_id: EngineId
    error: str = ""
    misfit: bool = False


class ReadEnded(_Message, frozen=True):
    """This worker's part of a read is over and nothing will be written any more. `error` is empty if all arrived."""

    transfer_id: TransferId
    num_bytes: int
    num_descriptors: int
    seconds: float
    error: str = ""
    sums: tuple[HeadSums, ...] = ()


class LinkStalled(_Message, frozen=True):
    """Nothing has come from that engine for so many limits of the watch (`link_watch`), although reads are under
    way."""

    engine_id: EngineId
    limits: int


class BlocksDigested(_Message, frozen=True):
    """This worker's part of the sums. Nothing can be compared with them if there is an `error`."""

    transfer_id: TransferId
    sums: tuple[HeadSums, ...]
    error: str = ""


class ProbeFilled(_Message, frozen=True):
    """What lies in this worker's probe memory."""

    digest: bytes


class ProbeEnded(_Message, frozen=True):
    """What this worker's part of a probe has found."""

    report: WorkerReport


ToPrefill = Hello | Renew | Release | Forbid | OpenProbe | Nudge
FromPrefill = Welcome | Refused | NotHere | Renewed | Released | ProbeOpened | Nudged
ToWorker = (
    Progress
    | ConnectPeer
    | DisconnectPeer
    | RebuildLinks
    | BeginRead
    | CancelRead
    | DigestBlocks
    | FillProbe
    | RunProbe
)
FromWorker = PeerState | ReadEnded | LinkStalled | BlocksDigested | ProbeFilled | ProbeEnded

to_prefill: msgspec.msgpack.Decoder[ToPrefill] = msgspec.msgpack.Decoder(ToPrefill)
from_prefill: msgspec.msgpack.Decoder[FromPrefill] = msgspec.msgpack.Decoder(FromPrefill)
to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)

encode = msgspec.msgpack.encode


def decode_or_none(decoder: msgspec.msgpack.Decoder[M], frames: list[bytes]) -> M | None:
    """Decode a one-frame message; None for anything malformed, which a caller counts and drops."""
    if len(frames) != 1:
        return None
    try:
        return decoder.decode(frames[0])
    except (ValueError, RecursionError):  # msgspec raises its own ValueErrors, and UnicodeDecodeError too
        return None
