"""Keeps vLLM's processes from spinning where they share the cores that compute.

vLLM's engine core and its workers speak through shared memory, and whoever waits there looks again and again for a
second before it goes to sleep: the engine core beside each step that takes longer than nothing, and each worker for a
second after its last step. On an accelerator that costs a core which has nothing else to do. On a CPU that core is one
that computes: here or in the engine that shares the machine, and it is where KV is read and its proof awaited.
Recorded in `patches/README.md`.
"""

from __future__ import annotations

import functools
from typing import Any, Final

_MARK = "_vllm_disagg_calm"

SPIN_S: Final = 0.01
"""How long a reader spins after it has read. Long enough for what follows within a step, so that only steps of more
than this pay for being woken. It must stay longer than some milliseconds: of two words within one the second may be
dropped (vLLM's notifications have a high-water mark of one), and whoever did not look by itself would miss it until it
looks again after 5 s."""


def install() -> None:
    """Wrap `SpinCondition.wait`. Idempotent. Where it has moved vLLM spins as it likes: nothing relies on this."""
    try:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    except ImportError:
        return
    original = SpinCondition.wait
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def wait(self: Any, *args: Any, **kwargs: Any) -> None:
        self.busy_loop_s = min(getattr(self, "busy_loop_s", 0.0), SPIN_S)
        original(self, *args, **kwargs)

    setattr(wait, _MARK, True)
    SpinCondition.wait = wait
