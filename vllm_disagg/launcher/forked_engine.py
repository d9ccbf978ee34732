"""Stands for an engine that a fork host runs: the same exit status, and the engine ends when this process does.

It is run as a plain file, without this package or site-packages, so that it costs a few milliseconds and megabytes:

    python -I -S forked_engine.py SOCKET ARGUMENT...

The arguments are those of `vllm serve`. The engine gets this process's environment, CPU affinity, stdout and stderr.
SIGTERM and SIGINT are forwarded.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main(arguments: list[str]) -> int:
    """Ask for the engine and wait for its end."""
    path, argv = arguments[0], arguments[1:]
    host = socket.socket(socket.AF_UNIX)
    try:
        host.connect(path)
    except OSError as error:
        print(f"no fork host at {path}: {error.strerror}", file=sys.stderr)  # noqa: T201 - the engine's log
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _frame: host.send(bytes([caught])))
    request = {"argv": argv, "env": dict(os.environ), "cpus": sorted(os.sched_getaffinity(0))}
    data = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(host, [data], [1, 2])
    host.sendall(data[sent:])
    status = host.recv(1)
    return status[0] if status else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
