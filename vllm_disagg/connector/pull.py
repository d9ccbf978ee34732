"""One decode request's KV on its way here, as a value that changes only by named events.

announced --expect--> reading --all ranks ended--> proving --released ok--> settled (received)
    |                    |                            |`----- anything else -> settled (failed)
    |                    |`-- error, deadline, lost, cancel: settled (failed or cancelled) --> draining --> over
    |`-- forget, lost: over
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vllm_disagg.core.types import EngineId, TransferId

Phase = Literal["announced", "reading", "proving", "draining"]
Result = Literal["received", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a pull ended for the request that waited for it. Sent exactly once per expected pull.

    Attributes:
        result: only `received` proves that the blocks hold this prompt's KV.
        cause: label of the failure in the metrics; empty when received.
        draining: the blocks may still be written: keep them out of use until `Drained`.
        num_bytes, num_descriptors: what the ranks read, summed.
        read_s: slowest rank's read, seconds.
        prove_s: from the end of the read to prefill's word, seconds.
        at_s: when it was received, on the monotonic clock.
    """

    transfer_id: TransferId
    result: Result
    cause: str = ""
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
    renew_interval_s: float = math.inf
    phase: Phase = "announced"
    expected_s: float = 0.0
    deadline_s: float | None = None
    waiting: set[int] = field(default_factory=set)
    error: str = ""
    num_bytes: int = 0
    num_descriptors: int = 0
    read_s: float = 0.0
    proving_since_s: float = 0.0

    def settled(self, result: Result, cause: str = "", *, now_s: float = 0.0) -> Settled:
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
