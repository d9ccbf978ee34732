"""The worker's own thread: it alone uses the transport, so that neither a long forward step nor a slow peer waits for
the other. It sleeps unless the engine's core writes, a read is under way, or peers are to be served.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.mailbox import Mailbox
from vllm_disagg.connector.messages import (
    CancelRead,
    ConnectPeer,
    DisconnectPeer,
    FromWorker,
    PeerState,
    Progress,
    ReadEnded,
    ToWorker,
)
from vllm_disagg.connector.secure import CurveKeys, send_now, server_socket, start_authenticator
from vllm_disagg.core.types import BlockIds, EngineId, TransferId
from vllm_disagg.transport.base import Outcome, PeerName, TransferHandle, Transport
from vllm_disagg.transport.layout import RankLayout, check_same_shape, plan_reads

logger = logging.getLogger(__name__)

READ_POLL_S = 0.0002
"""Between two looks at reads under way: they progress only while looked at."""

_MAX_EARLY_CANCELS = 1024

SERVE_POLL_MS = 1
"""Between two rounds of serving peers: the owner's side of connections and reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadJob:
    """Fetch one request's blocks: `remote_blocks` of that engine into our `local_blocks`, pairwise in each group."""

    transfer_id: TransferId
    engine_id: EngineId
    local_blocks: BlockIds
    remote_blocks: BlockIds


@dataclass(slots=True)
class _Peer:
    name: PeerName
    layout: RankLayout


@dataclass(slots=True)
class _Reads:
    """Reads under way, by both of their names."""

    handles: dict[TransferId, TransferHandle] = field(default_factory=dict)
    transfers: dict[int, TransferId] = field(default_factory=dict)

    def add(self, transfer_id: TransferId, handle: TransferHandle) -> None:
        self.handles[transfer_id] = handle
        self.transfers[id(handle)] = transfer_id

    def pop(self, handle: TransferHandle) -> TransferId | None:
        transfer_id = self.transfers.pop(id(handle), None)
        if transfer_id is not None:
            del self.handles[transfer_id]
        return transfer_id


