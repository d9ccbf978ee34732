"""Which requests still try a peer whose reads have failed: none for a while, then one at a time.

    trusted --a read timed out, or several failed in a row--> resting --time is over--> probing --read proven--> trusted
                                                                 ^-----the probe failed, rest twice as long-----'

A peer can answer every greeting and still give no bytes, where only the way between workers is cut. Without this each
of its requests would wait for its own deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_disagg.core.types import TransferId

STRIKES = 2
"""Failed reads in a row that make a peer rest; a single one may be an accident, and costs no time."""

FIRST_REST_S, LAST_REST_S = 1.0, 30.0
PROBE_S = 5.0
"""How long one request may keep the others waiting for its outcome, before another one probes instead."""


@dataclass(slots=True)
class Quarantine:
    """One peer's standing. Its owner has one thread and says what time it is."""

    num_strikes: int = 0
    num_rests: int = 0
    rests_until_s: float | None = None
    probe: TransferId | None = None
    probe_until_s: float = 0.0

    @property
    def is_resting(self) -> bool:
        """Whether only the probe may read."""
        return self.rests_until_s is not None

    def admits(self, transfer_id: TransferId, *, now_s: float) -> bool:
        """Whether this transfer may be tried. After the rest the first one that asks is the probe."""
        if self.rests_until_s is None:
            return True
        if now_s >= self.rests_until_s and (self.probe is None or now_s >= self.probe_until_s):
            self.probe, self.probe_until_s = transfer_id, now_s + PROBE_S
        return self.probe == transfer_id

    def failed(self, transfer_id: TransferId, *, timed_out: bool, now_s: float) -> bool:
        """A read from the peer came to nothing. Returns whether the peer begins to rest with it; reads that were
        under way when it did add nothing to its rest."""
        if self.is_resting and transfer_id != self.probe:
            return False
        self.num_strikes += 1
        if not (timed_out or self.is_resting or self.num_strikes >= STRIKES):
            return False
        self.rests_until_s = now_s + min(LAST_REST_S, FIRST_REST_S * 2**self.num_rests)
        self.num_rests += 1
        self.probe = None
        return True

    def proven(self) -> None:
        """A read from the peer was good."""
        self.num_strikes = self.num_rests = 0
        self.rests_until_s = self.probe = None

    def undecided(self, transfer_id: TransferId) -> None:
        """A transfer has ended without saying anything about the peer: if it was the probe, another one is needed."""
        if self.probe == transfer_id:
            self.probe = None
