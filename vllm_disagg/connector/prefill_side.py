"""The scheduler half on a prefill instance: finished prompts keep their blocks, and decode gets a handoff."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_disagg.connector.holds import Holds
from vllm_disagg.connector.request_facts import kv_params, prompt_salt
from vllm_disagg.connector.stats import TransferStats
from vllm_disagg.core.handoff import HANDOFF_VERSION, Handoff, prompt_digest, seal
from vllm_disagg.core.types import BlockIds, EngineId, TransferId, is_transfer_id, new_nonce

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Timing:
    arrived_s: float
    scheduled_s: float | None = None


class PrefillSide:
    """Turns finished prompts into handoffs, and gives their blocks back when nobody holds them any more.

    A hold is a reference on vLLM's blocks, not an unfinished request: vLLM frees the request as usual, the engine can
    sleep while decode takes its time, and no id of ours ever appears in vLLM's tables.

    All methods run on vLLM's main thread.
    """

    def __init__(
        self, *, engine_id: EngineId, control_address: str, lease_s: float, key: bytes, block_size: int, holds: Holds
    ) -> None:
        self._engine_id, self._control, self._lease_s = engine_id, control_address, lease_s
        self._key, self._block_size, self._holds = key, block_size, holds
        self._timing: dict[str, _Timing] = {}
        self._pool: BlockPool | None = None
        self.on_granted: Callable[[], None] = lambda: None

    def bind_block_pool(self, pool: BlockPool) -> None:
        """vLLM's block pool, once it exists."""
        self._pool = pool

    def on_new_request(self, request: Request) -> None:
        """Note the arrival, for the time its prompt waits."""
        if kv_params(request).get("do_remote_decode"):
            self._timing[request.request_id] = _Timing(time.monotonic())

    def on_scheduled(self, request: Request) -> None:
        """Note when its prompt began to be computed."""
        timing = self._timing.get(request.request_id)
        if timing is not None and timing.scheduled_s is None:
            timing.scheduled_s = time.monotonic()

    def on_finished(self, request: Request, block_ids: tuple[list[int], ...]) -> dict[str, Any] | None:
        """Hold a finished prompt's blocks and describe them.

        Returns:
            `kv_transfer_params` of the response; None when there is nothing to hand over.
        """
        timing = self._timing.pop(request.request_id, None)
        transfer_id = kv_params(request).get("transfer_id")
        if timing is None or not is_transfer_id(transfer_id) or not self._prompt_is_done(request):
            return None
        num_tokens = request.num_prompt_tokens
        kept: BlockIds = tuple(tuple(group[: -(-num_tokens // self._block_size)]) for group in block_ids)
        nonce = new_nonce()
        if not self._hold(transfer_id, nonce, kept):
            return None
        handoff = Handoff(
            version=HANDOFF_VERSION,
            transfer_id=transfer_id,
            engine_id=self._engine_id,
            control=self._control,
            block_ids=kept,
            num_tokens=num_tokens,
            prompt_digest=prompt_digest(request.prompt_token_ids or (), salt=prompt_salt(request)),
            lease_s=self._lease_s,
            nonce=nonce,
        )
        scheduled_s = timing.scheduled_s or timing.arrived_s
        return {
            "do_remote_prefill": True,  # whereupon vLLM adds `remote_prefill_cached_tokens`, for decode's `usage`
            "handoff": seal(handoff, self._key),
            "queue_s": scheduled_s - timing.arrived_s,
            "run_s": time.monotonic() - scheduled_s,
        }

    def reset(self) -> None:
        """Let go of everything that is held; decode computes those prompts itself."""
        self._holds.reset()
        self.give_back()

    def give_back(self) -> None:
        """Return to the pool what is held no more. Called at the start of every step."""
        if self._pool is None:
            return
        for block_ids in self._holds.take_freed():
            self._unpin(block_ids)

    @property
    def has_work(self) -> bool:
        """Whether `give_back` has something to do."""
        return self._holds.has_freed

    @property
    def num_outstanding(self) -> int:
        """Holds that will have to be given back."""
        return len(self._holds)

    @property
    def num_followed(self) -> int:
        """Holds, and prompts that may become one."""
        return len(self._holds) + len(self._timing)

    def add_stats(self, stats: TransferStats) -> None:
        """What happened since the last call."""
        for event, count in self._holds.take_events().items():
            stats.count("vllm_disagg_kv_holds_total", count, label=event)
        num_held, num_blocks, oldest_s = self._holds.usage()
        stats.gauge("vllm_disagg_kv_held_requests", num_held)
        stats.gauge("vllm_disagg_kv_held_blocks", num_blocks)
        stats.gauge("vllm_disagg_kv_oldest_hold_seconds", oldest_s)

    def _prompt_is_done(self, request: Request) -> bool:
        """Only a prompt that ran to its first token has all its KV; an aborted one has not."""
        from vllm.v1.request import RequestStatus

        done = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        return (
            done and request.prompt_token_ids is not None and request.num_computed_tokens >= request.num_prompt_tokens
        )

    def _hold(self, transfer_id: TransferId, nonce: str, block_ids: BlockIds) -> bool:
        assert self._pool is not None, "vLLM binds the block pool before the first request"
        self._pool.touch([self._pool.blocks[block] for group in block_ids for block in group])
        if not self._holds.grant(transfer_id, nonce, block_ids):
            self._unpin(block_ids)
            return False
        self.on_granted()
        return True

    def _unpin(self, block_ids: BlockIds) -> None:
        assert self._pool is not None
        for group in block_ids:
            # tail blocks first, as vLLM frees a request's: a prefix is worth keeping longest
            self._pool.free_blocks([self._pool.blocks[block] for block in reversed(group)])
