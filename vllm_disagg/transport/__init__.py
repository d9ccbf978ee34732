"""Moves bytes between registered memory of two processes. Knows no request, no engine and no vLLM."""

from __future__ import annotations

from typing import assert_never

from vllm_disagg.config import TransportName
from vllm_disagg.transport.base import MemoryKind, Transport


def open_transport(name: TransportName, agent_name: str, *, memory: MemoryKind = "DRAM") -> Transport:
    """Build a transport. Only here is its library imported.

    Args:
        name: which one.
        agent_name: what peers will call it; unique over all agents of all times, restarts included.
        memory: where the regions it will register lie.

    Raises:
        ConfigError: the library is not installed, or cannot handle this kind of memory.
        TransportError: the library does not start.
    """
    match name:
        case "nixl":
            from vllm_disagg.transport.nixl import NixlTransport

            return NixlTransport(agent_name, memory=memory)
        case "loopback":
            from vllm_disagg.transport.loopback import LoopbackTransport

            return LoopbackTransport(agent_name, memory=memory)
    assert_never(name)
