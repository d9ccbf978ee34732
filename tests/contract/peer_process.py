"""Owners and readers of memory in processes of their own, to be stopped, killed and started again.

They are forked from a server that has imported what transports need, since that takes longer than most of what a test
does with them. It opens no transport itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any

import psutil

from vllm_disagg.config import TransportName
from vllm_disagg.testing.check_transport import Memory, run_until
from vllm_disagg.transport import open_transport
from vllm_disagg.transport.base import Copy

MIB = 1 << 20
SEED = 11
ANSWER_S = 60.0

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch.distributed", "nixl._api", "zmq.auth.thread", __name__])


@dataclass(frozen=True)
class Link:
    """A transport, and what its peer finds in its environment."""

    transport: TransportName
    env: tuple[tuple[str, str], ...] = ()


class Child:
    """A process that runs a function with one end of a pipe, of which we have the other."""

    def __init__(self, name: str, link: Link, run: Callable[..., None], *arguments: Any) -> None:
        self._pipe, its_pipe = _FORKS.Pipe()
        agent_name = f"{name}-{os.getpid()}"
        self._process = _FORKS.Process(target=_become, args=(run, its_pipe, link, agent_name, *arguments), daemon=True)
        self._process.start()
        its_pipe.close()

    def hear(self) -> Any:
        """What it says next; None once it has died."""
        assert self._pipe.poll(ANSWER_S), "the process does not answer"
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            return None

    def say(self, what: str) -> None:
        """To it, if it lives."""
        try:
            self._pipe.send(what)
        except (BrokenPipeError, ConnectionResetError):
            return

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        run_until(lambda: psutil.Process(self._pid).status() == psutil.STATUS_STOPPED)

    def go_on(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self.kill()
        self._process.close()
        self._pipe.close()

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid


class PeerProcess(Child):
    """An owner of pseudo-random memory, which progresses its transport all the time."""

    def __init__(self, name: str, num_bytes: int, link: Link) -> None:
        super().__init__(name, link, _serve, num_bytes)
        self.num_bytes, self.link = num_bytes, link

    @cached_property
    def offer(self) -> tuple[int, bytes]:
        """Its address and descriptor. Waits for it to start, like these."""
        address, descriptor = self.hear()
        return address, descriptor

    @property
    def address(self) -> int:
        """Of its memory, in its process."""
        return self.offer[0]

    @property
    def descriptor(self) -> bytes:
        return self.offer[1]

    def stop(self) -> None:
        assert self.offer
        super().stop()

    def ask(self) -> bool:
        """Wait for a sign of life: true once it has answered, false if it has died."""
        self.say("?")
        return bool(self.hear() == "alive")


class ReaderProcess(Child):
    """Reads a peer's memory again and again."""

    def __init__(self, name: str, peer: PeerProcess, link: Link) -> None:
        super().__init__(name, link, _keep_reading, peer.num_bytes, *peer.offer)

    def wait_until_it_reads(self) -> None:
        assert self.hear() == "reading"


def _become(run: Callable[..., None], pipe: Connection, link: Link, agent_name: str, *arguments: Any) -> None:
    """In the forked process."""
    os.environ.update(dict(link.env))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # libraries print there
        os.dup2(nowhere, output)
    run(pipe, link.transport, agent_name, *arguments)


def _serve(pipe: Connection, transport_name: TransportName, agent_name: str, num_bytes: int) -> None:
    """Own memory until killed or left alone; say so when asked."""
    memory = Memory(num_bytes, seed=SEED)
    transport = open_transport(transport_name, agent_name)
    pipe.send((memory.address, transport.register([memory.region])))
    while True:
        transport.progress()
        if pipe.poll(0.0005):
            try:
                pipe.recv()
            except EOFError:
                return
            pipe.send("alive")


def _keep_reading(
    pipe: Connection, transport_name: TransportName, agent_name: str, num_bytes: int, address: int, descriptor: bytes
) -> None:
    """Say so once it is under way; until killed."""
    memory = Memory(num_bytes)
    reader = open_transport(transport_name, agent_name)
    reader.register([memory.region])
    name = reader.connect(descriptor)
    piece = 64 << 10
    copies = [Copy(memory.address + at, address + at, piece) for at in range(num_bytes - piece, -1, -piece)]
    for number in range(1_000_000):
        reader.read(name, copies)
        if number == 1:
            pipe.send("reading")
        while reader.num_active:
            reader.poll()
