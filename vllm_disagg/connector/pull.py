"""One decode request's KV on its way here, as a value that changes only by named events.

announced --expect--> reading --all ranks ended--> proving --released ok--> settled (received)
    |                    |                            |`----- anything else -> settled (failed)
    |                    |`-- error, deadline, lost, cancel: settled (failed or cancelled) --> draining --> over
    |`-- forget, lost: over
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vllm_disagg.config import VerifyMode
from vllm_disagg.core.types import EngineId, TransferId
from vllm_disagg.core.verify import HeadSums, added, chosen, differing

Phase = Literal["announced", "reading", "proving", "draining"]
Result = Literal["received", "failed", "cancelled"]
Cause = Literal[
    "lease_expired", "pull_timeout", "transport", "peer_lost", "peer_silent", "peer_resting", "peer_unreachable",
    "incompatible", "handshake_timeout", "kv_mismatch", "prefix_evicted", "misplaced", "overdue",
    "client_left",
]  # fmt: skip
"""Why a pull came to nothing: a metric label, but for the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a pull ended for the request that waited for it. Sent exactly once per expected pull.

    Attributes:
        result: only `received` proves that the blocks hold this prompt's KV.
        cause: label of the failure in the metrics; None when received.
        draining: the blocks may still be written: keep them out of use until `Drained`.
        num_bytes, num_descriptors: what the ranks read, summed.
        read_s: slowest rank's read, seconds.
        prove_s: from the end of the read to prefill's word, seconds.
        at_s: when it was received, on the monotonic clock.
    """

    transfer_id: TransferId
    result: Result
    cause: Cause | None = None
    draining: bool = False
    num_bytes: int = 0
    num_descriptors: int = 0
    read_s: float = 0.0
    prove_s: float = 0.0
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing will be written to the blocks of this settled pull any more."""

    transfer_id: TransferId


@dataclass(slots=True, kw_only=True)
class Pull:
    """State of one pull; owned by the decode control thread."""

    transfer_id: TransferId
    engine_id: EngineId
    nonce: str = ""
    verify: VerifyMode = "off"
    num_blocks: int = 0
    first_block: int = 0
    renew_interval_s: float = math.inf
    phase: Phase = "announced"
    expected_s: float = 0.0
    deadline_s: float | None = None
    waiting: set[int] = field(default_factory=set)
    error: Cause | None = None
    num_bytes: int = 0
    num_descriptors: int = 0
    read_s: float = 0.0
    proving_since_s: float = 0.0
    sums: dict[int, list[Sequence[HeadSums]]] = field(default_factory=dict)

    def differs(self, theirs: Sequence[HeadSums]) -> str:
        """Where what our ranks have read is not what prefill had computed; empty if nowhere, or not looked at. Ranks
        of one tensor-parallel index hold different layers of the same heads."""
        compared = chosen(self.verify, self.nonce, self.num_blocks, first=self.first_block)
        if not compared:
            return ""
        offered = chosen(self.verify, self.nonce, self.num_blocks)
        found = (differing(added(stages), theirs, compared=compared, offered=offered) for stages in self.sums.values())
        return next((text for text in found if text), "") if self.sums else "nothing was compared"

    def settled(self, result: Result, cause: Cause | None = None, *, now_s: float = 0.0) -> Settled:
        """The report for the request that waits."""
        return Settled(
            transfer_id=self.transfer_id,
            result=result,
            cause=cause,
            draining=bool(self.waiting),
            num_bytes=self.num_bytes,
            num_descriptors=self.num_descriptors,
            read_s=self.read_s,
            prove_s=max(0.0, now_s - self.proving_since_s) if self.phase == "proving" else 0.0,
            at_s=now_s,
        )
