"""Moves bytes between registered memory of two processes. Knows no request, no engine and no vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from typing import assert_never

from vllm_disagg.config import TransportChoice, TransportName
from vllm_disagg.transport.base import MemoryKind, Transport


def choose_transport(choice: TransportChoice) -> tuple[TransportName, str]:
    """What a setting means on this host, and why."""
    if choice != "auto":
        return choice, "it was asked for"
    if find_spec("nixl") is not None:
        return "auto", "NIXL is installed; messages take its place between peers where UCX would emulate reads"
    return "nccl", "NIXL is not installed: messages over NCCL, or over gloo where the KV cache is in host memory"


def open_transport(
    name: TransportName, agent_name: str, *, memory: MemoryKind = "DRAM", host: str = "127.0.0.1"
) -> Transport:
    """Build a transport. Only here is its library imported.

    Args:
        name: which one.
        agent_name: what peers will call it; unique over all agents of all times, restarts included.
        memory: where the regions it will register lie.
        host: IPv4 address of this host that peers reach, for transports that listen.

    Raises:
        ConfigError: the library is not installed, or cannot handle this kind of memory.
        TransportError: the library does not start.
    """
    match name:
        case "auto":
            from vllm_disagg.transport.auto import AutoTransport
            from vllm_disagg.transport.nccl import NcclTransport
            from vllm_disagg.transport.nixl import NixlTransport

            return AutoTransport(
                NixlTransport(agent_name, memory=memory), NcclTransport(agent_name, memory=memory, host=host)
            )
        case "nixl":
            from vllm_disagg.transport.nixl import NixlTransport

            return NixlTransport(agent_name, memory=memory)
        case "nccl":
            from vllm_disagg.transport.nccl import NcclTransport

            return NcclTransport(agent_name, memory=memory, host=host)
        case "loopback":
            from vllm_disagg.transport.loopback import LoopbackTransport

            return LoopbackTransport(agent_name, memory=memory)
    assert_never(name)
