"""vLLM's KV connector: who owns which block, until when.

`DisaggConnector` is loaded on first use, so that the control channel and its messages can be used without vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_disagg.connector.facade import DisaggConnector

__all__ = ["DisaggConnector"]


def __getattr__(name: str) -> Any:
    if name == "DisaggConnector":
        from vllm_disagg.connector.facade import DisaggConnector

        return DisaggConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
