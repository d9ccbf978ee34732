"""The worker's own thread: it alone uses the transport, so that neither a long forward step nor a slow peer waits for
the other. It sleeps unless the engine's core writes, a read is under way, or peers are to be served.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.digests import Digested, Digester
from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.link_watch import LinkWatch
from vllm_disagg.connector.mailbox import Mailbox
from vllm_disagg.connector.messages import (
    BeginRead,
    BlocksDigested,
    CancelRead,
    ConnectPeer,
    DigestBlocks,
    DisconnectPeer,
    FillProbe,
    FromWorker,
    LinkStalled,
    PeerState,
    ProbeEnded,
    ProbeFilled,
    Progress,
    RankInfo,
    ReadEnded,
    RebuildLinks,
    RunProbe,
    ToWorker,
)
from vllm_disagg.connector.probe_memory import PROBE_BYTES, ProbeMemory
from vllm_disagg.connector.probe_run import ProbeRun, ProbeSource
from vllm_disagg.connector.secure import CurveKeys, send_now, server_socket, start_authenticator
from vllm_disagg.core.probe import WorkerReport
from vllm_disagg.core.types import EngineId, TransferId
from vllm_disagg.core.verify import DigestJob, HeadSums
from vllm_disagg.errors import IncompatiblePeer, TransportError
from vllm_disagg.transport.base import Copy, Outcome, PeerName, TransferHandle, Transport
from vllm_disagg.transport.layout import RankLayout, ReadPlan, plan_routes

logger = logging.getLogger(__name__)

READ_POLL_S = 0.0002
"""Between two looks at reads under way: they progress only while looked at."""

_MAX_EARLY_CANCELS = 1024

SERVE_POLL_MS = 1
"""Between two rounds of serving peers: the owner's side of connections and reads."""


@dataclass(frozen=True, slots=True)
class _Source:
    """One rank of a prefill engine, and what we read of it."""

    name: PeerName
    plan: ReadPlan
    index: int
    rank: RankInfo


@dataclass(slots=True, eq=False)
class _Pull:
    """The reads of one job that are under way, one from each rank that holds a part of it, and the sum of those that
    have ended."""

    transfer_id: TransferId
    verify: DigestJob | None = None
    handles: list[TransferHandle] = field(default_factory=list)
    num_bytes: int = 0
    num_descriptors: int = 0
    seconds: float = 0.0
    error: str = ""
    sums: tuple[HeadSums, ...] = ()

    def add(self, outcome: Outcome) -> None:
        """One of its reads has ended."""
        self.handles.remove(outcome.handle)
        self.num_bytes += outcome.num_bytes
        self.num_descriptors += outcome.num_descriptors
        self.seconds = max(self.seconds, outcome.seconds)
        if outcome.state != "done":
            self.error = self.error or outcome.error or outcome.state

    @property
    def ended(self) -> ReadEnded:
        """The report, once no handle is left."""
        return ReadEnded(
            transfer_id=self.transfer_id,
            num_bytes=self.num_bytes,
            num_descriptors=self.num_descriptors,
            seconds=self.seconds,
            error=self.error,
            sums=self.sums,
        )


