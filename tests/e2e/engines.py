"""Real engines and a real proxy as child processes, for tests that also freeze and kill them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vllm_disagg.launcher.fork_host import SINGLE_THREADED
from vllm_disagg.launcher.machine import free_ports
from vllm_disagg.launcher.plan import FORK_HOST_COMMAND, FORKED_ENGINE_COMMAND
from vllm_disagg.profiles import load_profile

START_TIMEOUT_S = 600.0
BLOCK_SIZE = 32
MAX_MODEL_LEN = 2048


def core(index: int) -> int:
    """The core for the index-th engine; with few cores they share."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[index % len(cores)]


def has_ended(process: psutil.Process) -> bool:
    """Whether or not it has been reaped."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@dataclass(kw_only=True)
class Process:
    """A child in a process group of its own, with its output in a file."""

    name: str
    argv: Sequence[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                self.argv,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
            )

    def tree(self) -> list[psutil.Process]:
        """Every process of it that lives."""
        assert self.popen is not None
        try:
            root = psutil.Process(self.popen.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal_all(self, number: int) -> None:
        for process in self.tree():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def kill(self) -> None:
        """`kill -9` everything at once, and reap what is ours to reap: somebody else's takes its time about it."""
        processes = self.tree()
        self.signal_all(signal.SIGKILL)
        if self.popen is not None:
            self.popen.wait(timeout=10)
        deadline_s = time.monotonic() + 10
        while not all(map(has_ended, processes)) and time.monotonic() < deadline_s:
            time.sleep(0.01)  # bounded polling of other processes

    def stop(self) -> None:
        """End it politely, then not."""
        if self.popen is None or self.popen.poll() is not None:
            return
        self.popen.terminate()
        try:
            self.popen.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()

    def assert_alive(self) -> None:
        assert self.popen is not None
        if self.popen.poll() is not None:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise AssertionError(f"{self.name} ended with {self.popen.returncode}:\n{tail}")


@dataclass(kw_only=True)
class Server(Process):
    """A child that answers HTTP."""

    port: int
    address: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}"

    def wait_until_ready(self, path: str = "/health") -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            self.assert_alive()
            try:
                with urllib.request.urlopen(self.url + path, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)  # bounded polling of another process
        raise AssertionError(f"{self.name} was not ready in {START_TIMEOUT_S} s:\n{self.log.read_text()[-3000:]}")

    def metrics(self, prefix: str) -> dict[str, float]:
        """Metrics whose name begins so, summed over label values other than those of our own labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for line in text.splitlines():
            match = re.match(r"([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)$", line)
            if match is None or not match[1].startswith(prefix):
                continue
            kept = re.findall(r'\b(?:event|cause|route|reason|leg|transition)="([^"]*)"', match[2] or "")
            key = match[1] + ("{" + ",".join(kept) + "}" if kept else "")
            found[key] = found.get(key, 0.0) + float(match[3])
        return found


@dataclass(kw_only=True)
class EmulatedEngine(Server):
    """An engine that a fork host runs; our own child only stands for it."""

    faults: Path
    alone_on: ForkHost | None = None
    """Its fork host, if that runs no other engine; needed where the engine is in a network of its own."""

    def tree(self) -> list[psutil.Process]:
        """Our child and the engine's own session."""
        if self.alone_on is not None:
            return [*super().tree(), *self.alone_on.tree()[1:]]
        return [*super().tree(), *self._session()]

    def inject(self, *faults: dict[str, Any]) -> None:
        """Have these faults, and no others, from the next step on."""
        draft = self.faults.with_suffix(".draft")
        draft.write_text(json.dumps({"faults": faults}))
        draft.rename(self.faults)

    def _session(self) -> list[psutil.Process]:
        """The API server is not its leader: look for whoever listens, and then for all who share its session."""
        sessions = {
            os.getsid(item.pid)
            for item in psutil.net_connections("tcp")
            if item.pid and item.status == psutil.CONN_LISTEN and item.laddr.port == self.port
        }
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) in sessions:
                    found.append(process)
            except (OSError, psutil.NoSuchProcess):
                continue
        return found


@dataclass(kw_only=True)
class ForkHost(Process):
    """What emulated engines are forked from."""

    socket: Path

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.socket.is_socket():
            self.assert_alive()
            assert time.monotonic() < deadline_s, "the fork host was not ready in time"
            time.sleep(0.05)  # bounded polling of another process


def fork_host(folder: Path) -> ForkHost:
    """A fork host with its socket in the folder."""
    socket = folder / "host.sock"
    return ForkHost(
        name="fork-host", argv=(*FORK_HOST_COMMAND, str(socket)), env=dict(SINGLE_THREADED), socket=socket,
        log=folder / "fork-host.log",
    )  # fmt: skip


def emulated_engine(
    name: str,
    *,
    host: ForkHost,
    folder: Path,
    key_file: Path,
    role: str | None,
    profile: str = "tiny",
    block_size: int = BLOCK_SIZE,
    flags: Sequence[str] = (),
    address: str = "127.0.0.1",
) -> EmulatedEngine:
    """An emulated engine: with a role, or as the undivided reference."""
    port = free_ports(1)[0]
    argv = [
        *FORKED_ENGINE_COMMAND, str(host.socket), load_profile(profile).model.name, "--emulate", profile,
        "--port", str(port), "--host", address,
        "--served-model-name", "model", "--block-size", str(block_size), "--max-model-len", str(MAX_MODEL_LEN),
    ]  # fmt: skip
    faults = folder / f"{name}.faults.json"
    return EmulatedEngine(
        name=name,
        argv=[*argv, *_role_flags(role, key_file), *flags],
        log=folder / f"{name}.log",
        env={"VLLM_NO_USAGE_STATS": "1", "VLLM_DISAGG_FAULTS": str(faults)},
        port=port,
        address=address,
        faults=faults,
    )


def engine(
    name: str, *, model: Path, index: int, folder: Path, key_file: Path, role: str | None, flags: Sequence[str] = ()
) -> Server:
    """An engine on one core: with a role, or plain vLLM as the undivided reference."""
    port = free_ports(1)[0]
    argv = [
        sys.executable, "-m", "vllm_disagg", "serve", str(model), "--port", str(port), "--host", "127.0.0.1",
        "--served-model-name", "model", "--enforce-eager", "--block-size", str(BLOCK_SIZE), "--dtype", "float32",
        "--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(700_000_000),
    ]  # fmt: skip
    argv += _role_flags(role, key_file)
    env = {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core(index)), "VLLM_NO_USAGE_STATS": "1"}
    return Server(name=name, argv=[*argv, *flags], log=folder / f"{name}.log", env=env, port=port)


def _role_flags(role: str | None, key_file: Path) -> list[str]:
    flags = [] if role is None else ["--kv-role", role, "--kv-key-file", str(key_file)]
    if role == "prefill":
        flags += ["--kv-control-port", str(free_ports(1)[0])]
    return flags


def proxy(*, prefill: Sequence[Server], decode: Sequence[Server], folder: Path, flags: Sequence[str] = ()) -> Server:
    """The proxy in front of them."""
    port = free_ports(1)[0]
    argv = [sys.executable, "-m", "vllm_disagg", "proxy", "--port", str(port)]
    for server in prefill:
        argv += ["--prefill", server.url]
    for server in decode:
        argv += ["--decode", server.url]
    return Server(name="proxy", argv=[*argv, *flags], log=folder / "proxy.log", port=port)
