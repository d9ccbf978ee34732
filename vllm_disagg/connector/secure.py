"""ZeroMQ sockets that only engines of one deployment can open to each other.

Both CURVE key pairs, the server's and the clients', are derived from the deployment key: whoever holds it can prove
it, nobody else gets past the ZeroMQ handshake, and everything on the wire is encrypted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from vllm_disagg.core.keys import derive

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 16 * 1024 * 1024
"""The longest frame that is received; the descriptors of an engine's ranks travel in one."""

HANDSHAKE_S = 3.0
"""How long a connection may take to prove that it holds the deployment key. Whoever does not is put out."""

_BACKLOG = 1024
"""Connections that may wait to be accepted. With ZeroMQ's own 100, a crowd of strangers makes the kernel drop the
greeting of a real peer, which then waits a second before it tries again."""

_CLOSE_LINGER_MS = 100


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The two CURVE key pairs of a deployment, Z85 text."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes

    def __repr__(self) -> str:
        return "CurveKeys(...)"


def curve_keys(deployment_key: bytes) -> CurveKeys:
    """Derive the key pairs; the same key gives the same pairs on every host."""
    server_secret = z85.encode(derive(deployment_key, "curve-server"))
    client_secret = z85.encode(derive(deployment_key, "curve-client"))
    return CurveKeys(
        server_public=zmq.curve_public(server_secret),
        server_secret=server_secret,
        client_public=zmq.curve_public(client_secret),
        client_secret=client_secret,
    )


class _OnlyDeploymentKey:
    """Tells ZeroMQ's authenticator which client key to let in (it calls this `callback`)."""

    def __init__(self, keys: CurveKeys) -> None:
        self._accepted = keys.client_public

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the client with this Z85 key may connect."""
        return key == self._accepted


def start_authenticator(context: zmq.Context[Any], keys: CurveKeys) -> ThreadAuthenticator:
    """Guard every CURVE server socket of `context`. The caller stops it before it ends the context."""
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(credentials_provider=_OnlyDeploymentKey(keys))
    return authenticator


def server_socket(
    context: zmq.Context[Any], kind: int, keys: CurveKeys, *, max_frame_bytes: int = MAX_FRAME_BYTES
) -> zmq.Socket[Any]:
    """A socket to bind: refuses peers without the deployment key, those that do not prove within `HANDSHAKE_S` that
    they hold it, and frames above `max_frame_bytes`, which holds before the proof too."""
    socket = _socket(context, kind, max_frame_bytes)
    socket.handshake_ivl = int(HANDSHAKE_S * 1000)
    socket.backlog = _BACKLOG
    socket.curve_server = True
    socket.curve_publickey = keys.server_public
    socket.curve_secretkey = keys.server_secret
    return socket


def client_socket(context: zmq.Context[Any], kind: int, keys: CurveKeys) -> Any:
    """A socket to connect: speaks only to a server that holds the deployment key."""
    socket = _socket(context, kind, MAX_FRAME_BYTES)
    socket.curve_serverkey = keys.server_public
    socket.curve_publickey = keys.client_public
    socket.curve_secretkey = keys.client_secret
    return socket


def send_now(socket: Any, *frames: bytes) -> bool:
    """Queue a message without waiting. False, and a log line, when the other side is gone or reads nothing."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        logger.warning("control.unsent endpoint=%s", socket.last_endpoint)
        return False
    return True


def _socket(context: zmq.Context[Any], kind: int, max_frame_bytes: int) -> zmq.Socket[Any]:
    socket: zmq.Socket[Any] = context.socket(kind)
    socket.linger = _CLOSE_LINGER_MS
    socket.sndhwm = 0  # what we say is small and must not be lost while the other side is busy
    socket.tcp_keepalive = 1  # a host that vanishes without a word is noticed after a minute, by the kernel
    socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = 30, 10, 3
    socket.maxmsgsize = max_frame_bytes
    return socket
