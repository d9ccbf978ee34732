"""The scheduler of a prefill instance: whole prompts, up to L_m tokens a step, in the order that was chosen."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_disagg.core.scheduling.order import Prompt, order, own_s
from vllm_disagg.core.scheduling.packing import LOOK_AHEAD, backlog_limit, even_limit, is_full, pack
from vllm_disagg.scheduler.planned import BATCH_TOKENS, PlannedMixin

if TYPE_CHECKING:
    from vllm.v1.request import Request

PAUSES = "vllm_disagg_sched_admission_pauses_total"

_TOKENS_PER_S = 10_000.0
"""How fast prompts are computed, as long as nothing is known. Only their order depends on it."""


class PrefillMixin(PlannedMixin):
    """Gives held blocks back to the pool before each step (`SafetyMixin.schedule`), and packs prompts (`plan`).

    A prompt that vLLM cannot compute in one step, since it exceeds `max_num_batched_tokens`, is cut by vLLM, and
    nothing else is admitted beside the rest of it but what L_m leaves. A request that wants more than one token is
    served to its end like anywhere else: so a prefill instance can stand in for a whole deployment.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stages = self.parallel_config.pipeline_parallel_size
        self._is_paused = False

    def hold_back(self, now_s: float) -> bool:
        """Nobody is admitted while decode's KV takes up its share of the cache, whoever orders the prompts: prefill's
        memory is the queue in front of decode, and this is where it ends."""
        usable = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        paused = bool(self.waiting) and is_full(self.connector.num_held_blocks, self.settings.held_share, usable)
        if paused and not self._is_paused:
            self.stats.count(PAUSES)
        self._is_paused = paused
        if paused or not self._plans:
            self.waits_for(("held_kv",) if paused else (), now_s)
        return paused

    def plan(self, line: Sequence[Request], now_s: float) -> Sequence[Request]:
        """See `PlannedMixin.plan`."""
        limit = self.batch_tokens
        self.stats.gauge(BATCH_TOKENS, limit)
        if not line:
            self.waits_for((), now_s)
            return line
        pool = self.kv_cache_manager.block_pool
        from vllm.v1.request import RequestStatus

        ready = [item for item in line if item.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)]
        others = [item for item in line if item.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED)]
        prompts = [self._prompt(item) for item in ready]
        places = order(prompts, self.settings.prefill_order, now_s=now_s, patience_s=self.settings.patience_s)[
            :LOOK_AHEAD
        ]
        costs = [self._cost(ready[place]) for place in places]
        under_way = sum(self._rest(item) for item in self.running)
        most = limit if self.settings.batch_tokens else self.max_num_scheduled_tokens
        limit = backlog_limit(sum(ready[place].num_tokens for place in places), limit, most, self._stages)
        limit = even_limit(sum(tokens for tokens, _ in costs), limit_tokens=limit, stages=self._stages) - under_way
        head = self.facts_of(ready[places[0]]) if places else None
        packed = pack(
            costs,
            limit_tokens=limit,
            free_blocks=pool.get_num_free_blocks() - self.kv_cache_manager.watermark_blocks * bool(self.running),
            passes=head.passes if head else 0,
        )
        if head is not None and packed.head_passed:
            head.passes += 1
        if not packed.chosen and not self.running and not self.connector.num_held_blocks:
            return line  # nothing will be given back that could be waited for
        blocked = bool(costs) and limit > 0 and (packed.head_passed or not packed.chosen)
        self.waits_for(("memory",) if blocked else (), now_s)
        return [*(ready[places[chosen]] for chosen in packed.chosen), *others]

    @property
    def batch_tokens(self) -> int:
        """L_m as it is known now; as many tokens as a step can have while nothing is known."""
        most = int(self.max_num_scheduled_tokens)
        return min(most, self.settings.batch_tokens or self.measure.batch_tokens or most)

    def _rest(self, request: Request) -> int:
        """Tokens that a running request still wants of this step."""
        return max(0, int(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens))

    def _prompt(self, request: Request) -> Prompt:
        facts = self.facts_of(request)
        return Prompt(
            arrived_s=facts.arrived_s,
            run_s=self._run_s(request.num_tokens),
            deadline_s=facts.arrived_s + facts.hints.ttft_s,
            priority=facts.hints.priority,
        )

    def _run_s(self, tokens: int) -> float:
        """How long the device works on a prompt, as far as that is known."""
        latency = self.measure.latency
        if latency is None:
            return tokens / _TOKENS_PER_S
        regime = next(regime for regime in latency.prefill if tokens <= regime.up_to)
        return own_s(tokens, self.batch_tokens, regime.constant_s, regime.per_token_s, regime.per_area_s)

    def _cost(self, request: Request) -> tuple[int, int]:
        """`(tokens, blocks)`: what it has to compute, and what it takes out of the free blocks.

        vLLM looks its cache up itself when the request's turn comes; this is to know the size of the batch beforehand.
        """
        pool, size = self.kv_cache_manager.block_pool, self.block_size
        blocks = -(-request.num_tokens // size)
        hit = in_use = 0
        if pool.enable_caching and not request.skip_reading_prefix_cache:
            for block_hash in itertools.islice(request.block_hashes, (request.num_tokens - 1) // size):
                found = pool.get_cached_block(block_hash, [0])
                if found is None:
                    break
                hit += 1
                in_use += found[0].ref_cnt > 0
        return request.num_tokens - hit * size, blocks - in_use
