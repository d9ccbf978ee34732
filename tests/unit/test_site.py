"""Over which wire UCX reads, and whether a prefill engine must answer for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vllm_disagg.transport.base import MemoryKind
from vllm_disagg.transport.site import Site, can_read, foresee, here


def site(host: str = "a", rdma: tuple[str, ...] = (), ucx_tls: str = "") -> Site:
    return Site(host=host, pid=1, mark_address=4096, mark=b"m", rdma=rdma, ucx_tls=ucx_tls)


RDMA = ("InfiniBand",)


@pytest.mark.parametrize(
    ("ours", "theirs", "can", "wire", "sent_by_owner"),
    [
        (site(), site(), True, "cma", False),
        (site(), site(), False, "tcp or shared memory", True),
        (site(ucx_tls="tcp"), site(), True, "tcp", True),
        (site(), site(ucx_tls="tcp"), True, "tcp", True),
        (site(ucx_tls="all"), site(ucx_tls="tcp,cma"), True, "cma", False),
        (site(ucx_tls="tcp,sm"), site(ucx_tls="tcp,shm"), True, "cma", False),
        (site(ucx_tls="tcp,posix,sysv,self"), site(), True, "tcp or shared memory", True),
        (site(ucx_tls="^cma"), site(), True, "tcp or shared memory", True),
        (site(ucx_tls="^rc"), site(), True, "cma", False),
        (site("a"), site("b"), False, "tcp", True),
        (site("a", RDMA), site("b"), False, "tcp", True),
        (site("a", RDMA), site("b", RDMA), False, "rdma", False),
        (site("a", RDMA), site("b", ("Ethernet",)), False, "tcp", True),
        (site("a", RDMA), site("b", RDMA, "tcp"), False, "tcp", True),
        (site("a", RDMA, "rc,tcp"), site("b", RDMA), False, "rdma", False),
        (site("a", RDMA, "ud,tcp"), site("b", RDMA), False, "tcp", True),
        (site("a", RDMA), site("a", RDMA), False, "rdma", False),
    ],
)
def test_what_follows_from_two_sites(ours: Site, theirs: Site, can: bool, wire: str, sent_by_owner: bool) -> None:
    foreseen = foresee(ours, theirs, memory=("DRAM", "DRAM"), can_read=can)

    assert (foreseen.wire, foreseen.sent_by_owner) == (wire, sent_by_owner)
    assert foreseen.evidence


@pytest.mark.parametrize("memory", [("VRAM", "VRAM"), ("DRAM", "VRAM"), ("VRAM", "DRAM")])
def test_nobody_can_tell_how_gpu_memory_is_read_on_one_host(memory: tuple[MemoryKind, MemoryKind]) -> None:
    assert foresee(site(), site(), memory=memory, can_read=True).sent_by_owner is None
    assert foresee(site("a"), site("b"), memory=memory, can_read=False).wire == "tcp"


def test_the_evidence_names_settings_that_forbid_better() -> None:
    foreseen = foresee(site(), site(ucx_tls="tcp"), memory=("DRAM", "DRAM"), can_read=True)

    assert "UCX_TLS=tcp at the peer" in foreseen.evidence


def test_another_process_can_be_read_only_where_its_mark_is_found() -> None:
    program = (
        "import msgspec, sys; from vllm_disagg.transport.site import here;"
        "print(msgspec.msgpack.encode(here()).hex(), flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        other = msgspec.msgpack.decode(bytes.fromhex(process.stdout.readline().decode()), type=Site)

        assert other.pid == process.pid
        assert not can_read(msgspec.structs.replace(other, mark=os.urandom(16)))
        assert not can_read(msgspec.structs.replace(other, mark=b""))
        assert not can_read(msgspec.structs.replace(other, mark_address=1))
        assert not can_read(msgspec.structs.replace(other, host="elsewhere"))
        assert not can_read(msgspec.structs.replace(other, pid=0))
        assert can_read(other) or not _may_trace(), "this process may read another's memory, but did not"
        process.kill()

    assert not can_read(other)
    assert can_read(here())


def _may_trace() -> bool:
    """Whether Yama lets any process of a user read any other's memory."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return not scope.exists() or scope.read_text().strip() == "0"
