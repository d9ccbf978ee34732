"""Decode's view of the prefill engines it reads from: a socket, a state, and when to try again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import zmq
from zmq.utils.monitor import parse_monitor_message

from vllm_disagg.connector.pull import Cause
from vllm_disagg.connector.secure import CurveKeys, client_socket, send_now
from vllm_disagg.core.quarantine import Quarantine
from vllm_disagg.core.types import EngineId

PeerPhase = Literal["greeting", "connecting", "ready", "failed"]

HELLO_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 30.0
"""For the workers to connect: each may register its whole KV cache with the device once more."""

_MOST_OWED = 10_000
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 1.0, 30.0
_UNPROVEN = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_DISCONNECTED = zmq.EVENT_DISCONNECTED | _UNPROVEN


@dataclass(slots=True, kw_only=True)
class Peer:
    """One run of one prefill engine, as seen by the decode control thread.

    greeting -> connecting -> ready; any of them -> failed. The first announcement after the back-off greets again.
    A peer that is ready may still be in quarantine: it answers, but reads from it fail.
    """

    engine_id: EngineId
    address: str
    phase: PeerPhase = "greeting"
    cause: Cause | None = None
    deadline_s: float = 0.0
    waiting_ranks: set[int] = field(default_factory=set)
    retry_at_s: float = 0.0
    num_failures: int = 0
    heard_s: float = 0.0
    nudged_s: float | None = None
    """When it was last asked to serve, since reads from it stood still."""
    quarantine: Quarantine = field(default_factory=Quarantine)
    owed: deque[bytes] = field(default_factory=lambda: deque(maxlen=_MOST_OWED))
    """Releases that could not be sent: what is not fetched must not stay held until its lease ends."""
    socket: zmq.Socket[Any] | None = None
    monitor: zmq.Socket[Any] | None = None

    @property
    def name(self) -> str:
        """Its control address, as metrics label it."""
        return self.address.removeprefix("tcp://")

    def open(self, context: zmq.Context[Any], keys: CurveKeys, *, now_s: float) -> None:
        """Connect the control channel and start greeting."""
        self.socket = client_socket(context, zmq.DEALER, keys)
        self.monitor = self.socket.get_monitor_socket(_DISCONNECTED)
        self.socket.connect(self.address)
        self.phase, self.cause, self.deadline_s = "greeting", None, now_s + HELLO_TIMEOUT_S

    def take_breaks(self) -> Literal["", "lost", "unproven"]:
        """Whether the connection broke since the last call: `unproven` before both ends had proven the key."""
        found: Literal["", "lost", "unproven"] = ""
        while self.monitor is not None and self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            found = "unproven" if found == "unproven" or int(event) & _UNPROVEN else "lost"
        return found

    def send(self, frame: bytes) -> None:
        """Queue a frame; a peer that reads nothing loses it, and the deadline of what it answers does the rest."""
        if self.socket is not None:
            send_now(self.socket, frame)

    def release(self, frame: bytes) -> None:
        """Send a release now, or when the peer has been greeted again."""
        if self.socket is None:
            self.owed.append(frame)
        else:
            self.send(frame)

    def fail(self, cause: Cause, *, now_s: float) -> None:
        """Close the channel and wait longer each time before the next attempt."""
        self.close()
        self.phase, self.cause = "failed", cause
        self.retry_at_s = now_s + min(_LAST_BACKOFF_S, _FIRST_BACKOFF_S * 2**self.num_failures)
        self.num_failures += 1

    def welcomed(self, ranks: set[int], *, now_s: float) -> None:
        """The peer agreed; now each of our workers connects."""
        while self.owed:
            self.send(self.owed.popleft())
        self.phase, self.waiting_ranks, self.deadline_s = "connecting", ranks, now_s + CONNECT_TIMEOUT_S

    @property
    def may_be_forgotten_s(self) -> float:
        """When a failed peer that nobody wants is no longer worth remembering."""
        return self.retry_at_s + _LAST_BACKOFF_S

    def ready(self) -> None:
        """Every rank can read."""
        self.phase, self.num_failures = "ready", 0

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        if self.socket is not None:
            self.socket.disable_monitor()
            self.socket.close()
        if self.monitor is not None:
            self.monitor.close()
        self.socket = self.monitor = None
