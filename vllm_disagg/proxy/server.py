"""Serving the app on a socket."""

from __future__ import annotations

import logging
import os
import socket

import uvicorn

from vllm_disagg.config import ProxySettings
from vllm_disagg.errors import ConfigError
from vllm_disagg.proxy.app import create_app

logger = logging.getLogger(__name__)


def run(settings: ProxySettings) -> None:
    """Serve until a signal ends it. Logging is the caller's to configure.

    Raises:
        ConfigError: the address cannot be listened on, or there is no decode instance.
    """
    app = create_app(settings)
    listener = _listen(settings.host, settings.port)
    _cut_off_clients_that_do_not_read(listener, settings.idle_timeout_s)
    config = uvicorn.Config(
        app,
        access_log=False,
        lifespan="on",
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.drain_timeout_s),
        ws="none",
    )
    with listener:
        logger.info("proxy.listening host=%s port=%d", settings.host, settings.port)
        uvicorn.Server(config).run(sockets=[listener])


def _cut_off_clients_that_do_not_read(listener: socket.socket, timeout_s: float) -> None:
    """Have the kernel end connections whose client takes nothing of what is sent to it. Accepted sockets inherit this.

    The server alone would keep such a connection, and all that waits to be written to it, for as long as the client
    likes.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; choose another --host or --port") from error
