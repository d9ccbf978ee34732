"""The scheduler half on a prefill instance: finished prompts keep their blocks, and decode gets a handoff."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from vllm_disagg.config import VerifyMode
from vllm_disagg.connector.holds import HoldEvent, Holds
from vllm_disagg.connector.request_facts import kv_params, prompt_salt, was_aborted
from vllm_disagg.connector.stats import TransferStats
from vllm_disagg.core.handoff import HANDOFF_VERSION, Handoff, prompt_digest, seal
from vllm_disagg.core.lifetime import State, by_event
from vllm_disagg.core.types import BlockIds, EngineId, TransferId, is_transfer_id, new_nonce
from vllm_disagg.core.verify import DigestJob, chosen

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prompt:
    """One that is queued or being computed. From its end on, `Holds` has it."""

    state: State
    arrived_s: float
    scheduled_s: float = 0.0


class PrefillSide:
    """Turns finished prompts into handoffs, and gives their blocks back when nobody holds them any more.

    A hold is a reference on vLLM's blocks, not an unfinished request: vLLM frees the request as usual, the engine can
    sleep while decode takes its time, and no id of ours ever appears in vLLM's tables.

    All methods run on vLLM's main thread.
    """

    def __init__(
        self,
        *,
        engine_id: EngineId,
        control_address: str,
        lease_s: float,
        key: bytes,
        block_size: int,
        holds: Holds,
        verify: VerifyMode = "off",
    ) -> None:
        self._engine_id, self._control, self._lease_s = engine_id, control_address, lease_s
        self._verify = verify
        self._key, self._block_size, self._holds = key, block_size, holds
        self._lives = holds.lives
        self._prompts: dict[str, _Prompt] = {}
        self._pool: BlockPool | None = None
        self.on_granted: Callable[[DigestJob | None], None] = lambda _: None
        """Called when a hold begins, with the digests that are to be made of its blocks."""

    def bind_block_pool(self, pool: BlockPool) -> None:
        """vLLM's block pool, once it exists."""
        self._pool = pool

    def on_new_request(self, request: Request) -> None:
        """Note the arrival of a prompt that is to be handed over."""
        if kv_params(request).get("do_remote_decode"):
            self._prompts[request.request_id] = _Prompt(self._lives.begin("arrived"), time.monotonic())

    def on_scheduled(self, request: Request) -> None:
        """Note when its prompt began to be computed; vLLM may preempt it and begin again."""
        prompt = self._prompts.get(request.request_id)
        if prompt is not None and prompt.state is State.QUEUED:
            prompt.state, prompt.scheduled_s = self._lives.step(prompt.state, "scheduled"), time.monotonic()

    def on_finished(self, request: Request, block_ids: tuple[list[int], ...]) -> dict[str, Any] | None:
        """Hold a finished prompt's blocks and describe them.

        Returns:
            `kv_transfer_params` of the response; None when there is nothing to hand over.
        """
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None:
            return None
        transfer_id = kv_params(request).get("transfer_id")
        if not is_transfer_id(transfer_id) or not self._prompt_is_done(request):
            self._lives.step(prompt.state, "client_left" if was_aborted(request) else "not_kept")
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
            verify=self._verify,
        )
        return {
            "do_remote_prefill": True,  # whereupon vLLM adds `remote_prefill_cached_tokens`, for decode's `usage`
            "handoff": seal(handoff, self._key),
            "queue_s": prompt.scheduled_s - prompt.arrived_s,
            "run_s": time.monotonic() - prompt.scheduled_s,
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
    def num_held_blocks(self) -> int:
        """KV blocks that are held."""
        return self._holds.usage()[1]

    @property
    def num_followed(self) -> int:
        """Holds, and prompts that may become one."""
        return len(self._holds) + len(self._prompts)

    def add_stats(self, stats: TransferStats) -> None:
        """What happened since the last call."""
        taken = self._lives.take()
        stats.transitions(taken)
        holds = by_event(taken, get_args(HoldEvent), before=(State.PREFILLING, State.HELD))
        for event, count in holds.items():
            stats.count("vllm_disagg_kv_holds_total", count, label=event)
        num_held, num_blocks, oldest_s = self._holds.usage()
        stats.gauge("vllm_disagg_kv_held_requests", num_held)
        stats.gauge("vllm_disagg_kv_held_blocks", num_blocks)
        if self._pool is not None:  # one block of vLLM's is never used
            stats.gauge("vllm_disagg_kv_held_share", num_blocks / (self._pool.num_gpu_blocks - 1))
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
        places = chosen(self._verify, nonce, len(block_ids[0]))
        blocks = tuple(tuple(group[place] for place in places) for group in block_ids)
        job = DigestJob(transfer_id=transfer_id, nonce=nonce, places=places, blocks=blocks)
        self.on_granted(job if places else None)
        return True

    def _unpin(self, block_ids: BlockIds) -> None:
        assert self._pool is not None
        for group in block_ids:
            # tail blocks first, as vLLM frees a request's: a prefix is worth keeping longest
            self._pool.free_blocks([self._pool.blocks[block] for block in reversed(group)])