class WorkerThread:
    """Serves one worker's memory to peers, and reads from theirs.

    Args:
        open_transport: builds the transport and registers this worker's memory; called on the new thread.
        layout: this worker's KV cache.
        keys: the deployment's CURVE keys.
    """

    def __init__(
        self, *, open_transport: Callable[[], tuple[Transport, bytes]], layout: RankLayout, keys: CurveKeys
    ) -> None:
        self._open_transport, self._layout = open_transport, layout
        self._jobs: Mailbox[ReadJob | None] = Mailbox()
        self._peers: dict[EngineId, _Peer] = {}
        self._reads = _Reads()
        self._cancelled: dict[TransferId, None] = {}
        self._serving = False
        self._pause = threading.Event()  # never set: a wait with a fraction of a millisecond
        self._guard = Guard("worker")
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = start_authenticator(self._context, keys)
        self._link = server_socket(self._context, zmq.DEALER, keys)
        port = self._link.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._poller = zmq.Poller()
        self._descriptor: bytes | Exception = b""
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="disagg-worker", daemon=True)

    def start(self) -> bytes:
        """Run the thread and return this worker's transport descriptor.

        Raises:
            TransportError: the transport could not be built or refused the memory.
        """
        self._thread.start()
        self._opened.wait()
        if isinstance(self._descriptor, Exception):
            raise self._descriptor
        return self._descriptor

    def submit(self, job: ReadJob) -> None:
        """Start a read. It ends as one `ReadEnded` to the engine's core."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread, close the transport and the link. Idempotent."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            transport, self._descriptor = self._open_transport()
        except Exception as error:  # told to the thread that waits in `start`
            self._descriptor = error
            self._opened.set()
            self._close()
            return
        self._opened.set()
        self._transport = transport
        self._poller.register(self._link, zmq.POLLIN)
        self._poller.register(self._jobs.fileno(), zmq.POLLIN)
        self._guard.run(self._turn)
        transport.close()
        self._close()

    def _turn(self) -> bool:
        """One round: orders first, then reads and peers. False when told to stop."""
        self._wait()
        self._guard.each(self._heard(), self._obey)
        jobs = self._jobs.take_all()
        self._guard.each((job for job in jobs if job is not None), self._begin)
        if self._transport.num_active:
            self._guard.each(self._transport.poll(), self._ended)
        if self._serving:
            self._transport.progress()
        return None not in jobs

    def _wait(self) -> None:
        if self._transport.num_active:
            self._pause.wait(READ_POLL_S)
        else:
            self._poller.poll(SERVE_POLL_MS if self._serving else None)

    def _heard(self) -> Iterator[ToWorker]:
        while True:
            try:
                frames = self._link.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = messages.decode_or_none(messages.to_worker, frames)
            if message is not None:
                yield message

    def _obey(self, message: ToWorker) -> None:
        match message:
            case Progress():
                self._serving = message.active
            case ConnectPeer():
                self._connect(message)
            case DisconnectPeer():
                peer = self._peers.pop(message.engine_id, None)
                if peer is not None:
                    self._transport.disconnect(peer.name)
            case CancelRead():
                handle = self._reads.handles.get(message.transfer_id)
                if handle is None:
                    self._cancel_later(message.transfer_id)
                else:
                    self._transport.cancel(handle)

    def _cancel_later(self, transfer_id: TransferId) -> None:
        """Remember a cancel that came before its job. One whose job was over already is forgotten in time."""
        self._cancelled[transfer_id] = None
        if len(self._cancelled) > _MAX_EARLY_CANCELS:
            del self._cancelled[next(iter(self._cancelled))]

    def _connect(self, message: ConnectPeer) -> None:
        error = ""
        try:
            check_same_shape(self._layout, message.rank.layout)
            name = self._transport.connect(message.rank.descriptor)
            self._peers[message.engine_id] = _Peer(name, message.rank.layout)
        except Exception as failure:  # whatever a peer's descriptor does to the library, the peer is refused
            error = str(failure) or type(failure).__name__
        self._say(PeerState(engine_id=message.engine_id, error=error))

    def _begin(self, job: ReadJob) -> None:
        if job.transfer_id in self._cancelled:
            del self._cancelled[job.transfer_id]
            self._say(_not_begun(job.transfer_id, "cancelled before it began"))
            return
        peer = self._peers.get(job.engine_id)
        if peer is None:
            self._say(_not_begun(job.transfer_id, "the prefill engine is not connected"))
            return
        try:
            copies = plan_reads(self._layout, peer.layout, job.local_blocks, job.remote_blocks)
            if not copies:
                self._say(_not_begun(job.transfer_id, ""))
                return
            handle = self._transport.read(peer.name, copies)
        except Exception as failure:  # a job that cannot be planned fails alone
            self._say(_not_begun(job.transfer_id, str(failure) or type(failure).__name__))
            return
        self._reads.add(job.transfer_id, handle)

    def _ended(self, outcome: Outcome) -> None:
        transfer_id = self._reads.pop(outcome.handle)
        if transfer_id is None:
            return
        error = "" if outcome.state == "done" else outcome.error or outcome.state
        self._say(
            ReadEnded(
                transfer_id=transfer_id,
                num_bytes=outcome.num_bytes,
                num_descriptors=outcome.num_descriptors,
                seconds=outcome.seconds,
                error=error,
            )
        )

    def _say(self, message: FromWorker) -> None:
        send_now(self._link, messages.encode(message))

    def _close(self) -> None:
        self._jobs.close()
        self._authenticator.stop()
        self._context.destroy(linger=100)


def _not_begun(transfer_id: TransferId, error: str) -> ReadEnded:
    return ReadEnded(transfer_id=transfer_id, num_bytes=0, num_descriptors=0, seconds=0.0, error=error)
