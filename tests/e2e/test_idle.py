"""Idle engines of a split deployment use no more processor time than an idle engine without us."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from tests.e2e.client import Case, compare
from tests.e2e.conftest import Deployment
from tests.e2e.engines import Server

IDLE_S = 30.0
MARGIN = 0.02
"""Of a core, for each engine process."""


def cpu_seconds(server: Server) -> dict[int, tuple[str, float]]:
    """Processor time used so far by each process of a server."""
    found = {}
    for process in server.tree():
        try:
            times = process.cpu_times()
            found[process.pid] = (process.name(), times.user + times.system)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.full
async def test_thirty_idle_seconds(deployment: Deployment) -> None:
    warm = [Case(name="warm", body={"prompt": "Before the rest.", "max_tokens": 2})]
    await compare(deployment.proxy.url, deployment.undivided.url, warm)
    servers = {"prefill": deployment.prefill, "decode": deployment.decode, "undivided": deployment.undivided}
    await asyncio.sleep(6)  # the handshake's grace of 5 s ends: this test measures rest, so it rests
    before = {name: cpu_seconds(server) for name, server in servers.items()}
    await asyncio.sleep(IDLE_S)
    shares: dict[str, dict[str, float]] = {}
    for name, server in servers.items():
        after = cpu_seconds(server)
        shares[name] = {f"{kind} {pid}": (used - before[name][pid][1]) / IDLE_S for pid, (kind, used) in after.items()}
    for name, processes in shares.items():
        print(name, {process: f"{100 * share:.2f} %" for process, share in processes.items()})

    allowed = max(shares["undivided"].values()) + MARGIN
    for name in ("prefill", "decode"):
        assert all(share < allowed for share in shares[name].values()), shares
