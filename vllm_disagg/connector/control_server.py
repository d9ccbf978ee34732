"""Prefill's end of the control channel: one thread that answers decode instances about the blocks held for them.

It sleeps unless a frame arrives, a lease runs out, or a hold is granted. While decode instances may be connecting or
reading it asks its workers to serve them (`Progress`), and to stop when nobody is left.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.holds import Holds
from vllm_disagg.connector.mailbox import Mailbox
from vllm_disagg.connector.messages import (
    BlocksDigested,
    DigestBlocks,
    FillProbe,
    Forbid,
    FromPrefill,
    Hello,
    NotHere,
    Nudge,
    Nudged,
    OpenProbe,
    ProbeFilled,
    ProbeOpened,
    Progress,
    RankInfo,
    Refused,
    Release,
    Released,
    Renew,
    Renewed,
    Welcome,
)
from vllm_disagg.connector.secure import CurveKeys, client_socket, send_now, server_socket, start_authenticator
from vllm_disagg.connector.strangers import StrangerWatch
from vllm_disagg.connector.tally import KEY_FACTOR, OTHER, PROTOCOL_FACTOR, REFUSED_PEERS, Tally
from vllm_disagg.connector.voucher import Voucher
from vllm_disagg.core.fingerprint import check_compatible
from vllm_disagg.core.types import EngineId, TransferId, new_nonce, new_transfer_id
from vllm_disagg.core.verify import DigestJob
from vllm_disagg.errors import ConfigError, IncompatiblePeer
from vllm_disagg.transport.base import CANCEL_BOUND_S

logger = logging.getLogger(__name__)

HANDSHAKE_GRACE_S = 5.0
"""How long workers serve peers after a handshake, so that connections come up before the first read."""

MAX_REQUEST_BYTES = 256 * 1024
"""The longest frame that prefill receives, from strangers too: a greeting has some 2 KiB, a renewal 33 bytes for each
transfer (`messages.RENEWALS_PER_FRAME`)."""

DRAIN_GRACE_S = CANCEL_BOUND_S
"""How long workers serve peers after the last hold: a read that was given up must be able to end, or its reader tears
the connection down, which over emulated links can end the worker's process."""

_MAX_FRAMES_PER_TURN = 256
_MAX_PROBES = 64


