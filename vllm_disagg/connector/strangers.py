"""Notices who knocks at the control port without the deployment key: nearly always an engine with another one."""

from __future__ import annotations

import logging
from typing import Any

import zmq

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_MAX_EVENTS_PER_TURN = 1024


class StrangerWatch:
    """Counts connections to a server socket that failed to prove the key. Used and closed by the socket's own thread.

    Args:
        context: the socket's.
        server: a CURVE server socket.
    """

    def __init__(self, context: zmq.Context[Any], server: zmq.Socket[Any]) -> None:
        endpoint = f"inproc://strangers-{id(self)}"
        self._server = server
        server.monitor(endpoint, _REFUSED)
        self.socket = context.socket(zmq.PAIR)
        self.socket.rcvhwm = 0  # a full queue would stop ZeroMQ's I/O thread, and with it all our peers
        self.socket.connect(endpoint)
        self._num_unlogged, self._log_at_s = 0, 0.0

    def count(self, now_s: float) -> int:
        """How many there were since the last call; says so in the log, once a minute at most."""
        found = 0
        for _ in range(_MAX_EVENTS_PER_TURN):
            try:
                self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            found += 1
        self._num_unlogged += found
        if self._num_unlogged and now_s >= self._log_at_s:
            logger.error(
                "handshake.refused: %d connection(s) to the control port without this deployment's key, or not of a "
                "decode engine at all; if they are yours, give all engines the same --kv-key-file",
                self._num_unlogged,
            )
            self._num_unlogged, self._log_at_s = 0, now_s + LOG_INTERVAL_S
        return found

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if not self.socket.closed:
            self._server.disable_monitor()
            self.socket.close()
