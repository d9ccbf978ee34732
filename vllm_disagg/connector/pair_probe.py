"""Decode's side of a probe of one prefill engine, from greeting to the end of its hold, told as one story.

It runs on a thread of its own, which may wait: nothing of the engine waits for it. Control messages go over
a connection of its own; the reads are done by this engine's workers over the connections that requests use.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.messages import (
    FromPrefill,
    Hello,
    NotHere,
    OpenProbe,
    ProbeOpened,
    Refused,
    Release,
    Released,
    Renew,
    Renewed,
    RunProbe,
    ToPrefill,
    Welcome,
)
from vllm_disagg.connector.peers import CONNECT_TIMEOUT_S, HELLO_TIMEOUT_S
from vllm_disagg.connector.probe_run import RUN_LIMIT_S
from vllm_disagg.connector.secure import CurveKeys, client_socket
from vllm_disagg.core.probe import LeaseReport, PairReport, ProbeOrder, Stage, WorkerReport
from vllm_disagg.core.types import new_nonce
from vllm_disagg.transport.base import CANCEL_BOUND_S

_NUM_ROUND_TRIPS = 30
_POLL_S = 0.01
_READING_LIMIT_S = RUN_LIMIT_S + CANCEL_BOUND_S + 1.0


class _Failed(Exception):
    """The probe ends here. `fields` of the report say why."""

    def __init__(self, **fields: str) -> None:
        self.fields = fields
        super().__init__(fields)


class PairProbe:
    """One probe.

    Args:
        keys: the deployment's CURVE keys.
        fingerprint: what a prefill engine must have in common with us.
        control: this engine's control thread, which knows its workers.
        order: whom to probe.
    """

    def __init__(
        self,
        *,
        keys: CurveKeys,
        fingerprint: Mapping[str, str],
        control: DecodeControl,
        order: ProbeOrder,
    ) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._link = client_socket(self._context, zmq.DEALER, keys)
        self._fingerprint, self._control, self._order = dict(fingerprint), control, order
        self._stage: Stage = "greeting"
        self._found = PairReport(stage="done")

    def run(self) -> PairReport:
        """Probe, whatever happens, in bounded time."""
        try:
            with self._context, self._link:
                self._greet()
                opened = self._open()
                try:
                    self._connect()
                    self._read(opened)
                finally:
                    self._prove(opened)
        except _Failed as failure:
            return msgspec.structs.replace(self._found, stage=self._stage, **failure.fields)
        return self._found

    def _note(self, **fields: Any) -> None:
        self._found = msgspec.structs.replace(self._found, **fields)

    def _greet(self) -> None:
        begun_s = time.monotonic()
        try:
            self._link.connect(self._order.control)
        except zmq.ZMQError as error:
            raise _Failed(cause="peer_unreachable", error=f"{self._order.control}: {error}") from error
        hello = Hello(
            version=messages.PROTOCOL_VERSION, engine_id=self._order.prefill_id, fingerprint=self._fingerprint
        )
        match self._ask(hello, (Welcome, Refused, NotHere), cause="handshake_timeout"):
            case Refused() as refused:
                raise _Failed(
                    cause="incompatible", factor=refused.factor, prefill=refused.prefill, decode=refused.decode
                )
            case NotHere():
                raise _Failed(cause="peer_lost", error="another engine has started there meanwhile")
        self._note(greeting_s=time.monotonic() - begun_s)
        times = []
        for _ in range(_NUM_ROUND_TRIPS):
            begun_s = time.perf_counter()
            self._ask(Renew(engine_id=self._order.prefill_id, transfer_ids=()), (Renewed,))
            times.append(time.perf_counter() - begun_s)
        self._note(round_trips_s=tuple(times))

    def _open(self) -> ProbeOpened:
        self._stage = "opening"
        answer = self._ask(OpenProbe(engine_id=self._order.prefill_id), (ProbeOpened, NotHere))
        if not isinstance(answer, ProbeOpened):
            raise _Failed(cause="peer_lost", error="another engine has started there meanwhile")
        return answer

    def _connect(self) -> None:
        """Over the connection that requests use, so that what keeps them from it is found here as well."""
        self._stage = "connecting"
        engine_id, until_s = self._order.prefill_id, time.monotonic() + HELLO_TIMEOUT_S + CONNECT_TIMEOUT_S
        phase, cause = self._control.peer_state(engine_id)
        failed_before = phase == "failed"
        self._control.pair(engine_id, self._order.control)
        while phase != "ready":
            late = time.monotonic() > until_s
            if phase == "failed" and (late or not failed_before):
                raise _Failed(cause=cause, error="decode's log says more")
            if late:
                raise _Failed(cause="handshake_timeout", error="the workers were not connected in time")
            if phase == "failed":
                self._control.pair(engine_id, self._order.control)  # heeded when its back-off is over
            else:
                failed_before = False
            threading.Event().wait(_POLL_S)
            phase, cause = self._control.peer_state(engine_id)

    def _read(self, opened: ProbeOpened) -> None:
        self._stage = "reading"
        ended: queue.SimpleQueue[tuple[int, WorkerReport]] = queue.SimpleQueue()
        self._control.probe(
            RunProbe(engine_id=opened.engine_id, digests=opened.digests),
            lambda index, report: ended.put((index, report)),
        )
        reports: dict[int, WorkerReport] = {}
        until_s = time.monotonic() + _READING_LIMIT_S
        while len(reports) < self._control.num_workers:
            try:
                index, report = ended.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                raise _Failed(cause="pull_timeout", error="a worker's reads did not end") from None
            reports[index] = report
        self._note(workers=tuple(reports[index] for index in sorted(reports)))

    def _prove(self, opened: ProbeOpened) -> None:
        """Whether holds are what reads rely on. Ends the hold in any case; if it cannot, its lease does."""
        if self._stage == "reading":
            self._stage = "proving"
        own, foreign = opened.nonce, new_nonce()
        renews = not self._lost(opened)
        guarded = not self._release(opened, foreign) and not self._lost(opened)
        proves = self._release(opened, own)
        single_use = not self._release(opened, own) and self._lost(opened)
        self._note(lease=LeaseReport(renews=renews, guarded=guarded, proves=proves, single_use=single_use))

    def _lost(self, opened: ProbeOpened) -> bool:
        answer = self._ask(Renew(engine_id=opened.engine_id, transfer_ids=(opened.transfer_id,)), (Renewed,))
        return isinstance(answer, Renewed) and opened.transfer_id in answer.lost

    def _release(self, opened: ProbeOpened, nonce: str) -> bool:
        release = Release(engine_id=opened.engine_id, transfer_id=opened.transfer_id, nonce=nonce)
        answer = self._ask(release, (Released,))
        return isinstance(answer, Released) and answer.ok

    def _ask(self, message: ToPrefill, kinds: tuple[type, ...], *, cause: str = "peer_silent") -> FromPrefill:
        """Send a message and wait for an answer of one of these kinds."""
        until_s = time.monotonic() + HELLO_TIMEOUT_S
        self._link.send(messages.encode(message), zmq.NOBLOCK)
        while (left_s := until_s - time.monotonic()) > 0:
            if not self._link.poll(int(left_s * 1000) + 1):
                continue
            answer = messages.decode_or_none(messages.from_prefill, self._link.recv_multipart())
            if answer is not None and isinstance(answer, kinds):
                return answer
        raise _Failed(cause=cause, error=f"no answer to {type(message).__name__} in {HELLO_TIMEOUT_S:g} s")


def run_probe(make: Callable[[], PairProbe]) -> PairReport:
    """A probe that fails for a reason nobody foresaw is a report as well."""
    try:
        return make().run()
    except Exception as error:
        return PairReport(stage="greeting", cause="transfer", error=f"{type(error).__name__}: {error}")
