"""The scheduler of a decode instance: its streams keep their pace, and whoever is admitted stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_disagg.connector.reserve import GrowthOutlook
from vllm_disagg.core.scheduling.growth import (
    PROMISE_STEPS,
    OutputLengths,
    has_room,
    holding,
    next_headroom,
    promised_blocks,
)
from vllm_disagg.core.scheduling.pace import FLOOR_TOKENS, prompt_tokens_beside
from vllm_disagg.core.scheduling.victims import ahead_s, rank
from vllm_disagg.scheduler.planned import BATCH_TOKENS, PlannedMixin

if TYPE_CHECKING:
    from vllm.v1.request import Request

FIRST_TOKENS = 256
"""Prompt tokens of a step beside streams, while nothing is known of how long they take."""

Holdings = dict[str, tuple[int, int]]
"""`(held, growth)` by request id; see `growth.holding`."""

WITHOUT_ROOM = "vllm_disagg_sched_without_room_requests"
WITHOUT_ROOM_TOKENS = "vllm_disagg_sched_without_room_tokens"
RECOMPUTED = "vllm_disagg_sched_preempted_tokens_total"
FETCHED_AHEAD = "vllm_disagg_sched_fetched_ahead_total"


class DecodeMixin(PlannedMixin):
    """Learns before each step which requests have their KV (`SafetyMixin.schedule`), and plans it.

    Where vLLM is held on to: `_reserve_prefill_lookahead`, which it asks for each request how many of its tokens the
    step may have; `allocate_slots`, through which each admission goes; and the order of `running`, whose last one gives
    way first. vLLM calls the two for every stream in every step, so that ours stand in for them only in steps in which
    they have something to say (`_asked`).
    """

    max_num_active_reqs: int
    num_waiting_for_streaming_input: int
    _reserve_prefill_lookahead: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths = OutputLengths()
        self._headroom = 0.0
        self._num_preempted = 0
        self._prompt_tokens_left: int | None = None
        self._fetch_only = False
        self._holders: Holdings | None = None
        self._holdings_of_running: Holdings | None = None
        """Of this step, as far as they were looked at; nothing changes them before it has been scheduled."""
        self._running_at_first: list[Request] = []
        self._parked_at_first: list[Request] = []
        self._short_of_room = False
        self._num_without_room = 0
        self._without_token: list[Request] = []
        """Admitted ones whose first token has not been seen."""
        self._outlook = GrowthOutlook()
        self._outlook_of = -1
        self._max_active: int = self.max_num_active_reqs
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self._reserve_lookahead = self._reserve_prefill_lookahead

    def add_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """On an idle engine the request's KV is fetched at once: there is nothing that a step could do before."""
        if self._is_idle() and self._may_be_fetched_at_once(request):
            self.connector.on_idle_arrival(request)
        super().add_request(request, *args, **kwargs)

    def hold_back(self, now_s: float) -> bool:
        """Look at what the last step has left without room. Requests are held back one by one (`_allocate`)."""
        self._headroom = next_headroom(self._headroom, preempted=self._num_preempted)
        self._num_preempted = 0
        short, self._short_of_room = self._short_of_room, False
        waiting = [item for item in self.waiting if self._comes_from_prefill(item)] if short else []
        if waiting or self._num_without_room:
            self.stats.gauge(WITHOUT_ROOM, len(waiting))
            self.stats.gauge(WITHOUT_ROOM_TOKENS, sum(item.num_tokens for item in waiting))
        self._num_without_room = len(waiting) or int(short)
        if not self._plans:
            self.waits_for(("kv_growth",) if short else (), now_s)
        return False

    # The plan.

    def plan(self, line: Sequence[Request], now_s: float) -> Sequence[Request]:
        """See `PlannedMixin.plan`."""
        reasons = ["kv_growth"] if self._num_without_room else []
        self._without_token = [item for item in self._without_token if not self._note_first_token(item, now_s)]
        self._keep_who_cannot_afford_it(now_s)
        slots_are_taken = self._slots_are_taken()
        may_admit = not slots_are_taken and (bool(line) or bool(self.kv_holding_waiting))
        left = self._set_budget() if may_admit or self._computes_a_prompt() else None
        if slots_are_taken:
            seen = [item for item in line if self._is_fetch(item)]
            self._fetch_only = bool(seen)
            self.waits_for(reasons, now_s)
            return seen
        seen, kept = [], False
        for item in line:
            if left is None or not self._is_local(item):
                seen.append(item)
            elif left > 0:
                seen.append(item)
                left -= min(left, item.num_tokens)
            else:
                kept = True
        self.waits_for([*reasons, *(["pace"] if kept else [])], now_s)
        return seen

    def _forget_plan(self) -> None:
        self._prompt_tokens_left, self._fetch_only, self._holders = None, False, None
        # Now: while vLLM walks its queues, those that it has looked at are in none of them.
        self._running_at_first, self._parked_at_first = list(self.running), list(self.kv_holding_waiting)

    @contextmanager
    def _planned(self) -> Iterator[None]:
        self._let_early_ones_go_first()
        with super()._planned(), self._fetching() if self._fetch_only else nullcontext(), self._asked():
            yield

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        """Every run slot is taken. KV can be fetched all the same: parked requests do not run. So vLLM is told of one
        slot more, and of nobody but those whose KV is to be fetched; `_allocate` sees to it that no other gets in."""
        slots, ready = self._max_active, list(self.kv_holding_waiting)
        self.max_num_active_reqs = len(self.running) + self.num_waiting_for_streaming_input + 1
        self.kv_holding_waiting.clear()
        try:
            yield
        finally:
            self._fetch_only = False
            self.max_num_active_reqs = slots
            parked = list(self.kv_holding_waiting)
            self.kv_holding_waiting.clear()
            self.kv_holding_waiting.extend([*ready, *parked])
            self.stats.count(FETCHED_AHEAD, len(parked))

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """vLLM asks us about admissions in a step that may have some, and about prompts in one that has a budget."""
        allocate_slots, lookahead = self.kv_cache_manager.allocate_slots, self._reserve_prefill_lookahead
        if (self.waiting or self.kv_holding_waiting) and self._num_slots_taken() < self.max_num_active_reqs:
            self.kv_cache_manager.allocate_slots = self._allocate
        if self._prompt_tokens_left is not None:
            self._reserve_prefill_lookahead = self._within_budget
        try:
            yield
        finally:
            self.kv_cache_manager.allocate_slots = allocate_slots
            self._reserve_prefill_lookahead = lookahead

    def _let_early_ones_go_first(self) -> None:
        """Where nobody runs and nobody is parked, the only blocks in use are those with early KV. Whoever is first in
        line may want more than the others leave, and nobody but they would ever give some back."""
        if self.running or self.kv_holding_waiting or not self._is_fcfs:
            return
        here = [item for item in self.waiting if self.connector.outlook(item) == "here"]
        if here and len(here) < len(self.waiting):
            others = [item for item in self.waiting if item not in here]
            self.waiting.clear()
            self.waiting.extend([*here, *others])

    def _slots_are_taken(self) -> bool:
        return self._num_slots_taken() >= self._max_active

    def _num_slots_taken(self) -> int:
        return len(self.running) + self.num_waiting_for_streaming_input

    def _comes_from_prefill(self, request: Request) -> bool:
        """Whether its KV would be fetched, or lies here already and is not its own yet."""
        return self.connector.outlook(request) in ("fetch", "here")

    def _is_fetch(self, request: Request) -> bool:
        """Whether it would be parked until its KV has come."""
        if request.num_computed_tokens or request.skip_reading_prefix_cache or self._is_blocked(request):
            return False
        return bool(self.connector.outlook(request) == "fetch")

    def _is_local(self, request: Request) -> bool:
        """Whether its prompt, or all of its tokens after a preemption, will be computed here."""
        if request.num_computed_tokens or self._is_blocked(request):
            return False
        return bool(self.connector.outlook(request) == "local")

    def _is_blocked(self, request: Request) -> bool:
        return bool(self._is_blocked_waiting_status(request.status))

    # Pace: how much of prompts a step may have beside streams.

    def _computes_a_prompt(self) -> bool:
        """Whether a running request may have more to compute than its next token. Asked in each step, of every one:
        cheap."""
        most = 1 + self.num_spec_tokens
        return any(item.num_tokens - item.num_computed_tokens > most for item in self.running)

    def _note_first_token(self, request: Request, now_s: float) -> bool:
        """Whether a request has had its first token by now, or has ended."""
        facts = self.facts.get(request.request_id)
        if facts is None or facts.first_s is not None:
            return True
        if request.num_output_tokens:
            facts.first_s = now_s
            return True
        return False

    def _set_budget(self) -> int | None:
        """Reckon how many prompt tokens this step may have, and keep to it.

        Returns:
            What the running prompts leave of them to those that wait; None for as many as vLLM likes.
        """
        if not self.scheduler_config.enable_chunked_prefill:
            return None
        prompts: list[Request] = []
        streams: list[Request] = []
        for request in self.running:
            (prompts if self._is_prompt(request) else streams).append(request)
        if not streams:
            return None
        budget = self._prompt_tokens_left = self._budget(streams, prompts)
        self.stats.gauge(BATCH_TOKENS, budget)
        return budget - sum(min(self._rest(item), budget) for item in prompts)

    def _budget(self, streams: Sequence[Request], prompts: Sequence[Request]) -> int:
        """Prompt tokens of a step with these running requests."""
        most: int = max(FLOOR_TOKENS, self.max_num_scheduled_tokens - len(streams))
        latency = self.measure.latency
        if latency is None:
            return min(most, FIRST_TOKENS)
        if not self.measure.trusted:  # a fit is not asked about steps much larger than those it was made of
            most = min(most, max(FIRST_TOKENS, 2 * self.measure.most_prompt_tokens))
        return prompt_tokens_beside(
            latency,
            num_decodes=len(streams),
            decode_context=sum(item.num_computed_tokens + 1 for item in streams),
            target_s=min(self.settings.slo_tpot_s, *(self.facts_of(item).hints.tpot_s for item in streams)),
            computed=prompts[0].num_computed_tokens if prompts else 0,
            floor=min(FLOOR_TOKENS, most),
            ceiling=most,
        )

    def _is_prompt(self, request: Request) -> bool:
        return bool(self._rest(request) > 1 + self.num_spec_tokens)

    def _rest(self, request: Request) -> int:
        rest: int = request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
        return rest

    def _within_budget(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """`_reserve_prefill_lookahead`: how many of a request's tokens the step may have. What vLLM thinks, within what
        is left of the budget."""
        left = self._prompt_tokens_left
        if left is not None and num_new_tokens > 1 + self.num_spec_tokens:
            num_new_tokens = min(num_new_tokens, left)
            self._prompt_tokens_left = left - num_new_tokens
        return int(self._reserve_lookahead(request, num_computed_tokens, num_new_tokens, *args, **kwargs))

    # Memory: who is admitted, who gives way.

    def _allocate(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, *args: Any, **kwargs: Any
    ) -> Any:
        """`KVCacheManager.allocate_slots`; who is not running yet gets blocks only if there is room for its growth, and
        a request whose KV came early gets the blocks that it came into. Where vLLM plans, that is so for requests whose
        KV comes from prefill: the others it admits as it likes."""
        if request.status == RequestStatus.RUNNING:
            return self._allocate_slots(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)
        admission = self._plans or (self._presses_back and bool(kwargs.get("num_external_computed_tokens")))
        if admission and not self._may_come_in(request, parks=bool(kwargs.get("delay_cache_blocks"))):
            return None
        blocks = self._allocate_lent(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)
        if admission and blocks is not None:
            if self._plans:
                self._without_token.append(request)
            if self._holders is not None:
                self._holders[request.request_id] = self._expected(request)
        return blocks

    def _allocate_lent(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        external = kwargs.get("num_external_computed_tokens", 0)
        if not external or not self.connector.lend(request, num_new_computed_tokens):
            return self._allocate_slots(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)
        blocks = self._allocate_slots(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)
        block_ids = None if blocks is None else self.kv_cache_manager.get_block_ids(request.request_id)
        if not self.connector.lent(request, block_ids) and block_ids is not None:
            # Not the blocks with its KV: nobody may find it in the prefix cache, and it is computed here instead.
            self.kv_cache_manager.block_pool.evict_blocks({block for group in block_ids for block in group})
            self.kv_cache_manager.free(request)
            return None
        return blocks

    def _may_come_in(self, request: Request, *, parks: bool) -> bool:
        if self._fetch_only and not parks:
            return False
        if request.num_computed_tokens or request in self.kv_holding_waiting:
            return True  # that was decided when it first got blocks; others wait behind it that hold some
        if self._holders is None:
            running = self._holdings_of_running or self._holdings(self._running_at_first)
            self._holders = running | self._holdings(self._parked_at_first)
        holders = self._holders.values()
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() + self.connector.num_early_blocks(request)
        usable = sum(held for held, _ in holders) + free
        room = int(usable * (1 - self._headroom))
        self._short_of_room = not has_room(holders, self._expected(request), usable_blocks=room)
        return not self._short_of_room

    def _is_idle(self) -> bool:
        """Whether nobody runs, and nothing is being computed. Whoever is fetched then goes first
        (`_let_early_ones_go_first`), which only plain queues allow."""
        return not self.running and not self.num_steps_under_way and self._is_fcfs and self._is_unpaused()

    def _may_be_fetched_at_once(self, request: Request) -> bool:
        """Of a request that comes to an idle engine: whether it stays, is new, passes nobody who waits for a step, and
        fits in beside those that wait for their KV."""
        if getattr(request, "abort_immediately", False) or request.request_id in self.requests:
            return False
        early = [self.connector.num_early_blocks(item) for item in self.waiting]
        if not all(early):
            return False
        if not self._presses_back:
            return True
        parked = [self._holding(item) for item in self.kv_holding_waiting]
        holders = [*parked, *map(self._expected, self.waiting)]
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        usable = sum(early) + sum(held for held, _ in parked) + free
        return has_room(holders, self._expected(request), usable_blocks=int(usable * (1 - self._headroom)))

    def _growth_outlook(self) -> GrowthOutlook:
        """For early reads, which begin before anybody is asked for blocks."""
        self._holdings_of_running = None
        if not (self.settings.early_reads and self._presses_back):
            return self._outlook
        number = len(self.running) + len(self.kv_holding_waiting)
        if number != self._outlook_of or self.current_step % PROMISE_STEPS == 0:
            self._holdings_of_running = self._holdings(self.running)
            holders = [*self._holdings_of_running.values(), *map(self._holding, self.kv_holding_waiting)]
            expected = self._lengths.remaining(None, quantile=0.5, generated=0, most=self.max_model_len)
            self._outlook_of = number
            self._outlook = GrowthOutlook(num_promised=promised_blocks(holders), each=-(-expected // self.block_size))
        return self._outlook

    def _holdings(self, requests: Iterable[Request]) -> Holdings:
        return {item.request_id: self._holding(item) for item in requests}

    def _expected(self, request: Request) -> tuple[int, int]:
        """`(held, growth)` of a request that holds nothing yet, as if its prompt were here."""
        return holding(request.num_tokens, request.num_tokens, self._remaining(request), self.block_size)

    def _holding(self, request: Request) -> tuple[int, int]:
        """`(held, growth)`: blocks that a request has, and those that it is expected to take yet."""
        return holding(request.num_tokens, request.num_computed_tokens, self._remaining(request), self.block_size)

    def _remaining(self, request: Request) -> int:
        """Tokens that it is expected to generate yet."""
        return self._lengths.remaining(
            self._kind(request),
            quantile=self.facts_of(request).quantile,
            generated=request.num_output_tokens,
            most=min(request.max_tokens, self.max_model_len - request.num_prompt_tokens),
        )

    def _kind(self, request: Request) -> tuple[object, int]:
        """Requests whose answers are likely to be of one length: one adapter, and a similar `max_tokens`."""
        adapter = request.lora_request.lora_name if request.lora_request is not None else None
        return adapter, int(request.max_tokens).bit_length()

    def _keep_who_cannot_afford_it(self, now_s: float) -> None:
        """Where the next step may find no block for somebody: put those first who should not give way."""
        pool = self.kv_cache_manager.block_pool
        if pool.get_num_free_blocks() >= len(self.running) * (1 + self.num_spec_tokens) or len(self.running) < 2:
            return
        self.running.sort(key=lambda item: self._rank(item, now_s))

    def _rank(self, request: Request, now_s: float) -> tuple[int, int, float]:
        facts, latency, tokens = self.facts_of(request), self.measure.latency, request.num_tokens
        since_s = now_s - facts.first_s if facts.first_s is not None else 0.0
        return rank(
            request.num_preemptions,
            facts.hints.priority,
            ahead_s=ahead_s(request.num_output_tokens, facts.hints.tpot_s, since_s),
            recompute_s=latency.prompt_s(tokens) if latency is not None else tokens * 1e-4,
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._num_preempted += 1
        self.stats.count(RECOMPUTED, request.num_computed_tokens)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
            self._lengths.add(self._kind(request), request.num_output_tokens)
        return super()._free_request(request, *args, **kwargs)
