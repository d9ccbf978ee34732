"""Where a decode engine's own API server hands in what came to it over HTTP: introductions of prefill engines, and
orders to probe one.

A socket of this host alone, in the kernel's abstract namespace of this network namespace, under CURVE like the others.
One thread sleeps on it. Probes take long, and run on a thread of their own, one at a time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import zmq

from vllm_disagg.connector.guard import Guard
from vllm_disagg.connector.mailbox import Mailbox
from vllm_disagg.connector.secure import CurveKeys, send_now, server_socket, start_authenticator
from vllm_disagg.core.introduction import MAX_INTRODUCTION_BYTES
from vllm_disagg.core.probe import MAX_ORDER_BYTES, PROBE_LIMIT_S
from vllm_disagg.core.types import EngineId

PROBE_TIMEOUT_S = PROBE_LIMIT_S + 5.0
"""How long an API server waits for a report."""

INTRODUCE_TIMEOUT_S = 2.0
"""How long it waits for word on an introduction."""

Errand = Literal[b"introduce", b"probe"]
"""What a frame is about; another one follows with what came over HTTP."""

_MAX_PROBES_WAITING = 16

Answer = Callable[[bytes], msgspec.Struct | dict[str, Any]]
"""Takes what came over HTTP, returns what goes back. Raises nothing."""


def door_address(engine_id: EngineId) -> str:
    """The endpoint of one engine's door. Short: such names have an end at 107 bytes."""
    name = hashlib.blake2b(engine_id.encode(), digest_size=16).hexdigest()
    return f"ipc://@vllm-disagg-door-{name}"


class Door:
    """One decode engine's. `start` runs the thread, `stop` ends it.

    Args:
        engine_id: this run of this engine.
        keys: the deployment's CURVE keys.
        introduce: called on the door's thread; takes no time.
        probe: called on a thread of its own; may take `PROBE_LIMIT_S`.
    """

    def __init__(self, *, engine_id: EngineId, keys: CurveKeys, introduce: Answer, probe: Answer) -> None:
        self._introduce, self._probe = introduce, probe
        self._mailbox: Mailbox[Literal["stop"] | tuple[bytes, bytes]] = Mailbox()
        self._waiting: deque[tuple[bytes, bytes]] = deque(maxlen=_MAX_PROBES_WAITING)
        self._is_probing = False
        self._guard = Guard("door")
        self._context: zmq.Context[Any] = zmq.Context()
        self._authenticator = start_authenticator(self._context, keys)
        longest = 2 * max(MAX_ORDER_BYTES, MAX_INTRODUCTION_BYTES)
        self._router = server_socket(self._context, zmq.ROUTER, keys, max_frame_bytes=longest)
        self._router.bind(door_address(engine_id))
        self._thread = threading.Thread(target=self._run, name="disagg-door", daemon=True)

    def start(self) -> None:
        """Run the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. A probe under way may outlive it for a while, as a daemon. Idempotent."""
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
        for item in self._mailbox.take_all():
            if item == "stop":
                return False
            self._is_probing = False
            send_now(self._router, *item)
        if self._router in ready:
            self._guard.each([self._router.recv_multipart()], self._heard)
        if self._waiting and not self._is_probing:
            self._is_probing = True
            threading.Thread(
                target=self._run_probe, args=self._waiting.popleft(), name="disagg-probe", daemon=True
            ).start()
        return True

    def _heard(self, frames: list[bytes]) -> None:
        match frames:
            case [sender, b"introduce", raw]:
                send_now(self._router, sender, msgspec.json.encode(self._introduce(raw)))
            case [sender, b"probe", raw]:
                self._waiting.append((sender, raw))

    def _run_probe(self, sender: bytes, raw: bytes) -> None:
        self._mailbox.put((sender, msgspec.json.encode(self._probe(raw))))
