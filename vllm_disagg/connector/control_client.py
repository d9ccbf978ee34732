"""Decode's end of the control channel: one thread that finds prefill engines, keeps leases alive, follows the reads
of this engine's workers, and proves afterwards that what was read was still held.

vLLM's main thread gives orders (`announce`, `expect`, `cancel`, `forget`) and takes reports; it never waits here.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.mailbox import Mailbox
from vllm_disagg.connector.messages import (
    BeginRead,
    CancelRead,
    FromPrefill,
    LinkStalled,
    PeerState,
    ProbeEnded,
    ReadEnded,
    Release,
    Released,
    Renew,
    Renewed,
    RunProbe,
    ToWorker,
)
from vllm_disagg.connector.peer_table import PeerTable, frames_of
from vllm_disagg.connector.peers import Peer, PeerPhase
from vllm_disagg.connector.pull import Cause, Drained, Pull, Result, Settled
from vllm_disagg.connector.secure import CurveKeys, client_socket, send_now
from vllm_disagg.connector.tally import LATE_READS, Tally
from vllm_disagg.core.handoff import Handoff
from vllm_disagg.core.probe import WorkerReport
from vllm_disagg.core.types import EngineId, TransferId

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 1 / 6
"""Interval of renewals as a share of the lease, which the handoff tells."""


Order = Callable[[], None]
"""Something the thread is to do, with its arguments bound."""

Report = Settled | Drained


class DecodeControl:
    """Follows every pull of one decode engine.

    Args:
        keys: the deployment's CURVE keys.
        fingerprint: what a prefill engine must have in common with us.
        worker_links: endpoints of our workers.
        tp_ranks: which tensor-parallel index each of them has.
        pull_timeout_s: from `expect` to the last moment at which a pull settles.
        on_report: called on this thread when `take_reports` has something to return.
    """

    def __init__(
        self,
        *,
        keys: CurveKeys,
        fingerprint: Mapping[str, str],
        worker_links: Sequence[str],
        tp_ranks: Sequence[int],
        pull_timeout_s: float,
        on_report: Callable[[], None],
    ) -> None:
        self._pull_timeout_s, self._tp_ranks = pull_timeout_s, tuple(tp_ranks)
        self._on_report = on_report
        self._orders: Mailbox[Order] = Mailbox()
        self._reports: deque[Report] = deque()
        self._pulls: dict[TransferId, Pull] = {}
        self._renew_at_s: float | None = None
        self._on_probed: Callable[[int, WorkerReport], None] = lambda index, report: None
        self._stopping = False
        self._guard = Guard("control")
        self.tally = Tally()
        self._context: zmq.Context[Any] = zmq.Context()
        self._links = [client_socket(self._context, zmq.DEALER, keys) for _ in worker_links]
        for link, endpoint in zip(self._links, worker_links, strict=True):
            link.connect(endpoint)
        self._poller = zmq.Poller()
        self.peers = PeerTable(
            context=self._context,
            keys=keys,
            fingerprint=fingerprint,
            poller=self._poller,
            guard=self._guard,
            tally=self.tally,
            num_workers=len(self._links),
            tell_workers=self._tell_workers,
            on_said=self._peer_said,
            on_lost=self._peer_lost,
        )
        """The prefill engines that are known. Only this thread changes them."""
        self._thread = threading.Thread(target=self._run, name="disagg-decode-control", daemon=True)

    # Called by vLLM's main thread.

    def start(self) -> None:
        """Run the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close every socket. Idempotent."""
        if self._thread.is_alive():
            self._orders.put(self._stopped)
            self._thread.join(timeout=5.0)

    def announce(self, handoff: Handoff) -> None:
        """A request with this handoff has arrived: connect to its prefill engine and keep its lease alive."""
        self._orders.put(functools.partial(self._announced, handoff))

    def readiness(self, handoff: Handoff) -> tuple[PeerPhase, Cause]:
        """Whether this transfer can be read from its engine now, and if not, why: a metric label."""
        peer = self.peers.get(handoff.engine_id)
        if peer is None:
            return "greeting", "peer_unreachable"
        if peer.phase == "ready" and peer.quarantine.is_resting:
            if handoff.transfer_id not in self._pulls:
                return "greeting", "peer_resting"  # its announcement is on its way, and may make it the probe
            if peer.quarantine.probe != handoff.transfer_id:
                return "failed", "peer_resting"
        return peer.phase, peer.cause or "peer_unreachable"

    def expect(self, transfer_id: TransferId, *, first_block: int = 0) -> None:
        """The workers get this read with the coming step; a `Settled` follows, by the pull deadline at the latest. Of
        the prompt's blocks those from `first_block` on are read."""
        self._orders.put(functools.partial(self._expected, transfer_id, first_block))

    def peer_state(self, engine_id: EngineId) -> tuple[PeerPhase, str]:
        """How far that engine is connected, and why not further: a metric label."""
        peer = self.peers.get(engine_id)
        return ("greeting", "") if peer is None else (peer.phase, peer.cause or "peer_unreachable")

    def pair(self, engine_id: EngineId, address: str) -> None:
        """Connect to a prefill engine without a request, or again after its back-off."""
        self._orders.put(functools.partial(self.peers.pair, engine_id, address))

    def introduce(self, engine_id: EngineId, address: str) -> bool:
        """Connect to a prefill engine ahead of its first request. False, and nothing, if enough of them are known."""
        if not self.peers.has_room_for(engine_id):
            return False
        self._orders.put(functools.partial(self.peers.introduce, engine_id, address))
        return True

    def probe(self, order: RunProbe, on_ended: Callable[[int, WorkerReport], None]) -> None:
        """Have every worker probe a prefill engine that is ready. `on_ended` is called on this thread with a worker's
        index and what it has found. One probe at a time: a new one is reported instead of the last."""
        self._orders.put(functools.partial(self._begin_probe, order, on_ended))

    @property
    def num_workers(self) -> int:
        """How many reports a probe brings."""
        return len(self._links)

    def begin(self, handoff: Handoff, read: BeginRead, *, first_block: int = 0) -> None:
        """`announce` and `expect` in one, and the workers begin this read at once."""
        self._orders.put(functools.partial(self._begun, handoff, read, first_block))

    def cancel(self, transfer_id: TransferId) -> None:
        """The client of an expected pull has left. Its `Settled` comes at once."""
        self._orders.put(functools.partial(self._give_up, transfer_id, "cancelled", "client_left"))

    def forget(self, transfer_id: TransferId) -> None:
        """An announced transfer is not going to be read: release its lease."""
        self._orders.put(functools.partial(self._forgotten, transfer_id))

    def take_reports(self) -> list[Report]:
        """Reports since the last call, oldest first."""
        taken = []
        while self._reports:
            taken.append(self._reports.popleft())
        return taken

    @property
    def has_reports(self) -> bool:
        """Whether `take_reports` would return something."""
        return bool(self._reports)

    # The thread.

    def _run(self) -> None:
        self._poller.register(self._orders.fileno(), zmq.POLLIN)
        for link in self._links:
            self._poller.register(link, zmq.POLLIN)
        self._guard.run(self._turn)
        self._close()

    def _turn(self) -> bool:
        ready = dict(self._poller.poll(self._timeout_ms(time.monotonic())))
        self._obey_all()
        self._hear_workers(ready)
        self.peers.hear(ready)
        self._keep_time(time.monotonic())
        return not self._stopping

    def _obey_all(self) -> None:
        self._guard.each(self._orders.take_all(), lambda order: order())

    def _stopped(self) -> None:
        self._stopping = True

    def _announced(self, handoff: Handoff) -> None:
        self._follow(handoff)
        self._renew(time.monotonic())  # it may have waited on its way here

    def _follow(self, handoff: Handoff) -> None:
        now_s = time.monotonic()
        peer = self.peers.get(handoff.engine_id)
        if peer is not None:  # before `readiness` can see that it was announced
            peer.quarantine.admits(handoff.transfer_id, now_s=now_s)
        self._pulls[handoff.transfer_id] = Pull(
            transfer_id=handoff.transfer_id,
            engine_id=handoff.engine_id,
            nonce=handoff.nonce,
            verify=handoff.verify,
            num_blocks=len(handoff.block_ids[0]) if handoff.block_ids else 0,
            renew_interval_s=handoff.lease_s * RENEWALS_PER_LEASE,
        )
        self.peers.pair(handoff.engine_id, handoff.control)

    def _begin_probe(self, order: RunProbe, on_ended: Callable[[int, WorkerReport], None]) -> None:
        self._on_probed = on_ended
        self._tell_workers(order)

    def _expected(self, transfer_id: TransferId, first_block: int) -> None:
        now_s = time.monotonic()
        pull = self._pulls.get(transfer_id)
        if pull is None:  # lost or forgotten between the scheduler's look and its order: the read still comes
            pull = self._pulls[transfer_id] = Pull(transfer_id=transfer_id, engine_id=EngineId(""))
            pull.error = "lease_expired"
        pull.phase, pull.waiting, pull.first_block = "reading", set(range(len(self._links))), first_block
        pull.expected_s, pull.deadline_s = now_s, now_s + self._pull_timeout_s
        if pull.error:
            self._give_up(transfer_id, "failed", pull.error)

    def _begun(self, handoff: Handoff, read: BeginRead, first_block: int) -> None:
        self._follow(handoff)
        self._expected(read.transfer_id, first_block)
        self._tell_workers(read)
        self._renew(time.monotonic())  # after the order to read, which does not wait for it

    def _forgotten(self, transfer_id: TransferId) -> None:
        pull = self._pulls.pop(transfer_id, None)
        if pull is not None:
            self._release(pull)
            self._undecided(pull)

    # Workers.

    def _hear_workers(self, ready: Mapping[Any, int]) -> None:
        for index, link in enumerate(self._links):
            if link not in ready:
                continue
            self._guard.each(frames_of(link), functools.partial(self._worker_said, index))

    def _worker_said(self, index: int, frames: list[bytes]) -> None:
        # A fast read can end while we still listen here: its order was given before, so obey it first.
        self._obey_all()
        match messages.decode_or_none(messages.from_worker, frames):
            case ReadEnded() as ended:
                self._read_ended(index, ended)
            case PeerState() as state:
                self.peers.worker_connected(index, state)
            case LinkStalled() as stalled:
                self.peers.worker_stalled(index, stalled)
            case ProbeEnded() as ended_probe:
                self._on_probed(index, ended_probe.report)

    def _read_ended(self, index: int, ended: ReadEnded) -> None:
        pull = self._pulls.get(ended.transfer_id)
        if pull is None or index not in pull.waiting:
            return
        pull.waiting.discard(index)
        pull.num_bytes += ended.num_bytes
        pull.num_descriptors += ended.num_descriptors
        pull.read_s = max(pull.read_s, ended.seconds)
        if pull.verify != "off":
            pull.sums.setdefault(self._tp_ranks[index], []).append(ended.sums)
        if ended.error and pull.phase == "reading":
            logger.warning("transfer.failed transfer=%s error=%s", ended.transfer_id, ended.error)
            self._strike(pull, timed_out=False)
            self._give_up(ended.transfer_id, "failed", "transport")
        elif not pull.waiting and pull.phase == "reading":
            pull.phase, pull.proving_since_s = "proving", time.monotonic()
            self._release(pull, verify=pull.verify != "off")
        elif not pull.waiting and pull.phase == "draining":
            self._over(pull)
            self._report(Drained(pull.transfer_id))

    def _tell_workers(self, message: ToWorker, *, only: Sequence[int] | None = None) -> None:
        frame = messages.encode(message)
        for index, link in enumerate(self._links):
            if only is None or index in only:
                send_now(link, frame)

    # Prefill engines.

    def _peer_said(self, peer: Peer, message: FromPrefill) -> None:
        match message:
            case Renewed():
                for transfer_id in message.lost:
                    if self._is_of(peer, transfer_id):
                        self._lost(transfer_id)
            case Released() if self._is_of(peer, message.transfer_id):
                self._proven(message)

    def _peer_lost(self, peer: Peer, cause: Cause) -> None:
        """Fail what waits for this peer."""
        for pull in [pull for pull in self._pulls.values() if pull.engine_id == peer.engine_id]:
            if pull.phase == "announced":
                pull.error = cause
            else:
                self._give_up(pull.transfer_id, "failed", cause)

    def _is_of(self, peer: Peer, transfer_id: TransferId) -> bool:
        """Whether that engine has a say in this transfer: only the one that holds its blocks."""
        pull = self._pulls.get(transfer_id)
        return pull is not None and pull.engine_id == peer.engine_id

    def _proven(self, released: Released) -> None:
        pull = self._pulls.get(released.transfer_id)
        if pull is None or pull.phase != "proving":
            return
        if released.ok:
            self._compare(pull, released)
        else:
            logger.warning("transfer.late transfer=%s: prefill had let the blocks go", released.transfer_id)
            self.tally.add(LATE_READS, "")
            self._report(pull.settled("failed", "lease_expired", now_s=time.monotonic()))
            self._undecided(pull)
        self._over(pull)

    def _compare(self, pull: Pull, released: Released) -> None:
        """The blocks were held all the time; now see whether what has arrived is what they held."""
        if difference := pull.differs(released.sums):
            logger.error("transfer.mismatch transfer=%s engine=%s at=%s", pull.transfer_id, pull.engine_id, difference)
            self._strike(pull, timed_out=False)
            self._report(pull.settled("failed", "kv_mismatch", now_s=time.monotonic()))
            self._undecided(pull)
            return
        peer = self.peers.get(pull.engine_id)
        if peer is not None:
            peer.quarantine.proven()
        self._report(pull.settled("received", now_s=time.monotonic()))

    def _lost(self, transfer_id: TransferId) -> None:
        """Prefill no longer holds this transfer's blocks."""
        pull = self._pulls.get(transfer_id)
        if pull is None:
            return
        if pull.phase == "announced":
            pull.error = "lease_expired"
        elif pull.phase == "reading":
            self._give_up(transfer_id, "failed", "lease_expired")

    # Pulls.

    def _give_up(self, transfer_id: TransferId, result: Result, cause: Cause) -> None:
        pull = self._pulls.get(transfer_id)
        if pull is None or pull.phase == "draining":
            return
        if pull.phase == "announced":
            self._forgotten(transfer_id)
            return
        self._report(pull.settled(result, cause))
        if pull.waiting:
            self._tell_workers(CancelRead(transfer_id=transfer_id), only=sorted(pull.waiting))
            pull.phase, pull.deadline_s = "draining", None
        else:
            self._over(pull)
        self._release(pull)
        self._undecided(pull)

    def _strike(self, pull: Pull, *, timed_out: bool) -> None:
        """A read has failed in a way that says something about its peer."""
        peer, now_s = self.peers.get(pull.engine_id), time.monotonic()
        if peer is not None and peer.quarantine.failed(pull.transfer_id, timed_out=timed_out, now_s=now_s):
            rest_s = (peer.quarantine.rests_until_s or now_s) - now_s
            logger.warning("peer.resting engine=%s for_s=%.0f: prompts are computed here", peer.engine_id, rest_s)

    def _undecided(self, pull: Pull) -> None:
        """A pull has ended; if it was its peer's probe, another one takes that over."""
        peer = self.peers.get(pull.engine_id)
        if peer is not None:
            peer.quarantine.undecided(pull.transfer_id)

    def _release(self, pull: Pull, *, verify: bool = False) -> None:
        peer = self.peers.get(pull.engine_id)
        if peer is not None:
            release = Release(engine_id=pull.engine_id, transfer_id=pull.transfer_id, nonce=pull.nonce, verify=verify)
            peer.release(messages.encode(release))

    def _over(self, pull: Pull) -> None:
        self._pulls.pop(pull.transfer_id, None)

    def _report(self, report: Report) -> None:
        self._reports.append(report)
        self._on_report()

    # Time.

    def _keep_time(self, now_s: float) -> None:
        for pull in list(self._pulls.values()):
            if pull.deadline_s is not None and now_s >= pull.deadline_s:
                self._timed_out(pull)
        self.peers.keep_time(now_s, in_use={pull.engine_id for pull in self._pulls.values()})
        if self._renew_at_s is not None and now_s >= self._renew_at_s:
            self._renew(now_s)

    def _timed_out(self, pull: Pull) -> None:
        logger.warning("transfer.timeout transfer=%s phase=%s", pull.transfer_id, pull.phase)
        peer = self.peers.get(pull.engine_id)
        self._strike(pull, timed_out=True)
        self._give_up(pull.transfer_id, "failed", "pull_timeout")
        if peer is not None and peer.phase == "ready" and peer.heard_s < pull.expected_s:
            # Frozen or cut off, not only slow: its other requests must not wait for it one by one.
            logger.warning("control.silent engine=%s", peer.engine_id)
            self.peers.lose(peer, "peer_silent")

    def _renew(self, now_s: float) -> None:
        wanted = [pull for pull in self._pulls.values() if pull.phase in ("announced", "reading")]
        by_engine: dict[EngineId, list[TransferId]] = {}
        for pull in wanted:
            by_engine.setdefault(pull.engine_id, []).append(pull.transfer_id)
        for engine_id, transfer_ids in by_engine.items():
            peer = self.peers.get(engine_id)
            if peer is None:
                continue
            for part in _parts(transfer_ids, messages.RENEWALS_PER_FRAME):
                peer.send(messages.encode(Renew(engine_id=engine_id, transfer_ids=part)))
        self._renew_at_s = now_s + min(pull.renew_interval_s for pull in wanted) if wanted else None

    def _timeout_ms(self, now_s: float) -> int | None:
        times = [pull.deadline_s for pull in self._pulls.values() if pull.deadline_s is not None]
        times.extend(self.peers.deadlines())
        if self._renew_at_s is not None:
            times.append(self._renew_at_s)
        return max(0, int((min(times) - now_s) * 1000) + 1) if times else None

    def _close(self) -> None:
        self.peers.close()
        self._orders.close()
        self._context.destroy(linger=100)


def _parts(items: Sequence[TransferId], size: int) -> Iterator[tuple[TransferId, ...]]:
    """Consecutive parts of at most that many items."""
    for first in range(0, len(items), size):
        yield tuple(items[first : first + size])
