"""One NIXL agent over UCX, and one link: an agent that reads from one peer and does nothing else. The only place that
calls NIXL. Why a peer has an agent of its own is told in `nixl.py`."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from vllm_disagg.errors import ConfigError, TransportError
from vllm_disagg.transport.base import MemoryKind, Region
from vllm_disagg.transport.regions import Addresses, RegionTable, Runs

logger = logging.getLogger(__name__)

R = TypeVar("R")
"""Whatever the owner of a link wants to find a read again by."""

_WARM_BYTES = 64

_UCX_OPTIONS = "TCP_CONN_NB=y"
"""Connect without blocking: by default UCX waits for a TCP connection inside the call, over two minutes where the
network is cut. A `UCX_` variable of the environment has precedence."""


class Agent:
    """A NIXL agent over UCX with this side's memory registered.

    Raises:
        TransportError: UCX does not start, or refuses the memory.
    """

    def __init__(self, name: str, memory: MemoryKind, regions: RegionTable) -> None:
        self.memory = memory
        nixl = import_nixl()
        try:
            self.nixl = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
            self.nixl.create_backend("UCX", {"engine_config": _UCX_OPTIONS})
            self.register(regions.regions, memory)
        except Exception as error:
            raise TransportError(
                f"NIXL cannot serve {memory} through UCX: {text_of(error)}; "
                "if UCX_TLS is set, it must contain tcp, and cuda for GPU memory"
            ) from error

    def register(self, regions: Sequence[Region], memory: MemoryKind) -> None:
        self.nixl.register_memory(
            [(region.address, region.num_bytes, region.device_id, "") for region in regions], memory
        )

    def metadata(self) -> bytes:
        return bytes(self.nixl.get_agent_metadata())

    def progress(self) -> None:
        # Also empties the mailbox that everyone with the metadata can write to.
        self.nixl.get_new_notifs()

    def destroy(self) -> None:
        """End the agent and all that UCX does for it, now."""
        alive = weakref.ref(self.nixl.agent)
        self.nixl.agent = None
        if alive() is not None:
            gc.collect()
        assert alive() is None, "a NIXL agent outlived its owner, so memory may still be written"


class Link(Generic[R]):
    """An agent that reads from one peer and does nothing else, so that its end is the end of these reads. `is_up` once
    something has been read, `is_warming` while the read that is to bring it up is under way.

    Args:
        name: of the agent.
        memory, regions: our own.
        peer, peer_memory, metadata: as its descriptor tells them.

    Raises:
        TransportError: the peer cannot be reached, or the agent cannot be built.
    """

    def __init__(
        self,
        name: str,
        memory: MemoryKind,
        regions: RegionTable,
        *,
        peer: str,
        peer_memory: MemoryKind,
        metadata: bytes,
    ) -> None:
        self._agent = Agent(name, memory, regions)
        self.peer, self._peer_memory = peer, peer_memory
        self._under_way: list[tuple[R, Runs, Any]] = []
        self._warming: Any = None
        self._scratch = np.zeros(_WARM_BYTES, np.uint8)
        self.is_up = False
        try:
            found = self._agent.nixl.add_remote_agent(metadata)
        except Exception as error:
            self._agent.destroy()
            raise TransportError(f"NIXL cannot reach {peer!r}: {text_of(error)}") from error
        if (found.decode(errors="replace") if isinstance(found, bytes) else found) != peer:
            self._agent.destroy()
            raise TransportError(f"the descriptor of {peer!r} carries the metadata of {found!r}")

    @property
    def bytes_under_way(self) -> int:
        return sum(batch.total for _, batch, _ in self._under_way)

    @property
    def is_warming(self) -> bool:
        return self._warming is not None

    def warm(self, region: Region) -> None:
        """Bring the connection up: read a few bytes of the peer's region into memory that is nobody's. UCX exchanges
        addresses and sets its lanes up with the first message, and needs the owner's progress for it.

        Raises:
            TransportError: the library refused; the link must be destroyed.
        """
        if self.is_up or self.is_warming:
            return
        nixl, size = self._agent.nixl, min(_WARM_BYTES, region.num_bytes)
        scratch = Region(address=int(self._scratch.ctypes.data), num_bytes=_WARM_BYTES)
        try:
            self._agent.register([scratch], "DRAM")
            handle = nixl.initialize_xfer(
                "READ",
                nixl.get_xfer_descs([(scratch.address, size, 0)], "DRAM"),
                nixl.get_xfer_descs([(region.address, size, region.device_id)], self._peer_memory),
                self.peer,
            )
            self._warming = handle  # before it starts, so that `destroy` knows it
            state = nixl.transfer(handle)
        except Exception as error:
            raise TransportError(f"{self.peer!r} cannot be read from: {text_of(error)}") from error
        self._warmed(state)

    def start(self, read: R, batch: Runs) -> int:
        """Start a batch. Returns how many more are under way: none if it is done already.

        Raises:
            TransportError: the library refused; the link must be destroyed.
        """
        nixl = self._agent.nixl
        try:
            handle = nixl.initialize_xfer(
                "READ",
                nixl.get_xfer_descs(_table(batch.local, batch.num_bytes, batch.local_device), self._agent.memory),
                nixl.get_xfer_descs(_table(batch.remote, batch.num_bytes, batch.remote_device), self._peer_memory),
                self.peer,
            )
            self._under_way.append((read, batch, handle))  # before it starts, so that `destroy` knows it
            state = nixl.transfer(handle)
            if state == "DONE":
                self.is_up = True
                self._under_way.pop()
                handle.release()
        except Exception as error:
            raise TransportError(f"read from {self.peer!r} failed: {text_of(error)}") from error
        if state == "ERR":
            raise TransportError(f"read from {self.peer!r} failed")
        return int(state != "DONE")

    def collect(self) -> list[R]:
        """Make progress. Returns the read of each batch that has ended.

        Raises:
            TransportError: a batch failed; the link must be destroyed.
        """
        ended: list[R] = []
        still: list[tuple[R, Runs, Any]] = []
        try:
            for read, batch, handle in self._under_way:
                match self._agent.nixl.check_xfer_state(handle):
                    case "DONE":
                        handle.release()
                        ended.append(read)
                    case "PROC":
                        still.append((read, batch, handle))
                    case _:
                        raise TransportError(f"read from {self.peer!r} failed")
            if self._warming is not None:
                self._warmed(self._agent.nixl.check_xfer_state(self._warming))
        except TransportError:
            raise
        except Exception as error:
            raise TransportError(f"read from {self.peer!r} failed: {text_of(error)}") from error
        self._under_way = still
        self.is_up = self.is_up or bool(ended)
        return ended

    def destroy(self) -> list[tuple[R, Runs]]:
        """End all batches and the connection. Nothing is written to local memory afterwards.

        Returns:
            The batches that had not ended, in the order in which they were started.
        """
        unread = [(read, batch) for read, batch, _ in self._under_way]
        while self._under_way:
            _, _, handle = self._under_way.pop()
            self._release(handle)
            del handle
        if self._warming is not None:
            self._release(self._warming)
            self._warming = None
        self._agent.destroy()
        return unread

    def _warmed(self, state: str) -> None:
        if state == "PROC":
            return
        handle, self._warming = self._warming, None
        self._release(handle)
        if state != "DONE":
            raise TransportError(f"{self.peer!r} cannot be read from")
        self.is_up = True

    def _release(self, handle: Any) -> None:
        """A handle holds the agent, so this must go before the agent does; it does not end a read."""
        try:
            handle.release()
        except Exception as error:
            logger.debug("transport.release_failed peer=%s error=%s", self.peer, text_of(error))


def _table(addresses: Addresses, num_bytes: Addresses, devices: Addresses) -> Addresses:
    return np.stack((addresses, num_bytes, devices), axis=1)


def text_of(error: Exception) -> str:
    """What an exception says, or at least what it is."""
    return str(error) or type(error).__name__


def import_nixl() -> Any:
    """NIXL's Python interface.

    Raises:
        ConfigError: it is not installed.
    """
    # Without this UCX prints a line for each copy that was under way when a link is destroyed.
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    try:
        import nixl._api
    except ImportError as error:
        raise ConfigError(f"kv transport nixl needs NIXL ({error}): pip install 'vllm-disagg[nixl]'") from error
    return nixl._api