class WorkerThread:
    """Serves one worker's memory to peers, and reads from theirs.

    Args:
        open_transport: builds the transport and registers this worker's memory; called on the new thread.
        layout: this worker's KV cache.
        keys: the deployment's CURVE keys.
        digester: makes digests of the worker's blocks.
        spread: see `plan_routes`.
        probe: memory for probes.
        stall_s: how long nothing may arrive from a peer while reads from it are under way, before that is told.
    """

    def __init__(
        self,
        *,
        open_transport: Callable[[], tuple[Transport, bytes]],
        layout: RankLayout,
        keys: CurveKeys,
        digester: Digester,
        spread: int = 0,
        probe: ProbeMemory | None = None,
        stall_s: float = math.inf,
    ) -> None:
        self._open_transport, self._layout = open_transport, layout
        self._jobs: Mailbox[BeginRead | Digested | None] = Mailbox()
        self._digester, self._spread = digester, spread
        self._sources: dict[EngineId, list[_Source]] = {}
        self._pulls: dict[TransferId, _Pull] = {}
        self._by_handle: dict[int, _Pull] = {}
        self._cancelled: dict[TransferId, None] = {}
        self._to_connect: dict[EngineId, ConnectPeer] = {}
        self._watch = LinkWatch(stall_s)
        self._probe_memory = probe
        self._probe: ProbeRun | None = None
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

    def submit(self, job: BeginRead) -> None:
        """Start a read. It ends as one `ReadEnded` to the engine's core."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread, close the transport and the link. Idempotent."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(timeout=5.0)
        self._digester.stop()

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
        self._guard.each((job for job in jobs if job is not None), self._take)
        if self._to_connect:  # one in a turn, so that reads go on between them
            self._guard.each([self._to_connect.pop(next(iter(self._to_connect)))], self._connect)
        if self._transport.num_active:
            self._guard.each(self._transport.poll(), self._ended)
            self._look_at_links()
        if self._serving:
            self._transport.progress()
        if self._probe is not None:
            self._go_on_probing(self._probe)
        return None not in jobs

    def _wait(self) -> None:
        if self._to_connect or (self._probe is not None and self._probe.wants_turn):
            return
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
                self._to_connect[message.engine_id] = message
            case DisconnectPeer():
                self._to_connect.pop(message.engine_id, None)
                self._disconnect(self._sources.pop(message.engine_id, ()))
            case RebuildLinks():
                self._rebuild(self._sources.get(message.engine_id, ()))
            case BeginRead():
                self._begin(message)
            case DigestBlocks():
                self._digester.submit(message.job, self._jobs.put)
            case FillProbe():
                self._say(ProbeFilled(digest=b"" if self._probe_memory is None else self._probe_memory.fill()))
            case RunProbe():
                self._begin_probe(message)
            case CancelRead():
                pull = self._pulls.get(message.transfer_id)
                if pull is None:
                    self._cancel_later(message.transfer_id)
                else:
                    self._cancel(pull)

    def _cancel_later(self, transfer_id: TransferId) -> None:
        """Remember a cancel that came before its job. One whose job was over already is forgotten in time."""
        self._cancelled[transfer_id] = None
        if len(self._cancelled) > _MAX_EARLY_CANCELS:
            del self._cancelled[next(iter(self._cancelled))]

    def _connect(self, message: ConnectPeer) -> None:
        sources: list[_Source] = []
        error, misfit = "", False
        try:
            routes = plan_routes(self._layout, [rank.layout for rank in message.ranks], spread=self._spread)
            for index, wanted in routes.items():
                rank = message.ranks[index]
                sources.append(_Source(self._transport.connect(rank.descriptor), ReadPlan(wanted), index, rank))
        except Exception as failure:  # whatever a peer's descriptor does to the library, the peer is refused
            error, misfit = str(failure) or type(failure).__name__, isinstance(failure, IncompatiblePeer)
            self._disconnect(sources)
        else:
            self._sources[message.engine_id] = sources
        self._say(PeerState(engine_id=message.engine_id, error=error, misfit=misfit))
        for source in self._sources.get(message.engine_id, ()):
            self._transport.warm(source.name)

    def _disconnect(self, sources: Sequence[_Source]) -> None:
        for source in sources:
            self._transport.disconnect(source.name)
            self._watch.forget(source.name)

    def _look_at_links(self) -> None:
        """Tell of peers from which nothing comes any more. Whether their links are at fault the engine's core knows,
        which also speaks to the peer."""
        if not self._watch.is_due:
            return
        for engine_id, sources in self._sources.items():
            limits = [self._watch.look(source.name, self._transport.movement(source.name)) for source in sources]
            if any(limits):
                self._say(LinkStalled(engine_id=engine_id, limits=max(limits)))

    def _rebuild(self, sources: Sequence[_Source]) -> None:
        for source in sources:
            if self._watch.stands_still(source.name):
                logger.warning("transport.rebuilt peer=%s: nothing had come from it", source.name)
                self._transport.rebuild(source.name)
                self._watch.forget(source.name)

    def _take(self, item: BeginRead | Digested) -> None:
        if isinstance(item, BeginRead):
            self._begin(item)
        elif (pull := self._pulls.pop(item.transfer_id, None)) is not None:
            pull.sums, pull.error = item.sums, item.error
            self._say(pull.ended)
        else:
            self._say(BlocksDigested(transfer_id=item.transfer_id, sums=item.sums, error=item.error))

    def _begin_probe(self, message: RunProbe) -> None:
        """Probe one peer at a time; whoever gave the order knows of no other one."""
        sources = [
            ProbeSource(source.name, source.rank.probe, message.digests[source.index])
            for source in self._sources.get(message.engine_id, ())
            if source.rank.probe is not None
            and source.rank.probe.num_bytes >= PROBE_BYTES
            and source.index < len(message.digests)
        ]
        if self._probe_memory is None or self._probe is not None or not sources:
            why = "another probe is under way" if self._probe is not None else "there is nothing to read for a probe"
            self._say(ProbeEnded(report=WorkerReport(error=why)))
            return
        self._probe = ProbeRun(
            transport=self._transport,
            memory=self._probe_memory,
            sources=sources,
            on_done=lambda report: self._say(ProbeEnded(report=report)),
        )

    def _go_on_probing(self, probe: ProbeRun) -> None:
        if probe.wants_turn:
            probe.step()
        probe.keep_time()
        if probe.is_over:
            self._probe = None

    def _begin(self, job: BeginRead) -> None:
        if job.transfer_id in self._cancelled:
            del self._cancelled[job.transfer_id]
            self._say(_Pull(job.transfer_id, error="cancelled before it began").ended)
            return
        pull = _Pull(job.transfer_id, job.verify)
        try:
            for source, copies in self._planned(job):
                handle = self._transport.read(source.name, copies)
                pull.handles.append(handle)
                self._by_handle[id(handle)] = pull
        except Exception as failure:  # a job that cannot be planned or started fails alone
            pull.error = str(failure) or type(failure).__name__
        if pull.handles:
            self._pulls[job.transfer_id] = pull
        else:
            self._say(pull.ended)
        if pull.error:
            self._cancel(pull)

    def _planned(self, job: BeginRead) -> list[tuple[_Source, Sequence[Copy]]]:
        """What to read from which rank; nothing where there is nothing to read."""
        sources = self._sources.get(job.engine_id)
        if sources is None:
            raise TransportError("the prefill engine is not connected")
        planned = [(source, source.plan.copies(job.local_blocks, job.remote_blocks)) for source in sources]
        return [(source, copies) for source, copies in planned if copies]

    def _cancel(self, pull: _Pull) -> None:
        for handle in pull.handles:
            self._transport.cancel(handle)

    def _ended(self, outcome: Outcome) -> None:
        pull = self._by_handle.pop(id(outcome.handle), None)
        if pull is None:
            if self._probe is not None and self._probe.handle is outcome.handle:
                self._probe.ended(outcome)
            return
        pull.add(outcome)
        if not pull.handles and pull.verify is not None and not pull.error:
            self._digester.submit(pull.verify, self._jobs.put)
        elif not pull.handles:
            del self._pulls[pull.transfer_id]
            self._say(pull.ended)
        elif pull.error:
            self._cancel(pull)  # of no use without the part that has failed

    def _say(self, message: FromWorker) -> None:
        send_now(self._link, messages.encode(message))

    def _close(self) -> None:
        self._jobs.close()
        self._authenticator.stop()
        self._context.destroy(linger=100)
