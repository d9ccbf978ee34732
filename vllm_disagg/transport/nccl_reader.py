"""The reader's side of the `nccl` transport: one connection to one owner, on a thread of its own.

It never touches registered memory. What arrives lies in buffers until the transport's owner takes it in `poll`: so a
read that is given up writes nothing any more from that moment on, whatever the peer does.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import zmq

from vllm_disagg.errors import TransportError
from vllm_disagg.transport import nccl_wire
from vllm_disagg.transport.base import MemoryKind
from vllm_disagg.transport.nccl_wire import STALL_S, Bye, Open, Opened, Put, Sent, Signal, Staging, Want, Wire
from vllm_disagg.transport.patience import SLICE_S, Patience
from vllm_disagg.transport.regions import Runs

logger = logging.getLogger(__name__)

NUM_BUFFERS = 4
"""Messages of one peer under way or waiting to be taken: 16 MiB."""

_GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(slots=True, eq=False)
class Chunk:
    """One message's worth of a read. `read` is whatever its owner wants to find again."""

    read: Any
    runs: Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an owner listens, and what lets us in."""

    host: str
    port: int
    server_key: bytes
    reader_public: bytes
    reader_secret: bytes


@dataclass(frozen=True, slots=True)
class _Asked:
    """A message that the owner has been asked for, and what `Wire.finish` takes once it is out."""

    number: int
    num_bytes: int
    chunk: Chunk
    buffer: Any
    work: Any


@dataclass(slots=True)
class _Shared:
    """What the two threads hand each other, under `lock`. Each read waits with its own chunks, and they take turns."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: deque[deque[Chunk]] = field(default_factory=deque)
    arrived: deque[tuple[Chunk, Any]] = field(default_factory=deque)
    free: deque[Any] = field(default_factory=deque)
    error: str = ""


