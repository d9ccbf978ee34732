"""What the two ends of the `nccl` transport have in common: a private communicator of two, the frames on the channel
beside it, and memory that is gathered into one piece and scattered again.

No pickle: torch's object collectives, its stores and `StatelessProcessGroup` are not used. The one store there is
carries the bytes that the two libraries want to exchange over the authenticated channel.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from vllm_disagg.errors import ConfigError, TransportError
from vllm_disagg.transport.base import MemoryKind
from vllm_disagg.transport.patience import SLICE_S, Patience
from vllm_disagg.transport.regions import Addresses

CHUNK_BYTES = 4 << 20
"""The longest message, and the size of the buffers that messages go through."""

CHUNK_COPIES = 4096

STALL_S = 5.0
"""How long one end waits for an answer before it gives the connection up, not counting time in which its own host
stood still."""

LIBRARY_S = 20.0
"""How long a thread of ours may be inside gloo or NCCL. Longer than `STALL_S`: they would count a standstill of this
host, and end the connection. Only threads that may wait are ever in there."""

_EXIT_S = 2.0
_PROOF_BYTES = 32
_MAX_FRAME_BYTES = 1 << 20
_LINGER_MS = 200


class _Frame(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all frames: closed schema, the class name as tag."""


class Open(_Frame, frozen=True):
    """Reader to owner: make a communicator with me. `proof` is what I shall say first over it."""

    version: int
    proof: bytes


class Opened(_Frame, frozen=True):
    """Owner to reader: I agree. `proof` is what I shall say first over it."""

    proof: bytes


class Put(_Frame, frozen=True):
    """Either way: what the library wants its other end to know."""

    key: str
    value: bytes


class Want(_Frame, frozen=True):
    """Reader to owner: send these runs of your memory as one message. Addresses and lengths, 8 bytes each."""

    number: int
    addresses: bytes
    lengths: bytes


class Sent(_Frame, frozen=True):
    """Owner to reader: the message with this number is out. To receive it does not take waiting for the owner."""

    number: int
    num_bytes: int


class Bye(_Frame, frozen=True):
    """Either way: this connection is over."""

    reason: str = ""


ToOwner = Open | Put | Want | Bye
ToReader = Opened | Put | Sent | Bye
to_owner: msgspec.msgpack.Decoder[ToOwner] = msgspec.msgpack.Decoder(ToOwner)
to_reader: msgspec.msgpack.Decoder[ToReader] = msgspec.msgpack.Decoder(ToReader)
encode = msgspec.msgpack.encode


class Channel(Protocol):
    """How one end reaches the other before, and beside, the communicator."""

    def put(self, key: str, value: bytes) -> None:
        """Tell the other end."""

    def wait(self, key: str) -> bytes:
        """What the other end has told.

        Raises:
            TransportError: it does not come in time.
        """


class Wire:
    """A communicator of two: the owner is rank 0, the reader rank 1. One thread uses it.

    NCCL where the memory is an accelerator's (not yet run on a GPU), gloo over TCP else.

    Args:
        memory: of this side.
        device_id: accelerator index.
        rank: see above.
        address: of this host, as the other end reaches it: gloo listens there.
        channel: to the other end.
        proofs: what this side says first, and what it expects to hear.

    Raises:
        TransportError: the connection does not come up, or somebody else is at its other end.
    """

    def __init__(
        self,
        *,
        memory: MemoryKind,
        device_id: int,
        rank: int,
        address: str,
        channel: Channel,
        proofs: tuple[bytes, bytes],
    ) -> None:
        self._torch = import_torch(memory)
        self._other = 1 - rank
        self._number = 0
        self._store = _store(channel)
        try:
            self._group = _nccl(self._store, rank, device_id) if memory == "VRAM" else _gloo(self._store, rank, address)
            self._prove(memory, device_id, rank, proofs)
        except TransportError:
            raise
        except Exception as error:
            raise TransportError(f"no connection: {error}") from error

    def send(self, message: Any) -> Any:
        """Start sending a tensor. Returns what `finish` takes; the tensor must not change before."""
        self._number += 1
        return self._group.send([message], self._other, self._number)

    def receive(self, message: Any) -> Any:
        """Start receiving the next message into this tensor. Returns what `finish` takes; drop it before `close`."""
        self._number += 1
        return self._group.recv([message], self._other, self._number)

    def finish(self, work: Any) -> None:
        """Wait for a message to be out, or in.

        Raises:
            TransportError: the other end is gone, or took longer than `LIBRARY_S`.
        """
        try:
            work.wait(timedelta(seconds=LIBRARY_S))
            if self._torch.cuda.is_available():
                self._torch.cuda.current_stream().synchronize()
        except Exception as error:
            raise TransportError(f"the message did not pass: {str(error).splitlines()[0]}") from None

    def close(self) -> None:
        """End the connection, whatever is under way on it. NCCL's own way to end may hang (its issue 549), and then
        only the thread that has called this."""
        if hasattr(self._group, "abort") and self._group.name() == "nccl":
            self._group.abort()
        del self._group

    def _prove(self, memory: MemoryKind, device_id: int, rank: int, proofs: tuple[bytes, bytes]) -> None:
        """Only whoever is at the other end of the authenticated channel knows what to say."""
        ours = self._torch.frombuffer(bytearray(proofs[0]), dtype=self._torch.uint8)
        theirs = self._torch.zeros(len(proofs[1]), dtype=self._torch.uint8)
        if memory == "VRAM":
            ours, theirs = ours.to(f"cuda:{device_id}"), theirs.to(f"cuda:{device_id}")
        for turn in (0, 1):
            if turn == rank:
                self.finish(self.send(ours))
            else:
                self.finish(self.receive(theirs))
        if bytes(theirs.cpu().numpy()) != proofs[1]:
            raise TransportError("somebody else has answered at the peer's address")


