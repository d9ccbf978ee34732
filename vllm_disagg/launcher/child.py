"""One process of a deployment, behind its warden."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import aiohttp

from vllm_disagg.errors import LaunchError
from vllm_disagg.launcher.logs import last_words

_WARDEN = Path(__file__).with_name("warden.py")
_WARDEN_START_S = 30.0
_WARDEN_SLACK_S = 10.0
_TAIL_BYTES = 1024 * 1024
_PROBE_EVERY_S = 0.5
_TAIL_LINES, _LINE_CHARS = 15, 300


class Child:
    """A process tree that is started once, watched, and surely ended.

    Args:
        name: for people: `prefill-0`, `proxy`.
        argv: its command.
        env: what is added to this process's environment.
        log_file: where its output goes, appended.
        grace_s: seconds from the polite to the forced end.
        cpus: logical CPUs that it and all its processes may use; none means any.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log_file: Path,
        grace_s: float,
        cpus: Sequence[int] = (),
    ) -> None:
        self.name, self.log_file = name, log_file
        self._argv, self._env, self._grace_s = tuple(argv), dict(env), grace_s
        self._cpus = ",".join(map(str, cpus)) or "-"
        self._warden: asyncio.subprocess.Process | None = None
        self._pid: int | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process and session id of the engine itself; None before the start."""
        return self._pid

    async def start(self) -> None:
        """Start the process.

        Raises:
            LaunchError: it could not even be executed.
        """
        self._log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
        starting = asyncio.ensure_future(self._start_warden())
        try:
            self._warden = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._warden = await starting  # half-started it could not be stopped
            raise
        assert self._warden.stdout is not None
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(self._warden.stdout.readline(), _WARDEN_START_S)
            self._pid = int(line) if line.strip() else None
        if self._pid is None:
            await self.stop()
            raise LaunchError(f"{self.name} could not be started: {' '.join(self.last_words(1))}")

    async def wait(self) -> int:
        """Wait until all of its processes have ended. Returns the exit status, 128 + signal as in a shell."""
        assert self._warden is not None
        code = await self._warden.wait()
        if code < 0:
            self._kill_session()  # the warden itself was killed: its work is left to us
            return 128 - code
        return code

    async def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL after the grace. Returns when nothing is left. May be called twice."""
        if self._warden is None:
            return
        self._signal_warden(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), self._grace_s + _WARDEN_SLACK_S)
        except TimeoutError:
            self._kill_session()
            self._signal_warden(signal.SIGKILL)
            await self.wait()

    def kill(self) -> None:
        """End it without grace; `stop` or `wait` return soon after."""
        self._signal_warden(signal.SIGUSR1)

    def last_words(self, num_lines: int) -> list[str]:
        """What this run's log says at its end, as `logs.last_words` picks it."""
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(self._log_start, self.log_file.stat().st_size - _TAIL_BYTES))
                return last_words(log.read().decode("utf-8", errors="replace"), num_lines)
        except OSError:
            return []

    async def _start_warden(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-I",
                "-S",
                str(_WARDEN),
                str(self.log_file),
                str(self._grace_s),
                self._cpus,
                *self._argv,
            ),
            stdin=asyncio.subprocess.PIPE,  # its end tells the warden that this process is gone
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._env},
            start_new_session=True,  # Ctrl-C in the terminal reaches the launcher alone
        )

    def _signal_warden(self, number: signal.Signals) -> None:
        if self._warden is not None and self._warden.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._warden.send_signal(number)

    def _kill_session(self) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)


async def until_ready(child: Child, ready: Callable[[], Awaitable[bool]], *, timeout_s: float) -> None:
    """Ask again and again until the process is ready, it dies, or its time is over.

    Args:
        child: a started process.
        ready: asks it; may raise what HTTP clients raise.
        timeout_s: how long to wait.

    Raises:
        LaunchError: it died or did not get ready; the text ends with the last lines of its log.
    """
    deadline_s = time.monotonic() + timeout_s
    death = asyncio.ensure_future(child.wait())
    try:
        while not death.done():
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                if await ready():
                    return
            if time.monotonic() >= deadline_s:
                raise LaunchError(with_log(f"{child.name} was not ready after {timeout_s:.0f} s", child))
            await asyncio.wait({death}, timeout=_PROBE_EVERY_S)
        raise LaunchError(with_log(f"{child.name} {how_it_ended(death.result())} while starting", child))
    finally:
        death.cancel()


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    return f"was killed by signal {status - 128}" if status > 128 else f"ended with exit status {status}"


def with_log(text: str, child: Child) -> str:
    """A text, and the last lines of a process's log."""
    lines = child.last_words(_TAIL_LINES) or ["(empty)"]
    indented = "\n".join(f"    {line[:_LINE_CHARS]}" for line in lines)
    return f"{text}; the last lines of {child.log_file}:\n{indented}"
