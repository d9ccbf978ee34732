"""The scheduler of a decode instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_disagg.scheduler.safety import SafetyMixin

if TYPE_CHECKING:
    from vllm.v1.request import Request


class DecodeMixin(SafetyMixin):
    """Learns before each step which requests have their KV (`SafetyMixin.schedule`). Orders as vLLM does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate

    def _allocate(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, *args: Any, **kwargs: Any
    ) -> Any:
        """`KVCacheManager.allocate_slots`; a request whose KV came early gets the blocks that it came into."""
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
