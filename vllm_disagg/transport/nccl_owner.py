"""The owner's side of the `nccl` transport: a listener, and for each reader a thread that sends it what it asks for."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from vllm_disagg.errors import TransportError
from vllm_disagg.transport import nccl_wire
from vllm_disagg.transport.base import MemoryKind
from vllm_disagg.transport.nccl_wire import (
    CHUNK_BYTES,
    STALL_S,
    Bye,
    Open,
    Opened,
    Put,
    Sent,
    Signal,
    Staging,
    ToOwner,
    Want,
    Wire,
)
from vllm_disagg.transport.patience import SLICE_S, Patience
from vllm_disagg.transport.regions import RegionTable

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the frames and the descriptor. 1: the first. 2: the owner tells when a message is out, not when it begins."""

_NUM_BUFFERS = 2
_MAX_READERS = 256


class Owner:
    """Lets whoever holds the descriptor read registered memory, and nothing else.

    Args:
        regions: what may be read.
        memory, host: see `NcclTransport`.

    Attributes:
        port: where it listens.
        server_key: its public key.
        reader_keys: the key pair that lets a reader in; the secret one makes the descriptor a secret.

    Raises:
        TransportError: it cannot listen there.
    """

    def __init__(self, regions: RegionTable, *, memory: MemoryKind, host: str) -> None:
        self.regions, self.memory, self.host = regions, memory, host
        self.memory_lock = threading.Lock()
        self.is_closed = False
        self.server_key, server_secret = nccl_wire.new_keys()
        self.reader_keys = nccl_wire.new_keys()
        self._outgoing: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        self._signal = Signal()
        self._servings: dict[bytes, _Serving] = {}
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=_OnlyReaders(self.reader_keys[0]))
        self._router = nccl_wire.secured(self._context.socket(zmq.ROUTER))
        self._router.curve_server = True
        self._router.curve_secretkey, self._router.curve_publickey = server_secret, self.server_key
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._monitor = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self.port = self._router.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError as error:
            self._end()
            raise TransportError(f"cannot listen on {host} for readers: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="disagg-nccl-owner", daemon=True)
        self._thread.start()

    def post(self, reader: bytes, frame: Any) -> None:
        """Send a frame to a reader. Any thread may call this."""
        self._outgoing.put((reader, nccl_wire.encode(frame)))
        self._signal.set()

    def close(self) -> None:
        """Send nothing more. Memory is not looked at afterwards."""
        with self.memory_lock:
            self.is_closed = True
        self._signal.set()
        self._thread.join(STALL_S)

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._router, self._monitor, self._signal.fileno()):
            poller.register(source, zmq.POLLIN)
        while not self.is_closed:
            try:
                self._turn(dict(poller.poll()))
            except Exception:
                logger.exception("transport.owner: one round failed")
        for serving in self._servings.values():
            serving.stop()
        self._flush()
        deadline_s = time.monotonic() + 1.0
        for serving in self._servings.values():
            serving.join(max(0.0, deadline_s - time.monotonic()))
        self._end()

    def _turn(self, ready: dict[Any, int]) -> None:
        if self._signal.fileno() in ready:
            self._signal.clear()
        self._flush()
        if self._router in ready:
            self._hear()
        if self._monitor in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    self._monitor.recv_multipart(zmq.NOBLOCK)
            self._forget_the_lost()

    def _flush(self) -> None:
        while not self._outgoing.empty():
            reader, frame = self._outgoing.get()
            with contextlib.suppress(zmq.ZMQError):  # it has gone meanwhile
                self._router.send_multipart([reader, frame], zmq.NOBLOCK)

    def _hear(self) -> None:
        for _ in range(256):
            try:
                reader, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                frame = nccl_wire.to_owner.decode(frames[0] if len(frames) == 1 else b"")
            except (ValueError, RecursionError):
                logger.debug("transport.bad_frame")
                continue
            self._dispatch(reader, frame)

    def _dispatch(self, reader: bytes, frame: ToOwner) -> None:
        serving = self._servings.get(reader)
        if serving is not None and serving.is_over:
            del self._servings[reader]
            serving = None
        if serving is not None:
            serving.frames.put(frame)
        elif isinstance(frame, Open):
            self._admit(reader, frame)

    def _admit(self, reader: bytes, frame: Open) -> None:
        self._servings = {name: item for name, item in self._servings.items() if not item.is_over}
        if frame.version != VERSION or len(self._servings) >= _MAX_READERS:
            self.post(reader, Bye(reason=f"this side speaks version {VERSION} with up to {_MAX_READERS} readers"))
            return
        self._servings[reader] = _Serving(self, reader, frame.proof)

    def _forget_the_lost(self) -> None:
        """Somebody has disconnected. A router says who only when it is to write to them."""
        for reader, serving in list(self._servings.items()):
            try:
                self._router.send_multipart([reader, b""], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno == zmq.EHOSTUNREACH:
                    serving.stop()
                    del self._servings[reader]

    def _end(self) -> None:
        self._authenticator.stop()
        self._router.disable_monitor()
        self._monitor.close()
        self._router.close()
        self._context.destroy(linger=200)
        self._signal.close()


class _OnlyReaders:
    """Tells ZeroMQ's authenticator which client key to let in (it calls this `callback`)."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the client with this Z85 key may connect."""
        return key == self._public


class _Serving:
    """Sends one reader what it asks for, on a thread of its own: a reader that stands still holds up nobody else."""

    def __init__(self, owner: Owner, reader: bytes, proof: bytes) -> None:
        self._owner, self._reader, self._proof = owner, reader, proof
        self.frames: queue.SimpleQueue[ToOwner | None] = queue.SimpleQueue()
        self.is_over = False
        self._early: dict[str, bytes] = {}
        self._thread = threading.Thread(target=self._run, name="disagg-nccl-serve", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End soon."""
        nccl_wire.let_go(self._thread)
        self.frames.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    # The channel of its wire.

    def put(self, key: str, value: bytes) -> None:
        self._owner.post(self._reader, Put(key=key, value=value))

    def wait(self, key: str) -> bytes:
        patience = Patience(STALL_S)
        while key not in self._early:
            try:
                frame = self.frames.get(timeout=SLICE_S)
            except queue.Empty:
                if patience.is_over():
                    raise TransportError("the reader does not answer") from None
                continue
            if not isinstance(frame, Put):
                raise TransportError("the reader has gone")
            self._early[frame.key] = frame.value
        return self._early[key]

    def _run(self) -> None:
        wire: Wire | None = None
        reason = ""
        try:
            wire = self._open()
            self._serve(wire)
        except Exception as error:
            reason = str(error) or type(error).__name__
            logger.info("transport.reader_dropped error=%s", reason)
        self.is_over = True
        self._owner.post(self._reader, Bye(reason=reason or "closed"))
        if wire is not None:
            wire.close()

    def _open(self) -> Wire:
        proof = nccl_wire.new_proof()
        self._owner.post(self._reader, Opened(proof=proof))
        return Wire(
            memory=self._owner.memory,
            device_id=int(self._owner.regions.device_ids[0]),
            rank=0,
            address=self._owner.host,
            channel=self,
            proofs=(proof, self._proof),
        )

    def _serve(self, wire: Wire) -> None:
        staging = Staging(self._owner.memory, int(self._owner.regions.device_ids[0]))
        free: deque[Any] = deque(staging.buffer() for _ in range(_NUM_BUFFERS))
        out: deque[tuple[Any, Any, Sent]] = deque()
        while True:
            while out and (not free or self.frames.empty()):
                work, buffer, sent = out.popleft()
                wire.finish(work)
                self._owner.post(self._reader, sent)
                free.append(buffer)
            frame = self.frames.get()
            match frame:
                case Want():
                    addresses, lengths = _checked(frame, self._owner.regions)
                    buffer = free.popleft()
                    with self._owner.memory_lock:
                        if self._owner.is_closed:
                            return
                        message = staging.gather(buffer, addresses, lengths)
                    out.append((wire.send(message), buffer, Sent(number=frame.number, num_bytes=len(message))))
                case Put():
                    continue
                case _:
                    return


def _checked(frame: Want, regions: RegionTable) -> Sequence[Any]:
    """What is asked for, once it is known to lie in registered memory."""
    try:
        addresses, lengths = (np.frombuffer(column, np.uint64) for column in (frame.addresses, frame.lengths))
    except ValueError as error:
        raise TransportError(f"a malformed request: {error}") from None
    if not len(addresses) or len(addresses) != len(lengths) or int(addresses.max()) >= 2**63:
        raise TransportError("a malformed request")
    if int(lengths.max()) > CHUNK_BYTES or int(lengths.sum()) > CHUNK_BYTES or int(lengths.min()) == 0:
        raise TransportError("a request of a wrong size")
    regions.find(addresses, lengths, whose="our own")
    return addresses, lengths
