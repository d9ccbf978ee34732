"""What a host and its environment have to say about the links between engines."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

_TOLD = ("UCX_", "NIXL_", "NCCL_", "GLOO_")
_MAX_CHARS = 256


def host_facts(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> dict[str, str]:
    """Plain facts by name; one that cannot be found out is left out.

    `boot` is the same for all processes under one kernel, `pid namespace` and `network namespace` for those that share
    one, `rdma` lists RDMA devices with an active port, `ptrace scope` is Yama's. Variables of the transport libraries
    follow under their own names.
    """
    facts = {
        "host": socket.gethostname(),
        "boot": _text(root / "proc/sys/kernel/random/boot_id"),
        "pid namespace": _link(root / "proc/self/ns/pid"),
        "network namespace": _link(root / "proc/self/ns/net"),
        "ptrace scope": _text(root / "proc/sys/kernel/yama/ptrace_scope"),
        "rdma": " ".join(_active_rdma(root / "sys/class/infiniband")),
    }
    for name in sorted(environ):
        if name.startswith(_TOLD):
            facts[name] = environ[name][:_MAX_CHARS]
    return {name: value for name, value in facts.items() if value}


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's own name, or `CPU` where the kernel does not tell."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def num_bound_cores(binding: str) -> int | None:
    """How many cores vLLM's `VLLM_CPU_OMP_THREADS_BIND`, such as `0-3,8|4-7`, gives each worker; None where it leaves
    that to vLLM."""
    try:
        spans = [[int(end) for end in part.split("-")] for part in binding.split("|")[0].split(",")]
    except ValueError:
        return None
    return sum(span[-1] - span[0] + 1 for span in spans)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _active_rdma(folder: Path) -> list[str]:
    """`device:port` of every active port; the kernel writes its state as `4: ACTIVE`."""
    try:
        states = sorted(folder.glob("*/ports/*/state"))
    except OSError:
        return []
    return [f"{state.parents[2].name}:{state.parent.name}" for state in states if "ACTIVE" in _text(state)]
