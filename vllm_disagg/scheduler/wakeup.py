"""Lets an engine sleep while it waits for KV, and the connector's threads wake it.

vLLM's engine loop blocks on its input queue when no request wants a step, and has no way for a connector to end that
sleep. The queue does know a harmless item, which vLLM uses for its own shutdown; this module learns the queue by
wrapping the method that reads it. Without it the engine polls a thousand times a second while blocks are held, or while
requests wait until their KV has come: each of these polls is a whole step, for which workers wake too, beside a
thread that is reading the KV. Recorded in `patches/README.md`.
"""

from __future__ import annotations

import functools
import queue
import time
from typing import Any, Final

from vllm_disagg.connector import DisaggConnector
from vllm_disagg.scheduler.safety import SafetyMixin

_MARK = "_vllm_disagg_wakeup"

LONGEST_SLEEP_S: Final = 0.25
"""Of an engine whose requests all wait for their KV. It is woken when some has come; this bounds what a lost word
costs."""


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
        result = original(self)
        if isinstance(self.scheduler, SafetyMixin):
            _await_kv(self)
        return result

    setattr(process_input_queue, _MARK, True)
    EngineCoreProc._process_input_queue = process_input_queue


def _await_kv(engine: Any) -> None:
    """Sleep while a step could do nothing yet, and hand on what comes in, as vLLM would."""
    until_s = time.monotonic() + LONGEST_SLEEP_S
    while engine.scheduler.only_awaits_kv and not engine.batch_queue:
        try:
            item = engine.input_queue.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            return
        engine._handle_client_request(*item)
