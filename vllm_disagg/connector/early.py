"""Early fetches: KV that comes before vLLM's scheduler has looked at its request, into blocks that become the request's
own when it does. While a step runs they are taken out of the reserve; on an idle engine, straight from vLLM's pool."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.fetch import Fetch, Handoffs
from vllm_disagg.connector.messages import BeginRead
from vllm_disagg.connector.request_facts import kv_params
from vllm_disagg.connector.reserve import GrowthOutlook, Reserve
from vllm_disagg.core.lifetime import Lives
from vllm_disagg.core.types import BlockIds
from vllm_disagg.errors import InvalidHandoff

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class EarlyFetches:
    """Begins them, and hands their blocks over. Only `on_arrival` may be called on any thread; the rest on vLLM's main
    thread.

    Args:
        control: the control thread.
        handoffs: which are taken.
        lives: of this engine's requests.
        reserve: blocks for early KV; None to fetch nothing early.
    """

    def __init__(self, *, control: DecodeControl, handoffs: Handoffs, lives: Lives, reserve: Reserve | None) -> None:
        self._control, self._handoffs, self._lives, self._reserve = control, handoffs, lives, reserve
        self._block_size = handoffs.block_size
        self._arrived: dict[str, Fetch] = {}
        self._kept: Counter[int] = Counter()
        """Our references on cached blocks."""
        self._pool: BlockPool | None = None

    def bind_block_pool(self, pool: BlockPool) -> None:
        """vLLM's block pool, once it exists."""
        self._pool = pool
        if self._reserve is not None and not self._reserve.bind(pool):
            logger.warning("early.off: this vLLM's block pool does not give out first what was freed last")
            self._reserve = None

    def on_arrival(self, request: Request) -> None:
        """The request has come in while a step is running: begin to fetch if there is room. What is wrong with its
        handoff is told when vLLM's main thread hears of it."""
        self._fetch(request, idle=False)

    def on_idle_arrival(self, request: Request) -> None:
        """The same of a request that vLLM's main thread is about to hear of, while no step is under way and there is
        room for it."""
        if request.request_id not in self._arrived:
            self._fetch(request, idle=True)

    def _fetch(self, request: Request, *, idle: bool) -> None:
        params = kv_params(request)
        if self._reserve is None or not params.get("do_remote_prefill"):
            return
        try:
            handoff = self._handoffs.checked(request, params.get("handoff"))
        except InvalidHandoff:
            return
        cached = self._cached_blocks(request)
        first = len(cached)
        if handoff.num_tokens - first * self._block_size <= 1:
            return
        remote = handoff.block_ids[0][first:]
        if not idle:
            self._reserve.expect(len(remote))
        if self._control.readiness(handoff)[0] != "ready":
            return
        kept = self._keep(cached) if idle else ()
        if idle:
            blocks = self._reserve.take_free(len(remote))
        else:
            blocks = self._reserve.take(len(remote), most_growth=-(-request.max_tokens // self._block_size))
        if blocks and not self._handoffs.use(handoff):
            self._reserve.put_back(blocks)
            blocks = ()
        if not blocks:
            self._let_go(kept)
            return
        now_s = time.monotonic()
        self._arrived[request.request_id] = Fetch(
            request_id=request.request_id,
            handoff=handoff,
            state=self._lives.step(self._lives.begin("accepted"), "reserved"),
            announced_s=now_s,
            early=True,
            blocks=(blocks,),
            first=first,
            kept=kept,
            parked_s=now_s,
        )
        read = BeginRead(
            transfer_id=handoff.transfer_id,
            engine_id=handoff.engine_id,
            local_blocks=(blocks,),
            remote_blocks=(remote,),
            verify=self._handoffs.to_verify(handoff, (blocks,), first),
        )
        self._control.begin(handoff, read, first_block=first)

    def take_arrived(self) -> list[Fetch]:
        """Those that began since the last call."""
        return [self._arrived.pop(request_id) for request_id in list(self._arrived)]

    @property
    def num_arrived(self) -> int:
        """How many `take_arrived` would return."""
        return len(self._arrived)

    def match(self, fetch: Fetch, num_computed_tokens: int) -> int | None:
        """How many tokens are here beyond vLLM's own prefix hit; None while they are on their way."""
        if fetch.settled is None:
            return None
        if not fetch.refused and fetch.first * self._block_size > num_computed_tokens:
            fetch.refused = "prefix_evicted"
        if fetch.refused:
            return 0
        return max(0, fetch.handoff.num_tokens - 1 - num_computed_tokens)

    def lend(self, fetch: Fetch, num_local_tokens: int) -> bool:
        """See `DecodeSide.lend`."""
        if not fetch.blocks or self._pool is None:
            return False
        assert self._reserve is not None
        spare = num_local_tokens // self._block_size - fetch.first
        self._reserve.returned(spare)
        free_blocks(self._pool, (fetch.blocks[0][:spare],))
        fetch.blocks, fetch.first = (fetch.blocks[0][spare:],), fetch.first + spare
        self._pool.free_blocks([self._pool.blocks[block] for block in fetch.blocks[0]])
        return True

    def lent(self, fetch: Fetch, block_ids: tuple[list[int], ...] | None) -> bool:
        """See `DecodeSide.lent`."""
        assert self._pool is not None and self._reserve is not None
        blocks = fetch.blocks[0]
        if block_ids is None:
            again = [block.block_id for block in self._pool.get_new_blocks(len(blocks))]
            if again == list(blocks):
                return True
            self._pool.free_blocks([self._pool.blocks[block] for block in again])
        elif tuple(block_ids[0][fetch.first : fetch.first + len(blocks)]) == blocks[: len(block_ids[0]) - fetch.first]:
            self._reserve.returned(len(blocks))
            self._let_go_of_prefix(fetch)
            fetch.blocks = ()
            return True
        logger.error("early.misplaced request=%s: no more early fetches", fetch.request_id)
        self._reserve.returned(len(blocks))
        self._let_go_of_prefix(fetch)
        self._reserve.close()
        fetch.blocks = ()
        fetch.refused = "misplaced"
        return False

    def give_back(self, fetch: Fetch) -> None:
        """Its blocks go back to the pool, unread."""
        if fetch.early and fetch.blocks:
            assert self._pool is not None
            free_blocks(self._pool, self.withdraw(fetch))

    def withdraw(self, fetch: Fetch) -> BlockIds:
        """Its blocks, which are the caller's now."""
        assert self._reserve is not None
        self._let_go_of_prefix(fetch)
        blocks, fetch.blocks = fetch.blocks, ()
        self._reserve.returned(len(blocks[0]))
        return blocks

    def before_step(self, *, num_running: int, outlook: GrowthOutlook, num_early: int) -> None:
        """Keep the reserve as large as it should be."""
        if self._reserve is not None:
            self._reserve.step(num_running=num_running, outlook=outlook, num_early=num_early)

    @property
    def num_kept(self) -> int:
        """Cached blocks that would be free without our references."""
        blocks = self._pool.blocks if self._pool is not None else ()
        return sum(blocks[block].ref_cnt == count for block, count in self._kept.items())

    def _keep(self, cached: Sequence[KVCacheBlock]) -> tuple[int, ...]:
        if not cached:
            return ()
        assert self._pool is not None
        self._pool.touch(cached)
        kept = tuple(block.block_id for block in cached)
        self._kept.update(kept)
        return kept

    def _let_go(self, kept: tuple[int, ...]) -> None:
        if kept:
            assert self._pool is not None
            self._kept -= Counter(kept)
            free_blocks(self._pool, (kept,))

    def _let_go_of_prefix(self, fetch: Fetch) -> None:
        kept, fetch.kept = fetch.kept, ()
        self._let_go(kept)

    def _cached_blocks(self, request: Request) -> list[KVCacheBlock]:
        """The prompt's first blocks, as far as vLLM's prefix cache holds them now. That may change where they are not
        kept."""
        if self._pool is None or not self._pool.enable_caching or request.skip_reading_prefix_cache:
            return []
        most = (request.num_prompt_tokens - 1) // self._block_size
        cached: list[KVCacheBlock] = []
        for block_hash in request.block_hashes[:most]:
            found = self._pool.get_cached_block(block_hash, [0])
            if found is None:
                break
            cached.append(found[0])
        return cached


def free_blocks(pool: BlockPool, blocks: BlockIds) -> None:
    """Give blocks back to vLLM's pool, the last ones of a prompt first, as it does itself."""
    for group in blocks:
        pool.free_blocks([pool.blocks[block] for block in reversed(group)])
