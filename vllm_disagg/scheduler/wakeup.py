"""Lets the connector's threads wake an engine that sleeps.

vLLM's engine loop blocks on its input queue when no request wants a step, and has no way for a connector to end that
sleep. The queue does know a harmless item, which vLLM uses for its own shutdown; this module learns the queue by
wrapping the method that reads it. Without it the engine polls a thousand times a second while blocks are held.
Recorded in `patches/README.md`.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_disagg.connector import DisaggConnector

_MARK = "_vllm_disagg_wakeup"


def install() -> None:
    """Wrap `EngineCoreProc._process_input_queue`. Idempotent; touches only engines whose connector is ours."""
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc._process_input_queue
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def process_input_queue(self: Any) -> Any:
        if not self.__dict__.get(_MARK):
            setattr(self, _MARK, True)
            connector = getattr(self.scheduler, "connector", None)
            if isinstance(connector, DisaggConnector):
                put = self.input_queue.put_nowait
                connector.on_wake(lambda: put((EngineCoreRequestType.WAKEUP, None)))
        return original(self)

    setattr(process_input_queue, _MARK, True)
    EngineCoreProc._process_input_queue = process_input_queue