class Link:
    """Asks one owner for chunks and receives them; reads take turns.

    Args:
        peer: its name, for logs.
        place: where it is.
        version: of the frames.
        memory, device_id: of our own memory.
    """

    def __init__(self, peer: str, place: Place, *, version: int, memory: MemoryKind, device_id: int) -> None:
        self._peer, self._place, self._version = peer, place, version
        self._memory, self._device_id = memory, device_id
        self._shared = _Shared()
        self._asked: deque[_Asked] = deque()
        self._number = 0
        self._patience = Patience(STALL_S)
        self._stopping = False
        self._opening = True
        self._early: dict[str, bytes] = {}
        self._proof: bytes | None = None
        self._sent: deque[Sent] = deque()
        self._signal = Signal()
        self._thread = threading.Thread(target=self._run, name="disagg-nccl-read", daemon=True)
        self._thread.start()

    # Called by the transport's owner.

    def submit(self, chunks: list[Chunk]) -> None:
        """Ask for these, the chunks of one read, in turn with other reads."""
        with self._shared.lock:
            self._shared.waiting.append(deque(chunks))
        self._signal.set()

    def withdraw(self, read: Any) -> None:
        """Do not ask for what is left of a read."""
        with self._shared.lock:
            self._shared.waiting = deque(chunks for chunks in self._shared.waiting if chunks[0].read is not read)

    def take(self) -> list[tuple[Chunk, Any]]:
        """What has arrived since the last call, each with the buffer to `give_back`."""
        with self._shared.lock:
            taken = list(self._shared.arrived)
            self._shared.arrived.clear()
        return taken

    def give_back(self, buffer: Any) -> None:
        """A buffer's content is no longer needed."""
        with self._shared.lock:
            self._shared.free.append(buffer)
        self._signal.set()

    @property
    def error(self) -> str:
        """Why this link is dead; empty while it lives."""
        return self._shared.error

    def close(self) -> None:
        """End soon; nobody waits for it."""
        nccl_wire.let_go(self._thread)
        self._stopping = True
        self._signal.set()

    def join(self, timeout_s: float) -> None:
        """Wait for its thread to end."""
        self._thread.join(timeout_s)

    # The thread.

    def _run(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        wire: Wire | None = None
        error = "closed"
        try:
            self._dial(context)
            wire = self._open()
            self._opening = False
            staging = Staging(self._memory, self._device_id)
            with self._shared.lock:
                self._shared.free.extend(staging.buffer() for _ in range(NUM_BUFFERS))
            while not self._stopping:
                self._turn(wire)
        except Exception as failure:
            error = str(failure) or type(failure).__name__
            logger.info("transport.link_dropped peer=%s error=%s", self._peer, error)
        with self._shared.lock:
            self._shared.error = error
        self._hang_up(context)
        self._asked.clear()  # what is under way on the wire would keep it open
        if wire is not None:
            wire.close()
        self._signal.close()

    def _dial(self, context: zmq.Context[Any]) -> None:
        self._dealer = nccl_wire.secured(context.socket(zmq.DEALER))
        self._dealer.curve_serverkey = self._place.server_key
        self._dealer.curve_publickey = self._place.reader_public
        self._dealer.curve_secretkey = self._place.reader_secret
        self._monitor = self._dealer.get_monitor_socket(_GONE)
        self._dealer.connect(f"tcp://{self._place.host}:{self._place.port}")
        self._poller = zmq.Poller()
        for source in (self._dealer, self._monitor, self._signal.fileno()):
            self._poller.register(source, zmq.POLLIN)

    def _hang_up(self, context: zmq.Context[Any]) -> None:
        try:
            self._dealer.send(nccl_wire.encode(Bye()), zmq.NOBLOCK)
            self._dealer.disable_monitor()
            self._monitor.close()
            self._dealer.close()
        except Exception as error:
            logger.debug("transport.hang_up peer=%s error=%s", self._peer, error)
        context.destroy(linger=200)

    def _open(self) -> Wire:
        """Make the communicator. Takes at most about `STALL_S`, apart from what the library waits for."""
        self._patience.renew()
        proof = nccl_wire.new_proof()
        self._say(Open(version=self._version, proof=proof))
        while self._proof is None:
            self._listen()
        return Wire(
            memory=self._memory,
            device_id=self._device_id,
            rank=1,
            address=nccl_wire.address_towards(self._place.host, self._place.port),
            channel=self,
            proofs=(proof, self._proof),
        )

    # The channel of its wire.

    def put(self, key: str, value: bytes) -> None:
        self._say(Put(key=key, value=value))

    def wait(self, key: str) -> bytes:
        while key not in self._early:
            self._listen()
        return self._early[key]

    def _turn(self, wire: Wire) -> None:
        self._ask(wire)
        self._listen()
        while self._sent:
            self._receive(wire, self._sent.popleft())

    def _ask(self, wire: Wire) -> None:
        if not self._asked:
            self._patience.renew()
        while (found := self._next()) is not None:
            chunk, buffer = found
            self._number += 1
            num_bytes = int(chunk.runs.num_bytes.sum())
            self._asked.append(_Asked(self._number, num_bytes, chunk, buffer, wire.receive(buffer[:num_bytes])))
            columns = chunk.runs.remote.tobytes(), chunk.runs.num_bytes.tobytes()
            self._say(Want(number=self._number, addresses=columns[0], lengths=columns[1]))

    def _next(self) -> tuple[Chunk, Any] | None:
        with self._shared.lock:
            if not self._shared.waiting or not self._shared.free:
                return None
            chunks = self._shared.waiting.popleft()
            chunk = chunks.popleft()
            if chunks:
                self._shared.waiting.append(chunks)
            return chunk, self._shared.free.popleft()

    def _receive(self, wire: Wire, sent: Sent) -> None:
        if not self._asked:
            raise TransportError("the peer sends what nobody has asked for")
        asked = self._asked.popleft()
        if (sent.number, sent.num_bytes) != (asked.number, asked.num_bytes):
            raise TransportError("the peer answers another question")
        wire.finish(asked.work)
        self._patience.renew()
        with self._shared.lock:
            self._shared.arrived.append((asked.chunk, asked.buffer))

    def _listen(self) -> None:
        """Sleep until something happens, and hear what the owner says."""
        is_waiting = self._opening or bool(self._asked)
        events = dict(self._poller.poll(int(SLICE_S * 1000) if is_waiting else None))
        if self._signal.fileno() in events:
            self._signal.clear()
        if self._stopping:
            raise TransportError("closed")
        if self._dealer in events:
            self._hear()
        elif self._monitor in events:
            raise TransportError("the peer is gone")
        elif not events and is_waiting and self._patience.is_over():
            raise TransportError(f"the peer has not answered within {STALL_S:g} s")

    def _hear(self) -> None:
        for _ in range(256):
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if frames == [b""]:  # it only wants to know whether we live
                continue
            try:
                frame = nccl_wire.to_reader.decode(frames[0] if len(frames) == 1 else b"")
            except (ValueError, RecursionError):
                raise TransportError("the peer says something malformed") from None
            match frame:
                case Opened():
                    self._proof = frame.proof
                case Put():
                    self._early[frame.key] = frame.value
                case Sent():
                    self._sent.append(frame)
                case Bye():
                    raise TransportError(f"the peer has ended the connection: {frame.reason}")

    def _say(self, frame: Any) -> None:
        try:
            self._dealer.send(nccl_wire.encode(frame), zmq.NOBLOCK)
        except zmq.Again:
            raise TransportError("the peer takes nothing") from None
