"""What `vllm-disagg doctor` asks of engines, and what they answer. Version history:

1  first version

An order travels over HTTP and is signed with the deployment key, so that only its holders can make engines do
something. It names the run of the engine it is for and a nonce; an engine obeys each order once.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vllm_disagg.core.signed import sign, verified
from vllm_disagg.core.types import EngineId
from vllm_disagg.errors import ConfigError

PROBE_VERSION = 1
PROBE_PATH = "/disagg/probe"
PROBE_LIMIT_S = 80.0
"""The longest that a probe of one pair takes, whatever its engines do."""

MAX_ORDER_BYTES = 4096
_PURPOSE = "probe-order"


class _Word(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all: a closed schema."""


class ProbeOrder(_Word, frozen=True):
    """What an engine is to do.

    Attributes:
        task: `identify`: say who you are. `pair`: probe the path from a prefill engine to you; for decode engines.
        nonce: of this order.
        engine_id: the run of the engine that is asked; empty for `identify`.
        prefill_id, control: the prefill engine to read from, and its control channel; empty for `identify`.
    """

    version: int
    task: Literal["identify", "pair"]
    nonce: str
    engine_id: EngineId = EngineId("")
    prefill_id: EngineId = EngineId("")
    control: str = ""


class Identity(_Word, frozen=True):
    """An engine's answer to `identify`.

    Attributes:
        control: of a prefill engine: its control channel; empty on decode.
        transport: how its KV travels, `auto` resolved.
        facts: of its host and environment, see `core.host`.
    """

    role: str
    engine_id: EngineId
    control: str
    transport: str
    fingerprint: dict[str, str]
    facts: dict[str, str]


class ReadTiming(_Word, frozen=True):
    """Reading `num_copies` copies of `copy_bytes` each, none of which follows another one; the median of some times."""

    copy_bytes: int
    num_copies: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        """Rate of the read."""
        return self.copy_bytes * self.num_copies / self.seconds if self.seconds > 0 else 0.0


class SourceReport(_Word, frozen=True):
    """One of decode's workers reading from one of prefill's.

    Attributes:
        peer: the other worker, by its transport's name.
        wire: what the bytes really travel on, as the transport says (`WireInfo.wire`); `unknown` where it cannot.
        carrier: whose implementation that is: `nixl`, `nccl`, `loopback`.
        sent_by_owner: whether prefill's process has to send the bytes; None where nobody can tell.
        evidence: how the transport knows.
        first_read_s: a small read, with whatever it took to connect.
        reads: at several sizes of copies.
        intact: the bytes read are those that prefill owns, in one piece and in pieces that were read in another order.
        error: why it ended early.
    """

    peer: str
    wire: str = "unknown"
    carrier: str = ""
    sent_by_owner: bool | None = None
    evidence: str = ""
    first_read_s: float = 0.0
    reads: tuple[ReadTiming, ...] = ()
    intact: bool = False
    error: str = ""


class WorkerReport(_Word, frozen=True):
    """What one of decode's workers found. `copy_bytes_per_s`: a copy within its own memory, for comparison."""

    sources: tuple[SourceReport, ...] = ()
    copy_bytes_per_s: float = 0.0
    error: str = ""


class LeaseReport(_Word, frozen=True):
    """What prefill said of a hold that was made for this probe. No clock is looked at: each answer follows from the
    words before it.

    Attributes:
        renews: it was there when the reads had ended.
        guarded: a release with a wrong nonce did not end it.
        proves: its own release did, and said so.
        single_use: a second release and a renewal were told that it was gone.
    """

    renews: bool
    guarded: bool
    proves: bool
    single_use: bool

    @property
    def good(self) -> bool:
        """Whether all is as it must be."""
        return self.renews and self.guarded and self.proves and self.single_use


Stage = Literal["done", "greeting", "opening", "connecting", "reading", "proving"]


class PairReport(_Word, frozen=True):
    """A decode engine's answer to `pair`.

    Attributes:
        stage: how far it came; `done` when nothing stopped it.
        cause: why it stopped, as in the metric `vllm_disagg_kv_failures_total`.
        factor, prefill, decode: where prefill refused us: what differs, and the two values.
        error: details for people.
        greeting_s: from opening a control connection to prefill's welcome.
        round_trips_s: of the control channel.
        lease: None where it did not come to that.
    """

    stage: Stage
    cause: str = ""
    factor: str = ""
    prefill: str = ""
    decode: str = ""
    error: str = ""
    greeting_s: float = 0.0
    round_trips_s: tuple[float, ...] = ()
    workers: tuple[WorkerReport, ...] = ()
    lease: LeaseReport | None = None


class OrderRefused(ConfigError):
    """An order that this engine does not obey. `signed`: it came from a holder of the deployment key."""

    def __init__(self, text: str, *, signed: bool) -> None:
        self.signed = signed
        super().__init__(text)


def sign_order(order: ProbeOrder, key: bytes) -> bytes:
    """An order's way through HTTP."""
    return sign(msgspec.msgpack.encode(order), key, _PURPOSE)


def check_order(raw: bytes, key: bytes) -> ProbeOrder:
    """Check and decode an order.

    Raises:
        OrderRefused: anything but an order that `sign_order` made with the same key, in this version.
    """
    body = verified(raw, key, _PURPOSE, max_bytes=MAX_ORDER_BYTES)
    if body is None:
        raise OrderRefused("not signed with this deployment's key", signed=False)
    try:
        order = msgspec.msgpack.decode(body, type=ProbeOrder)
    except (ValueError, RecursionError) as error:
        raise OrderRefused("the order has another layout: run the same vllm_disagg everywhere", signed=True) from error
    if order.version != PROBE_VERSION:
        raise OrderRefused(f"the order has version {order.version}; this engine obeys {PROBE_VERSION}", signed=True)
    return order
