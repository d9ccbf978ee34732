"""Tells the connector of a request when it arrives, not when the running step has ended.

vLLM's input thread prepares requests while the main thread computes a step, and hands them over afterwards. With steps
of tens of milliseconds that is most of what a fetched prompt waits for. This module wraps the method that the input
thread prepares them with. Recorded in `patches/README.md`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm_disagg.connector import DisaggConnector

logger = logging.getLogger(__name__)

_MARK = "_vllm_disagg_arrivals"


def install() -> None:
    """Wrap `EngineCoreProc.preprocess_add_request`. Idempotent; touches only engines whose connector is ours."""
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc.preprocess_add_request
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def preprocess_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, *args, **kwargs)
        try:
            # The input thread starts before the scheduler exists, and hears nothing before the engine is ready.
            connector = getattr(getattr(self, "scheduler", None), "connector", None)
            if isinstance(connector, DisaggConnector):
                connector.on_arrival(prepared[0])
        except Exception:  # its request is served all the same
            logger.exception("early.failed")
        return prepared

    setattr(preprocess_add_request, _MARK, True)
    EngineCoreProc.preprocess_add_request = preprocess_add_request
