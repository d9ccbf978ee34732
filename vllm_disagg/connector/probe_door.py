"""Where a decode engine's own API server hands in an order to probe a prefill engine.

A socket of this host alone, in the kernel's abstract namespace of this network namespace, under CURVE like the others.
One thread sleeps on it, and runs one probe at a time.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import zmq

from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.mailbox import Mailbox
from vllm_disagg.connector.pair_probe import PairProbe, run_probe
from vllm_disagg.connector.recent import RecentIds
from vllm_disagg.connector.secure import CurveKeys, send_now, server_socket, start_authenticator
from vllm_disagg.core.probe import MAX_ORDER_BYTES, PROBE_LIMIT_S, OrderRefused, PairReport, ProbeOrder, check_order
from vllm_disagg.core.types import EngineId, TransferId

logger = logging.getLogger(__name__)

_REMEMBER_S = 24 * 3600.0


def door_address(engine_id: EngineId) -> str:
    """The endpoint of one engine's door. Short: such names have an end at 107 bytes."""
    name = hashlib.blake2b(engine_id.encode(), digest_size=16).hexdigest()
    return f"ipc://@vllm-disagg-probe-{name}"


class ProbeDoor:
    """Runs orders for one decode engine. `start` runs the thread, `stop` ends it.

    Args:
        engine_id: this run of this engine; an order names it.
        key: the deployment key, which signs orders.
        keys: the CURVE keys of it.
        fingerprint: of this engine.
        control: its control thread.
    """

    def __init__(
        self,
        *,
        engine_id: EngineId,
        key: bytes,
        keys: CurveKeys,
        fingerprint: Mapping[str, str],
        control: DecodeControl,
    ) -> None:
        self._engine_id, self._key, self._keys = engine_id, key, keys
        self._fingerprint, self._control = dict(fingerprint), control
        self._mailbox: Mailbox[Literal["stop"]] = Mailbox()
        self._used = RecentIds(keep_s=_REMEMBER_S)
        self._guard = Guard("probe")
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = start_authenticator(self._context, keys)
        self._router = server_socket(self._context, zmq.ROUTER, keys, max_frame_bytes=2 * MAX_ORDER_BYTES)
        self._router.bind(door_address(engine_id))
        self._thread = threading.Thread(target=self._run, name="disagg-probe", daemon=True)

    def start(self) -> None:
        """Run the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, which a probe under way may outlive for a while as a daemon. Idempotent."""
        if self._thread.is_alive():
            self._mailbox.put("stop")
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._mailbox.fileno(), zmq.POLLIN)
        self._guard.run(lambda: self._turn(poller))
        self._mailbox.close()
        self._authenticator.stop()
        self._context.destroy(linger=100)

    def _turn(self, poller: zmq.Poller) -> bool:
        ready = dict(poller.poll())
        if self._mailbox.take_all():
            return False
        if self._router in ready:
            self._guard.each([self._router.recv_multipart()], self._obey)
        return True

    def _obey(self, frames: list[bytes]) -> None:
        sender, raw = frames
        begun_s = time.monotonic()
        try:
            report = self._probed(self._checked(raw))
        except OrderRefused as refusal:
            logger.warning("probe.refused: %s", refusal)
            report = PairReport(stage="greeting", error=str(refusal))
        logger.info("probe.done stage=%s cause=%s s=%.1f", report.stage, report.cause, time.monotonic() - begun_s)
        send_now(self._router, sender, msgspec.json.encode(report))

    def _checked(self, raw: bytes) -> ProbeOrder:
        order = check_order(raw, self._key)
        if order.task != "pair" or order.engine_id != self._engine_id:
            raise OrderRefused("the order is for another engine, or for an earlier run of this one", signed=True)
        if not self._used.add(TransferId(order.nonce), now_s=time.monotonic()):
            raise OrderRefused("the order was obeyed before", signed=True)
        return order

    def _probed(self, order: ProbeOrder) -> PairReport:
        return run_probe(
            lambda: PairProbe(
                context=self._context,
                keys=self._keys,
                fingerprint=self._fingerprint,
                control=self._control,
                order=order,
            )
        )


DOOR_TIMEOUT_S = PROBE_LIMIT_S + 5.0
"""How long an API server waits for a report."""
