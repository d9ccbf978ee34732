"""What prefill's workers say that a hold's blocks contain, until decode asks."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_disagg.connector.messages import BlocksDigested, Release
from vllm_disagg.core.verify import HeadSums, added


@dataclass(slots=True)
class Voucher:
    """The digests of one hold.

    Attributes:
        waiting: workers that have not answered.
        asked: the release that is to be answered with the sums, and who sent it.
        parts: what the workers said, by tensor-parallel index: those of one index hold different layers.
        failed: a worker could not tell. There are no sums then.
    """

    waiting: set[int]
    asked: tuple[bytes, Release] | None = None
    parts: dict[int, list[tuple[HeadSums, ...]]] = field(default_factory=dict)
    failed: bool = False

    def add(self, worker: int, tp_rank: int, told: BlocksDigested) -> None:
        """A worker has answered."""
        self.waiting.discard(worker)
        self.parts.setdefault(tp_rank, []).append(told.sums)
        self.failed = self.failed or bool(told.error)

    @property
    def sums(self) -> tuple[HeadSums, ...]:
        """Each head once, also where several ranks hold the same."""
        if self.failed or self.waiting:
            return ()
        found = {(item.group, item.head): item for stages in self.parts.values() for item in added(stages)}
        return tuple(found.values())