class PrefillControl:
    """Answers decode instances. `start` binds and runs the thread; `stop` ends it.

    Args:
        engine_id: this run of this engine.
        address: `tcp://host:port` to bind.
        keys: the deployment's CURVE keys.
        fingerprint: what a decode instance must have in common with us.
        ranks: our workers' memory, given to compatible decode instances.
        worker_links: endpoints of our workers, in the order of `ranks`.
        holds: the table of held blocks.
    """

    def __init__(
        self,
        *,
        engine_id: EngineId,
        address: str,
        keys: CurveKeys,
        fingerprint: Mapping[str, str],
        ranks: Sequence[RankInfo],
        worker_links: Sequence[str],
        holds: Holds,
    ) -> None:
        self._engine_id, self._keys, self._holds = engine_id, keys, holds
        self._fingerprint, self._ranks = dict(fingerprint), tuple(ranks)
        self._mailbox: Mailbox[Literal["granted", "stop"] | DigestJob] = Mailbox()
        self._vouchers: dict[TransferId, Voucher] = {}
        self._serve_until_s = 0.0
        self._serving = self._held = False
        self._guard = Guard("control")
        self.num_bad_frames = 0
        self._digests: list[bytes | None] = [None for _ in worker_links]
        self._probers: list[bytes] = []
        self._probe_holds: list[TransferId] = []
        self.tally = Tally()
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = start_authenticator(self._context, keys)
        self._router = server_socket(self._context, zmq.ROUTER, keys, max_frame_bytes=MAX_REQUEST_BYTES)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._strangers = StrangerWatch(self._context, self._router)
        try:
            self._router.bind(address)
        except zmq.ZMQError as error:
            self._close()
            raise ConfigError(
                f"cannot listen on {address} for decode instances ({error.strerror}): "
                "choose a free --kv-control-port, or another --kv-control-host"
            ) from error
        self._links = [client_socket(self._context, zmq.DEALER, keys) for _ in worker_links]
        for link, endpoint in zip(self._links, worker_links, strict=True):
            link.connect(endpoint)
        self._thread = threading.Thread(target=self._run, name="disagg-prefill-control", daemon=True)

    def start(self) -> None:
        """Run the thread."""
        self._thread.start()

    def granted(self, digests: DigestJob | None = None) -> None:
        """A hold was granted: decode may read soon, its expiry must be watched, and these digests be made."""
        self._mailbox.put("granted" if digests is None else digests)

    def stop(self) -> None:
        """End the thread and close every socket. Idempotent."""
        if self._thread.is_alive():
            self._mailbox.put("stop")
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._strangers.socket, zmq.POLLIN)
        poller.register(self._mailbox.fileno(), zmq.POLLIN)
        for link in self._links:
            poller.register(link, zmq.POLLIN)
        self._guard.run(lambda: self._turn(poller))
        self._close()

    def _turn(self, poller: zmq.Poller) -> bool:
        ready = dict(poller.poll(self._timeout_ms()))
        orders = self._mailbox.take_all()
        self._guard.each((order for order in orders if isinstance(order, DigestJob)), self._have_digested)
        if self._router in ready:
            self._guard.each(self._requests(), self._reply)
        if self._strangers.socket in ready and (found := self._strangers.count(time.monotonic())):
            self.tally.add(REFUSED_PEERS, KEY_FACTOR, found)
        for index, link in enumerate(self._links):
            if link in ready:
                self._guard.each([link.recv_multipart()], functools.partial(self._worker_said, index))
        if self._holds.expire():
            logger.warning(
                "lease.expired: decode neither fetched nor renewed a prompt's KV; the prompt is recomputed there. "
                "Raise --kv-lease-s or add decode instances if this repeats"
            )
        self._forget_vouchers()
        self._direct_workers()
        return "stop" not in orders

    def _timeout_ms(self) -> int | None:
        waits = [wait for wait in (self._holds.seconds_to_expiry(),) if wait is not None]
        if self._serving and not len(self._holds):
            waits.append(max(0.0, self._serve_until_s - time.monotonic()))
        return int(min(waits) * 1000) + 1 if waits else None

    def _direct_workers(self) -> None:
        held, now_s = len(self._holds) > 0, time.monotonic()
        if self._held and not held:
            self._serve_for(DRAIN_GRACE_S)
        self._held = held
        wanted = held or now_s < self._serve_until_s
        if wanted != self._serving:
            self._serving = wanted
            for link in self._links:
                send_now(link, messages.encode(Progress(active=wanted)))

    def _serve_for(self, seconds: float) -> None:
        self._serve_until_s = max(self._serve_until_s, time.monotonic() + seconds)

    def _requests(self) -> Iterator[tuple[bytes, list[bytes]]]:
        for _ in range(_MAX_FRAMES_PER_TURN):  # then look after leases, however many frames wait
            try:
                sender, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield sender, frames

    def _reply(self, request: tuple[bytes, list[bytes]]) -> None:
        sender, frames = request
        message = messages.decode_or_none(messages.to_prefill, frames)
        if message is None:
            self.num_bad_frames += 1
            logger.debug("control.bad_frame")
        elif isinstance(message, Release) and message.verify and message.transfer_id in self._vouchers:
            self._release_verified(sender, message)
        else:
            answer = self._open_probe(sender, message) if isinstance(message, OpenProbe) else self._answer(message)
            if answer is not None:
                send_now(self._router, sender, messages.encode(answer))

    def _have_digested(self, job: DigestJob) -> None:
        """Have every worker digest its part of a hold's blocks."""
        self._vouchers[job.transfer_id] = Voucher(waiting=set(range(len(self._links))))
        for link in self._links:
            send_now(link, messages.encode(DigestBlocks(job=job)))

    def _worker_said(self, index: int, frames: list[bytes]) -> None:
        match messages.decode_or_none(messages.from_worker, frames):
            case BlocksDigested() as digested:
                self._digested(index, digested)
            case ProbeFilled() as filled:
                self._filled(index, filled)

    def _digested(self, index: int, message: BlocksDigested) -> None:
        voucher = self._vouchers.get(message.transfer_id)
        if voucher is None:
            return
        voucher.add(index, self._ranks[index].tp_rank, message)
        if not voucher.waiting and voucher.asked is not None:
            self._release_verified(*voucher.asked)

    def _release_verified(self, sender: bytes, release: Release) -> None:
        """Answer now if all sums are there, else when they are: the hold goes on until then."""
        voucher = self._vouchers[release.transfer_id]
        voucher.asked = sender, release
        if voucher.waiting:
            return
        del self._vouchers[release.transfer_id]
        answer = self._answer(release)
        if isinstance(answer, Released) and answer.ok:
            answer = Released(transfer_id=answer.transfer_id, ok=True, sums=voucher.sums)
        send_now(self._router, sender, messages.encode(answer))

    def _forget_vouchers(self) -> None:
        """Those whose hold has ended; whoever waits for one is told so."""
        for transfer_id in [item for item in self._vouchers if item not in self._holds]:
            voucher = self._vouchers.pop(transfer_id)
            if voucher.asked is not None:
                sender, release = voucher.asked
                send_now(self._router, sender, messages.encode(self._answer(release)))

    def _answer(self, message: Hello | Renew | Release | Forbid | Nudge) -> FromPrefill:
        match message:
            case Hello():
                return self._greet(message)
            case Renew():
                mine = message.engine_id == self._engine_id
                lost = self._holds.renew(message.transfer_ids) if mine else message.transfer_ids
                return Renewed(engine_id=message.engine_id, lost=lost)
            case Release():
                ok = message.engine_id == self._engine_id and self._holds.release(message.transfer_id, message.nonce)
                return Released(transfer_id=message.transfer_id, ok=ok)
            case Forbid():
                return Released(transfer_id=message.transfer_id, ok=self._holds.forbid(message.transfer_id))
            case Nudge():
                return self._nudged(message)

    def _greet(self, hello: Hello) -> FromPrefill:
        if hello.engine_id != self._engine_id:
            return NotHere(expected=hello.engine_id)
        try:
            ours = {PROTOCOL_FACTOR: str(messages.PROTOCOL_VERSION), **self._fingerprint}
            check_compatible(ours, {PROTOCOL_FACTOR: str(hello.version), **hello.fingerprint})
        except IncompatiblePeer as refusal:
            logger.error("handshake.refused %s", refusal)
            self.tally.add(REFUSED_PEERS, refusal.factor if refusal.factor in ours else OTHER)
            return Refused(
                engine_id=self._engine_id, factor=refusal.factor, prefill=refusal.ours, decode=refusal.theirs
            )
        self._serve_for(HANDSHAKE_GRACE_S)
        return Welcome(engine_id=self._engine_id, ranks=self._ranks)

    def _nudged(self, nudge: Nudge) -> FromPrefill:
        if nudge.engine_id != self._engine_id:
            return NotHere(expected=nudge.engine_id)
        logger.warning("control.nudged serving=%s held=%d: reads of a decode instance stand still", self._serving,
                       len(self._holds))  # fmt: skip
        self._serve_for(HANDSHAKE_GRACE_S)
        self._serving = False  # so that the workers are told again, whatever they have heard
        return Nudged(engine_id=self._engine_id)

    # Probes.

    def _open_probe(self, sender: bytes, message: OpenProbe) -> FromPrefill | None:
        """Answered when every worker has filled its memory, which takes a moment only the first time."""
        if message.engine_id != self._engine_id:
            return NotHere(expected=message.engine_id)
        if None not in self._digests:
            return self._probe_opened()
        if not self._probers:
            for link in self._links:
                send_now(link, messages.encode(FillProbe()))
        if len(self._probers) < _MAX_PROBES:
            self._probers.append(sender)
        return None

    def _filled(self, index: int, filled: ProbeFilled) -> None:
        self._digests[index] = filled.digest
        if None not in self._digests:
            probers, self._probers = self._probers, []
            for sender in probers:
                if (answer := self._probe_opened()) is not None:
                    send_now(self._router, sender, messages.encode(answer))

    def _probe_opened(self) -> ProbeOpened | None:
        """A hold of no blocks is like any other one: workers serve while it lives, and it ends with its lease. There
        are only so many of them at once; who asks for more is not answered."""
        self._probe_holds = [held for held in self._probe_holds if held in self._holds]
        if len(self._probe_holds) >= _MAX_PROBES:
            return None
        transfer_id, nonce = new_transfer_id(), new_nonce()
        self._holds.grant(transfer_id, nonce, ())
        self._probe_holds.append(transfer_id)
        digests = tuple(digest or b"" for digest in self._digests)
        return ProbeOpened(engine_id=self._engine_id, transfer_id=transfer_id, nonce=nonce, digests=digests)

    def _close(self) -> None:
        self._mailbox.close()
        self._strangers.close()
        self._authenticator.stop()
        self._context.destroy(linger=100)
