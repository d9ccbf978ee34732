"""A process that imports vLLM once and forks engines, which then start in seconds and share the memory of the imports.

For emulated engines, which use no native threads of their own. It is started with a path for its Unix socket; each
engine is asked for by a `forked_engine.py`, which stands for the engine towards whoever started it:

    forked_engine --its arguments, environment, output--> fork host --fork--> engine, in a session of its own
    forked_engine <--the engine's exit status------------ fork host

When a `forked_engine` goes away, its engine is killed. The fork host ends with the process that started it, and all its
engines with it; when it is killed itself, the warden ends them.

    python -m vllm_disagg.launcher.fork_host SOCKET
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

SINGLE_THREADED: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment in which the imports start no threads: a fork carries only one over."""

_PRELOADED: Final = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.transformers_utils.tokenizer",
    "transformers.models.auto.tokenization_auto",
    "vllm_disagg.connector",
    "vllm_disagg.scheduler",
    "vllm_disagg.frontend",
    "vllm_disagg.emulation.executor",
    "vllm_disagg.emulation.flags",
    "vllm_disagg.emulation.label",
    "nixl",
)
_MAX_REQUEST_BYTES: Final = 1 << 20


@dataclass(slots=True)
class _Engine:
    pid: int
    owner: socket.socket


class ForkHost:
    """Listens, forks, reaps.

    Args:
        path: of the socket; made by us, readable by this user only.
        parent: a descriptor that becomes readable when the process ends that we are to end with; None for no such.
    """

    def __init__(self, path: Path, *, parent: int | None = None) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._path, self._parent = path, parent
        self._selector = selectors.DefaultSelector()
        self._engines: dict[int, _Engine] = {}

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or the end of the parent."""
        wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        stopping: list[int] = []
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda caught, _frame: stopping.append(caught))
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        os.umask(0o077)
        self._listener.bind(str(self._path))
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(wake_reader, selectors.EVENT_READ)
        if self._parent is not None:
            self._selector.register(self._parent, selectors.EVENT_READ)
        while not stopping:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._parent:
                    stopping.append(0)
                elif key.fileobj == wake_reader:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_reader, 4096)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._heard(key.fileobj)
            self._reap()
        for engine in self._engines.values():
            _kill_group(engine.pid)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(10.0)
        try:
            request, outputs = _receive(connection)
        except (OSError, ValueError) as error:
            print(f"fork_host: not a request: {error}", file=sys.stderr)  # noqa: T201 - this process's log
            connection.close()
            return
        pid = os.fork()
        if pid == 0:
            _become_engine(request, outputs)
        for descriptor in outputs:
            os.close(descriptor)
        connection.setblocking(False)
        self._engines[pid] = _Engine(pid, connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _heard(self, connection: socket.socket) -> None:
        """A stand-in forwards a signal, one byte each; its end ends the engine."""
        engine = next(engine for engine in self._engines.values() if engine.owner is connection)
        try:
            data = connection.recv(64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            _kill_group(engine.pid)
        for number in data:
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine.pid, number)

    def _reap(self) -> None:
        for pid, status in _ended():
            engine = self._engines.pop(pid, None)
            if engine is None:
                continue
            _kill_group(pid)  # what it left behind
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                engine.owner.send(bytes([code if code >= 0 else 128 - code]))
            with contextlib.suppress(KeyError):
                self._selector.unregister(engine.owner)
            engine.owner.close()


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, outputs, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 2)
    while not data.endswith(b"\n"):
        more = connection.recv(_MAX_REQUEST_BYTES)
        if not more or len(data) > _MAX_REQUEST_BYTES:
            raise ValueError("it ends too early, or never")
        data += more
    if len(outputs) != 2:
        raise ValueError("it comes without stdout and stderr")
    return json.loads(data), outputs


def _become_engine(request: dict[str, Any], outputs: list[int]) -> NoReturn:
    """In the forked process: take over what the stand-in was given, and run vLLM's server to its end."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        for standard, descriptor in enumerate(outputs, start=1):
            os.dup2(descriptor, standard)
        os.closerange(3, 4096)
        os.environ.clear()
        os.environ.update(request["env"])
        os.sched_setaffinity(0, request["cpus"])
        _fork_engine_core()
        from vllm_disagg.launcher.serve import run_vllm_serve

        run_vllm_serve(request["argv"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _fork_engine_core() -> None:
    """Make this engine's server fork its EngineCore as well. vLLM's CPU platform insists on spawning, for the sake of
    native threads that an emulated engine does not have."""
    import multiprocessing

    from vllm.v1.engine import utils

    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # the parent's event loop hears of its own
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def _preload() -> None:
    from vllm_disagg.launcher.serve import lend_vllm_version

    lend_vllm_version()
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):  # one that is missing or has moved is imported by who needs it
            importlib.import_module(name)
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # Known by its class, the architecture of the built-in shapes need not be looked at in a process of its own.
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    gc.collect()
    gc.freeze()  # the collector would otherwise write to every page that is shared


def _ended() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, status


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end_of_parent() -> int | None:
    """A descriptor that becomes readable when the process that started this one has ended, however it did. Unlike a
    signal at the parent's death, it does not take the end of the thread that started us for it."""
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(os.getppid())
    except OSError:  # an old kernel
        return None


def main(arguments: list[str]) -> None:
    """Import, then serve."""
    parent = _end_of_parent()
    _preload()
    ForkHost(Path(arguments[0]), parent=parent).run()


if __name__ == "__main__":
    main(sys.argv[1:])
