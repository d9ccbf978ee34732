"""Checks that an engine at rest holds nothing. For tests of schedulers and connectors, ours and yours."""

from __future__ import annotations

from typing import Any


def assert_no_leaks(scheduler: Any) -> None:
    """Fail unless a vLLM scheduler with our connector is as empty as on its first day.

    Args:
        scheduler: a `vllm.v1.core.sched.scheduler.Scheduler` all of whose requests have ended.

    Raises:
        AssertionError: names what is left.
    """
    pool = scheduler.kv_cache_manager.block_pool
    referenced = [block.block_id for block in pool.blocks if block.ref_cnt > 0 and not block.is_null]
    assert not referenced, f"blocks with references left: {referenced}"
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks missing from the free list"
    left = {
        name: size
        for name in (
            "requests", "running", "waiting", "kv_holding_waiting", "deferred_waiting",
            "finished_recving_kv_req_ids", "failed_recving_kv_req_ids", "_inflight_prefills",
        )
        if (size := len(getattr(scheduler, name)))
    }  # fmt: skip
    assert not left, f"left in the scheduler: {left}"
    connector = scheduler.connector
    assert not connector.has_pending_push_work(), "the connector still has something to give back"
    outstanding = connector.num_outstanding
    assert outstanding == 0, f"the connector still follows {outstanding} transfer(s)"
