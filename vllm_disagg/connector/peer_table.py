"""The prefill engines that a decode engine knows: greets them, hears them, and gives them up.

Part of the decode control thread, which alone calls it.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.messages import (
    ConnectPeer,
    DisconnectPeer,
    FromPrefill,
    Hello,
    LinkStalled,
    NotHere,
    Nudge,
    Nudged,
    PeerState,
    RankInfo,
    RebuildLinks,
    Refused,
    ToWorker,
    Welcome,
)
from vllm_disagg.connector.peers import Peer
from vllm_disagg.connector.pull import Cause
from vllm_disagg.connector.secure import CurveKeys
from vllm_disagg.connector.tally import (
    KEY_FACTOR,
    LAYOUT_FACTOR,
    LINK_REBUILDS,
    LINK_STALLS,
    OTHER,
    PROTOCOL_FACTOR,
    REFUSED_PEERS,
    Tally,
)
from vllm_disagg.core.types import EngineId

logger = logging.getLogger(__name__)

MAX_INTRODUCED = 128
"""Engines that are known without a request of theirs. Further ones are met at their first request."""

_MAX_FRAMES_PER_TURN = 256

TellWorkers = Callable[..., None]
"""Takes a message, and with `only` the indices of the workers it is for."""


class PeerTable:
    """Every run of a prefill engine that somebody has proven to exist: a handoff, an introduction, a signed order.

    Args:
        context: for the control channels.
        keys: the deployment's CURVE keys.
        fingerprint: what a prefill engine must have in common with us.
        poller: of the thread.
        guard: of the thread.
        tally: where refusals and stalls are counted.
        num_workers: of this engine.
        tell_workers: sends them orders.
        on_said: takes what a peer says about transfers.
        on_lost: told when a peer cannot be used any more, and why.
    """

    def __init__(
        self,
        *,
        context: zmq.Context[Any],
        keys: CurveKeys,
        fingerprint: Mapping[str, str],
        poller: zmq.Poller,
        guard: Guard,
        tally: Tally,
        num_workers: int,
        tell_workers: TellWorkers,
        on_said: Callable[[Peer, FromPrefill], None],
        on_lost: Callable[[Peer, Cause], None],
    ) -> None:
        self._context, self._keys, self._fingerprint = context, keys, dict(fingerprint)
        self._poller, self._guard, self._tally = poller, guard, tally
        self._num_workers, self._tell_workers = num_workers, tell_workers
        self._on_said, self._on_lost = on_said, on_lost
        self._peers: dict[EngineId, Peer] = {}

    def get(self, engine_id: EngineId) -> Peer | None:
        """What is known of an engine. On any thread."""
        return self._peers.get(engine_id)

    @property
    def num_known(self) -> int:
        """How many there are, failed ones included."""
        return len(self._peers)

    def has_room_for(self, engine_id: EngineId) -> bool:
        """Whether an engine that nobody has asked for yet may be known. On any thread."""
        return engine_id in self._peers or len(self._peers) < MAX_INTRODUCED

    def pair(self, engine_id: EngineId, address: str) -> None:
        """Connect to a prefill engine, or again after its back-off."""
        now_s = time.monotonic()
        peer = self._peers.get(engine_id)
        if peer is None:
            peer = self._peers[engine_id] = Peer(engine_id=engine_id, address=address)
            self._greet(peer, now_s)
        elif peer.phase == "failed" and now_s >= peer.retry_at_s:
            self._greet(peer, now_s)

    def introduce(self, engine_id: EngineId, address: str) -> None:
        """The same ahead of any request; heeded while few enough are known."""
        if self.has_room_for(engine_id):
            self.pair(engine_id, address)

    def hear(self, ready: Mapping[Any, int]) -> None:
        """Take what has come from those whose sockets are ready."""
        for peer in list(self._peers.values()):
            if peer.socket is not None and peer.socket in ready:
                self._guard.each(frames_of(peer.socket), functools.partial(self._said, peer))
            if peer.monitor is not None and peer.monitor in ready:
                self._broken(peer)

    def worker_connected(self, index: int, state: PeerState) -> None:
        """A worker tells whether it can read from an engine."""
        peer = self._peers.get(state.engine_id)
        if peer is None or peer.phase != "connecting":
            return
        if state.error:
            logger.error("handshake.failed engine=%s error=%s", state.engine_id, state.error)
            if state.misfit:
                self._tally.add(REFUSED_PEERS, LAYOUT_FACTOR)
            self.lose(peer, "incompatible" if state.misfit else "peer_unreachable")
            return
        peer.waiting_ranks.discard(index)
        if not peer.waiting_ranks:
            peer.ready()
            logger.info("handshake.done engine=%s", peer.engine_id)

    def worker_stalled(self, index: int, stalled: LinkStalled) -> None:
        """A worker's reads from an engine stand still. Ask the engine to serve; if it answers and they still do not
        move, their link is at fault, and is replaced. One that is silent is left to the pull timeout: tearing a link
        down can end a frozen owner where reads are emulated."""
        peer = self._peers.get(stalled.engine_id)
        if peer is None or peer.phase != "ready":
            return
        if stalled.limits > 1 and peer.nudged_s is not None and peer.heard_s > peer.nudged_s:
            self._tally.add(LINK_REBUILDS, peer.name)
            self._tell_workers(RebuildLinks(engine_id=peer.engine_id), only=[index])
            return
        if stalled.limits == 1:
            self._tally.add(LINK_STALLS, peer.name)
        logger.warning("link.stalled engine=%s worker=%d limits=%d", peer.engine_id, index, stalled.limits)
        peer.nudged_s = time.monotonic()
        peer.send(messages.encode(Nudge(engine_id=peer.engine_id)))

    def lose(self, peer: Peer, cause: Cause) -> None:
        """This peer cannot be used now. A request that comes after its back-off tries again."""
        if peer.socket is not None:
            self._poller.unregister(peer.socket)
            self._poller.unregister(peer.monitor)
        peer.fail(cause, now_s=time.monotonic())
        self._tell_workers(DisconnectPeer(engine_id=peer.engine_id))
        self._on_lost(peer, cause)

    def keep_time(self, now_s: float, *, in_use: Collection[EngineId]) -> None:
        """Give up those that take too long, and forget failed ones that no request refers to once their back-off need
        not grow any more."""
        for peer in list(self._peers.values()):
            if peer.phase in ("greeting", "connecting") and now_s >= peer.deadline_s:
                logger.error(
                    "handshake.timeout engine=%s phase=%s: check that decode reaches prefill's --kv-control-host and "
                    "that both use the same deployment key", peer.engine_id, peer.phase,
                )  # fmt: skip
                self.lose(peer, "handshake_timeout")
            elif peer.phase == "failed" and peer.engine_id not in in_use and now_s >= peer.may_be_forgotten_s:
                del self._peers[peer.engine_id]

    def deadlines(self) -> Iterator[float]:
        """When `keep_time` has something to do."""
        return (peer.deadline_s for peer in self._peers.values() if peer.phase in ("greeting", "connecting"))

    def close(self) -> None:
        """Close every socket."""
        for peer in self._peers.values():
            peer.close()

    def _greet(self, peer: Peer, now_s: float) -> None:
        try:
            peer.open(self._context, self._keys, now_s=now_s)
        except zmq.ZMQError as error:
            logger.error("handshake.failed engine=%s error=%s", peer.engine_id, error)
            peer.fail("peer_unreachable", now_s=now_s)
            return
        self._poller.register(peer.socket, zmq.POLLIN)
        self._poller.register(peer.monitor, zmq.POLLIN)
        peer.send(
            messages.encode(
                Hello(version=messages.PROTOCOL_VERSION, engine_id=peer.engine_id, fingerprint=self._fingerprint)
            )
        )

    def _broken(self, peer: Peer) -> None:
        match peer.take_breaks():
            case "unproven":
                logger.error(
                    "handshake.refused: the deployment key differs, or what listens at %s is no prefill engine, or is "
                    "one that has just ended; give all engines the same --kv-key-file", peer.address,
                )  # fmt: skip
                self._tally.add(REFUSED_PEERS, KEY_FACTOR)
                self.lose(peer, "incompatible")
            case "lost":
                logger.warning("control.disconnected engine=%s phase=%s", peer.engine_id, peer.phase)
                self.lose(peer, "peer_lost")

    def _said(self, peer: Peer, frames: list[bytes]) -> None:
        peer.heard_s = time.monotonic()
        match message := messages.decode_or_none(messages.from_prefill, frames):
            case None:
                logger.warning("control.bad_frame engine=%s", peer.engine_id)
            case Welcome() if message.engine_id == peer.engine_id:
                self._welcomed(peer, message.ranks)
            case Refused():
                logger.error(
                    "handshake.refused: the engines do not fit: %s is %r on prefill and %r on decode; "
                    "start both with the same %s",
                    message.factor, message.prefill, message.decode, message.factor,
                )  # fmt: skip
                known = message.factor == PROTOCOL_FACTOR or message.factor in self._fingerprint
                self._tally.add(REFUSED_PEERS, message.factor if known else OTHER)
                self.lose(peer, "incompatible")
            case Welcome() | NotHere():
                self.lose(peer, "peer_lost")
            case Nudged():
                logger.info("link.nudged engine=%s", peer.engine_id)
            case _:
                self._on_said(peer, message)

    def _welcomed(self, peer: Peer, ranks: Sequence[RankInfo]) -> None:
        if peer.phase != "greeting":
            return
        peer.welcomed(set(range(self._num_workers)), now_s=time.monotonic())
        message: ToWorker = ConnectPeer(engine_id=peer.engine_id, ranks=tuple(ranks))
        self._tell_workers(message)


def frames_of(socket: zmq.Socket[Any]) -> Iterator[list[bytes]]:
    """What waits on a socket, a bounded number of messages at a time."""
    for _ in range(_MAX_FRAMES_PER_TURN):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except (zmq.Again, zmq.ZMQError):
            return