_leaving: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def let_go(thread: threading.Thread) -> None:
    """A thread that may be inside a library has been told to end; nobody need wait for it but the end of the process.
    One that came out of the library after the interpreter is gone would abort it."""
    _leaving.add(thread)


@atexit.register
def _await_the_leaving() -> None:
    patience = Patience(_EXIT_S)
    for thread in list(_leaving):
        while thread.is_alive() and not patience.is_over():
            thread.join(SLICE_S)


def new_proof() -> bytes:
    """What nobody can guess."""
    return os.urandom(_PROOF_BYTES)


class Staging:
    """Buffers that messages go through, and the way from there to registered memory and back. One thread uses it."""

    def __init__(self, memory: MemoryKind, device_id: int) -> None:
        self._torch = import_torch(memory)
        self._device = f"cuda:{device_id}" if memory == "VRAM" else "cpu"
        self._stream = self._torch.cuda.Stream(self._device) if memory == "VRAM" else None

    def buffer(self) -> Any:
        """A new buffer of `CHUNK_BYTES`."""
        return self._torch.empty(CHUNK_BYTES, dtype=self._torch.uint8, device=self._device)

    def gather(self, buffer: Any, addresses: Addresses, lengths: Addresses) -> Any:
        """Copy runs of memory into a buffer, one after the other. Returns the filled part of it."""
        for at, address, length in _steps(addresses, lengths):
            self._copy(buffer.data_ptr() + at, address, length)
        self._settle()
        return buffer[: int(lengths.sum())]

    def scatter(self, buffer: Any, addresses: Addresses, lengths: Addresses) -> None:
        """Copy a buffer to runs of memory. All is written when this returns."""
        for at, address, length in _steps(addresses, lengths):
            self._copy(address, buffer.data_ptr() + at, length)
        self._settle()

    def _copy(self, target: int, source: int, length: int) -> None:
        if self._stream is None:
            ctypes.memmove(target, source, length)
            return
        with self._torch.cuda.stream(self._stream):
            self._view(target, length).copy_(self._view(source, length), non_blocking=True)

    def _view(self, address: int, length: int) -> Any:
        return self._torch.as_tensor(_DeviceMemory(address, length), device=self._device)

    def _settle(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class _DeviceMemory:
    """Memory of a GPU as torch takes it."""

    def __init__(self, address: int, length: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (length,), "typestr": "|u1", "version": 3}


def _steps(addresses: Addresses, lengths: Addresses) -> Iterator[tuple[int, int, int]]:
    """Offset in the buffer, address and length of each run."""
    offsets: NDArray[np.uint64] = np.cumsum(lengths) - lengths
    return zip(offsets.tolist(), addresses.tolist(), lengths.tolist(), strict=True)


def _gloo(store: Any, rank: int, address: str) -> Any:
    """A device of its own for each connection: its listening socket is of no use to anybody once the two have met."""
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=LIBRARY_S)
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Any, rank: int, device_id: int) -> Any:
    """Not yet run on a GPU. torch's own watchdog would end the process for an error of a peer's: it is kept from that,
    and `finish` watches instead."""
    import torch
    from torch.distributed import ProcessGroupNCCL

    torch.cuda.set_device(device_id)
    options = ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options._timeout = timedelta(days=1)
    with _environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0"):
        return ProcessGroupNCCL(store, rank, 2, options)


_environment_lock = threading.Lock()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    with _environment_lock:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _store(channel: Channel) -> Any:
    """The store through which a library's two ends learn of each other, over the channel."""
    from torch.distributed import Store

    class ChannelStore(Store):
        def __init__(self) -> None:
            super().__init__()
            self._own: dict[str, bytes] = {}

        def set(self, key: str, value: bytes | str) -> None:
            self._own[key] = value.encode() if isinstance(value, str) else bytes(value)
            channel.put(key, self._own[key])

        def get(self, key: str) -> bytes:
            return self._own[key] if key in self._own else channel.wait(key)

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            for key in keys:
                self.get(key)

    return ChannelStore()


def import_torch(memory: MemoryKind) -> Any:
    """PyTorch, with what this kind of memory needs.

    Raises:
        ConfigError: it is not installed, or was built without it.
    """
    try:
        import torch
        import torch.distributed
    except ImportError as error:
        raise ConfigError(f"kv transport nccl needs PyTorch ({error})") from error
    if memory == "VRAM" and not torch.distributed.is_nccl_available():
        raise ConfigError("kv transport nccl needs a PyTorch with NCCL for GPU memory: use nixl")
    if memory == "DRAM" and not torch.distributed.is_gloo_available():
        raise ConfigError("kv transport nccl needs a PyTorch with gloo for host memory: use nixl")
    return torch


# Sockets of the channel.


def new_keys() -> tuple[bytes, bytes]:
    """A CURVE key pair, public and secret."""
    public, secret = zmq.curve_keypair()
    return public, secret


def secured(socket_: zmq.Socket[Any]) -> zmq.Socket[Any]:
    """The same socket with our bounds."""
    socket_.linger = _LINGER_MS
    socket_.maxmsgsize = _MAX_FRAME_BYTES
    socket_.tcp_keepalive = 1
    socket_.tcp_keepalive_idle, socket_.tcp_keepalive_intvl, socket_.tcp_keepalive_cnt = 30, 10, 3
    return socket_


def address_towards(host: str, port: int) -> str:
    """This host's address, as a peer at that address sees it. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


class Signal:
    """Wakes a thread that sleeps in a poll."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        """Wake it. Of no effect once closed."""
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Go back to sleep."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1
