"""Where a process stands, and over which wire UCX reads from one that stands elsewhere. Facts are gathered here; what
follows from them is pure.

What matters most is whether the owner's process has to send the bytes. CMA, RDMA and NVLink reads go past it. Over TCP,
and over shared memory without CMA, UCX emulates reads, and then ends the owner's process when it finds a reader gone
with requests unanswered (docs/transport.md, "A defect on the answering side").
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import msgspec

from vllm_disagg.transport.base import MemoryKind, WireInfo

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RDMA = Path("/sys/class/infiniband")
_VERBS = Path("/dev/infiniband")
_NO_READS = ("efa", "rdmap")
"""Names of RDMA devices that UCX does not read through: EFA."""

_CMA = {"cma", "sm", "shm"}
_SHARED_MEMORY = {"mm", "posix", "sysv", "xpmem", "sm", "shm"}
_READING_RDMA = {"ib", "rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5"}
_CUDA_IPC = {"cuda", "cuda_ipc"}


class Site(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What one process knows of its surroundings; travels in descriptors.

    Attributes:
        host: the kernel's boot id, equal in all containers of one host.
        pid: of the process, as it sees it itself.
        mark_address, mark: these random bytes lie there; who can read them there has the right process.
        rdma: link layers of active RDMA ports that UCX may use here: `InfiniBand`, `Ethernet`.
        ucx_tls: `UCX_TLS` of its environment, empty where it is not set.
    """

    host: str
    pid: int
    mark_address: int
    mark: bytes
    rdma: tuple[str, ...]
    ucx_tls: str


def here() -> Site:
    """This process's site."""
    return _site(os.getpid())


def can_read(site: Site) -> bool:
    """Whether this process may read the other's memory with `process_vm_readv`, as UCX's CMA does. Tried, not guessed:
    containers, users and ptrace restrictions all have a say."""
    if site.host != here().host or site.pid <= 0 or not 0 < site.mark_address < 2**63:
        return False
    found = ctypes.create_string_buffer(len(site.mark) or 1)
    local = _IoVec(ctypes.addressof(found), len(site.mark))
    remote = _IoVec(site.mark_address, len(site.mark))
    libc = ctypes.CDLL(None, use_errno=True)
    num_read = libc.process_vm_readv(site.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return bool(site.mark) and num_read == len(site.mark) and found.raw[: len(site.mark)] == site.mark


def foresee(
    ours: Site, theirs: Site, *, memory: tuple[MemoryKind, MemoryKind], can_read: bool, transport: str = "nixl"
) -> WireInfo:
    """Over which wire UCX will read.

    Args:
        ours, theirs: the reader's site and the owner's.
        memory: the reader's kind and the owner's.
        can_read: what `can_read` says of the owner.
        transport: what to call it in the answer.
    """

    def told(wire: str, sent_by_owner: bool | None, evidence: str) -> WireInfo:
        return WireInfo(transport=transport, wire=wire, sent_by_owner=sent_by_owner, evidence=evidence)

    def allowed(names: set[str]) -> bool:
        return _allows(ours.ucx_tls, names) and _allows(theirs.ucx_tls, names)

    is_one_host = ours.host == theirs.host
    limits = _limits(ours, theirs)
    if memory == ("DRAM", "DRAM") and is_one_host and can_read and allowed(_CMA):
        return told("cma", False, "one host, and this process can read the peer's memory")
    if "VRAM" in memory and is_one_host and allowed(_CUDA_IPC):
        return told("unknown", None, "one host and GPU memory: NVLink or PCIe where CUDA IPC works")
    if set(ours.rdma) & set(theirs.rdma) and allowed(_READING_RDMA):
        return told("rdma", False, f"both hosts have active RDMA ports ({', '.join(ours.rdma)})")
    if not is_one_host:
        return told("tcp", True, f"two hosts without RDMA ports in common{limits}")
    why = "" if can_read else ", and this process cannot read the peer's memory (ptrace rights, PID namespace)"
    if allowed(_SHARED_MEMORY):
        return told("tcp or shared memory", True, f"one host{why}{limits}")
    return told("tcp", True, f"one host{why}{limits}")


def _limits(ours: Site, theirs: Site) -> str:
    values = [
        f"UCX_TLS={site.ucx_tls} {whose}" for site, whose in ((ours, "here"), (theirs, "at the peer")) if site.ucx_tls
    ]
    return f"; {', '.join(values)}" if values else ""


def _allows(ucx_tls: str, names: set[str]) -> bool:
    """Whether a value of `UCX_TLS` leaves UCX any of these transports for data."""
    listed = {name.strip() for name in ucx_tls.removeprefix("^").split(",")} - {""}
    if ucx_tls.startswith("^"):
        return not listed & names
    return not listed or "all" in listed or bool(listed & names)


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_marks: list[ctypes.Array[ctypes.c_char]] = []
"""Kept for as long as the process lives: peers look for them."""


@cache
def _site(pid: int) -> Site:
    mark = os.urandom(16)
    _marks.append(ctypes.create_string_buffer(mark, len(mark)))
    return Site(
        host=_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "",
        pid=pid,
        mark_address=ctypes.addressof(_marks[-1]),
        mark=mark,
        rdma=_rdma_ports(os.environ.get("UCX_NET_DEVICES", "")),
        ucx_tls=os.environ.get("UCX_TLS", ""),
    )


def _rdma_ports(net_devices: str) -> tuple[str, ...]:
    """Link layers of the active ports whose device this process may open and `UCX_NET_DEVICES` does not exclude."""
    if not any(os.access(device, os.R_OK | os.W_OK) for device in _VERBS.glob("uverbs*")):
        return ()
    wanted = {name.split(":")[0].strip() for name in net_devices.split(",")} - {"", "all"}
    found = set()
    for state in _RDMA.glob("*/ports/*/state"):
        device = state.parts[-4]
        usable = not device.startswith(_NO_READS) and (not wanted or device in wanted)
        if usable and "ACTIVE" in state.read_text():
            found.add((state.parent / "link_layer").read_text().strip())
    return tuple(sorted(found))
