"""Blocks set aside for KV whose request vLLM's scheduler has not seen yet.

A request that arrives within a step waits for the step's end before it is given blocks, and its KV could be here by
then. So while the engine is busy some free blocks are taken out of vLLM's pool ahead of time, and a read that begins
on arrival goes into those.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_disagg.core.scheduling.reserve import RECENT_PROMPTS, reserve_target

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthOutlook:
    """What a decode engine expects its requests to grow by, in blocks.

    Attributes:
        num_promised: those that hold blocks now, at the time when they need most.
        each: one that is still to come, unless its own limit is shorter.
    """

    num_promised: int = 0
    each: int = 0


class Reserve:
    """The blocks set aside. `expect`, `take` and `put_back` may be called on any thread, the rest on vLLM's main
    thread.

    Args:
        age: steps for which a block lies in reserve before it is given out. A step that is under way may still write
            to blocks that were freed meanwhile; there are so many besides the one being scheduled.
    """

    def __init__(self, *, age: int) -> None:
        self._age = age
        self._pool: BlockPool | None = None
        self._lock = threading.Lock()
        self._usable: list[int] = []
        self._ageing: deque[list[int]] = deque([] for _ in range(age))
        self._recent: deque[int] = deque(maxlen=RECENT_PROMPTS)
        self._num_lent = 0
        self._num_roomy = 0
        self._outlook = GrowthOutlook()
        self._closed = False

    def bind(self, pool: BlockPool) -> bool:
        """Use this pool. False, and no reserve ever, if it does not give freed blocks out again first and in order:
        that is how blocks with early KV get to their request."""
        if not _gives_back_in_order(pool):
            return False
        self._pool = pool
        return True

    def expect(self, num_blocks: int) -> None:
        """A prompt has come that wants so many blocks: others like it may follow."""
        with self._lock:
            self._recent.append(num_blocks)

    def take(self, num_blocks: int, *, most_growth: int = 0) -> tuple[int, ...]:
        """So many blocks out of the reserve; empty if there are not, or if the request's growth would find no room.

        Args:
            num_blocks: of its prompt.
            most_growth: blocks that it may grow by at most.
        """
        with self._lock:
            wanted = num_blocks + min(most_growth, self._outlook.each)
            if self._closed or len(self._usable) < num_blocks or self._num_roomy < wanted:
                return ()
            self._num_roomy -= wanted
            taken = self._usable[-num_blocks:]
            del self._usable[-num_blocks:]
            self._num_lent += num_blocks
            return tuple(taken)

    def take_free(self, num_blocks: int) -> tuple[int, ...]:
        """So many blocks that nobody uses, straight from vLLM's pool; empty if there are not. Only while no step is
        under way, which could still write to some of them. Whether there is room for growth is not looked at."""
        pool = self._pool
        if pool is None or self._closed or pool.get_num_free_blocks() < num_blocks:
            return ()
        taken = tuple(block.block_id for block in pool.get_new_blocks(num_blocks))
        with self._lock:
            self._num_lent += num_blocks
        return taken

    def put_back(self, blocks: Sequence[int]) -> None:
        """Blocks that were taken and never used."""
        with self._lock:
            self._usable.extend(blocks)
            self._num_lent -= len(blocks)

    def returned(self, num_blocks: int) -> None:
        """So many taken blocks are vLLM's again, or are freed."""
        with self._lock:
            self._num_lent -= num_blocks

    def close(self) -> None:
        """Give out nothing any more; what lies in reserve goes back with the next step."""
        with self._lock:
            self._closed = True

    def step(self, *, num_running: int, outlook: GrowthOutlook, num_early: int = 0) -> None:
        """Before each step: set more aside, or give some back.

        Args:
            num_running: requests whose next step may want a block each.
            outlook: what requests are expected to grow by.
            num_early: requests that were fetched early and have no blocks of their own yet.
        """
        pool = self._pool
        if pool is None:
            return
        with self._lock:
            self._ageing.append([])
            self._usable.extend(self._ageing.popleft())
            num_reserved = len(self)
            target = reserve_target(
                num_free=pool.get_num_free_blocks(),
                num_reserved=num_reserved,
                num_lent=self._num_lent,
                longest=max(self._recent, default=0),
                num_running=0 if self._closed else num_running,
                num_promised=outlook.num_promised,
            )
            self._outlook = outlook
            promised = outlook.num_promised + num_early * outlook.each
            self._num_roomy = max(0, pool.get_num_free_blocks() + num_reserved - promised)
            if target > num_reserved:
                fresh = [block.block_id for block in pool.get_new_blocks(target - num_reserved)]
                (self._ageing[-1] if self._age else self._usable).extend(fresh)
            surplus = self._withdraw(num_reserved - target)
        pool.free_blocks([pool.blocks[block] for block in surplus])

    def __len__(self) -> int:
        return len(self._usable) + sum(map(len, self._ageing))

    def _withdraw(self, num_blocks: int) -> list[int]:
        surplus: list[int] = []
        for stock in (*reversed(self._ageing), self._usable):
            number = max(0, min(num_blocks - len(surplus), len(stock)))
            surplus.extend(stock[:number])
            del stock[:number]
        return surplus


def _gives_back_in_order(pool: BlockPool) -> bool:
    if pool.get_num_free_blocks() < 3:
        return False
    first, second, third = pool.get_new_blocks(3)
    pool.free_blocks([third, first, second])
    again = pool.get_new_blocks(3)
    pool.free_blocks([first, second, third])
    return bool(again == [third, first, second])
