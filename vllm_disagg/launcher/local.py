"""Starts a plan's processes on this machine, waits until they serve, watches them, and ends them all.

Everything here is a thin shell around `plan.plan_launch`; what keeps processes from being left behind is `warden`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import aiohttp

from vllm_disagg.core.fingerprint import check_compatible
from vllm_disagg.errors import LaunchError
from vllm_disagg.launcher.child import Child, how_it_ended, until_ready, with_log
from vllm_disagg.launcher.console import Console
from vllm_disagg.launcher.plan import EngineLaunch, ForkHostLaunch, LaunchPlan

_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Those by which people and service managers end a command."""

_PROXY_START_S = 60.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 1.0, 60.0
_FORK_HOST = "fork-host"
_STEADY_S = 300.0
"""An engine that served this long starts its back-off anew."""


class Deployment:
    """The processes of one plan. An async context manager: leaving it, for whatever reason, ends them all.

    Args:
        plan: what to start.
        log_dir: an existing folder; each process writes `NAME.log` in it.
        stop_grace_s: seconds from the polite to the forced end of a process.
        console: where progress and deaths are reported.
        stop_signals: taken over while it lasts: the first cancels the task that has entered it, and a further one ends
            the processes without grace. Only for whoever owns the whole process: nobody else gets them meanwhile.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        *,
        log_dir: Path,
        stop_grace_s: float,
        console: Console,
        stop_signals: Sequence[signal.Signals] = (),
    ) -> None:
        self.plan, self.log_dir = plan, log_dir
        self._stop_signals = stop_signals
        self._grace_s, self._console = stop_grace_s, console
        self._children: dict[str, Child] = {}
        self._http: aiohttp.ClientSession | None = None
        self._owner: asyncio.Task[Any] | None = None
        self._asked_to_stop = False

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(timeout=_PROBE_TIMEOUT)
        self._owner = asyncio.current_task()
        for number in self._stop_signals:
            asyncio.get_running_loop().add_signal_handler(number, self._on_stop_signal)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._children:
            self._console.line("stopping ...")
        stopping = asyncio.ensure_future(self._stop_all())
        while not stopping.done():  # a second Ctrl-C cancels this task again; the children must end all the same
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(stopping)
        for number in self._stop_signals:
            asyncio.get_running_loop().remove_signal_handler(number)
        stopping.result()

    async def start(self, *, timeout_s: float) -> None:
        """Start all engines at once, check that they fit each other, then start the proxy.

        Raises:
            LaunchError: a process died or did not get ready in time; the text ends with the last lines of its log.
            IncompatiblePeer: a prefill and a decode engine cannot exchange KV.
        """
        started_s = time.monotonic()
        if self.plan.fork_host is not None:
            await self._start_fork_host(self.plan.fork_host, timeout_s=timeout_s)
        waiting = {engine.name for engine in self.plan.engines}

        async def bring_up(engine: EngineLaunch) -> None:
            await self._start_engine(engine, timeout_s=timeout_s)
            waiting.discard(engine.name)
            self._console.line(f"{engine.name}: ready after {time.monotonic() - started_s:.0f} s")

        await self._all_or_first_error(
            [bring_up(engine) for engine in self.plan.engines],
            lambda: f"{', '.join(sorted(waiting))}: loading ... {time.monotonic() - started_s:.0f} s",
        )
        await self._check_engines_fit()
        await self._start_proxy()

    async def serve(self, *, restart: bool) -> None:
        """Watch until the deployment can serve no more. Each death is reported when it happens.

        Args:
            restart: start an engine that died again, after a pause that grows.

        Raises:
            LaunchError: the proxy died, or no decode engine is left.
        """
        decodes_left = {engine.name for engine in self.plan.engines if engine.role == "decode"}

        async def watch(engine: EngineLaunch) -> None:
            if restart:
                await self._keep_alive(engine)
            text = await self._death_of(engine.name)
            decodes_left.discard(engine.name)
            if not decodes_left:
                raise LaunchError(f"{text}\nno decode engine is left")
            self._console.line(f"{text}\nthe others go on serving; with --restart it would be started again")

        async def watch_proxy() -> None:
            raise LaunchError(await self._death_of("proxy"))

        async def watch_fork_host() -> None:
            if self.plan.fork_host is not None:
                raise LaunchError(await self._death_of(_FORK_HOST))

        await self._all_or_first_error(
            [*(watch(engine) for engine in self.plan.engines), watch_proxy(), watch_fork_host()]
        )

    def _on_stop_signal(self) -> None:
        """The first Ctrl-C or SIGTERM ends everything politely, a further one at once."""
        if self._asked_to_stop:
            for child in self._children.values():
                child.kill()
        elif self._owner is not None:
            self._asked_to_stop = True
            self._owner.cancel()

    async def _get_json(self, url: str) -> tuple[int, Any]:
        """Status and decoded body of one GET; body None when it is not JSON."""
        assert self._http is not None
        async with self._http.get(url) as response:
            try:
                return response.status, await response.json(content_type=None)
            except ValueError:
                return response.status, None

    async def _start_engine(self, engine: EngineLaunch, *, timeout_s: float) -> None:
        child = await self._spawn(engine.name, engine.argv, engine.env, engine.cpus)

        async def healthy() -> bool:
            return (await self._get_json(f"{engine.url}/health"))[0] == 200

        await until_ready(child, healthy, timeout_s=timeout_s)

    async def _start_fork_host(self, host: ForkHostLaunch, *, timeout_s: float) -> None:
        child = await self._spawn(_FORK_HOST, host.argv, host.env)

        async def listening() -> bool:
            return await asyncio.to_thread(Path(host.socket).is_socket)

        self._console.status("importing vLLM ...")
        await until_ready(child, listening, timeout_s=timeout_s)

    async def _start_proxy(self) -> None:
        child = await self._spawn("proxy", self.plan.proxy_argv, {})

        async def splitting() -> bool:
            status, body = await self._get_json(f"{self.plan.proxy_url}/ready")
            return status == 200 and isinstance(body, dict) and body.get("splitting") is True

        await until_ready(child, splitting, timeout_s=_PROXY_START_S)

    async def _spawn(
        self, name: str, argv: tuple[str, ...], env: Mapping[str, str], cpus: tuple[int, ...] = ()
    ) -> Child:
        log_file = self.log_dir / f"{name}.log"
        child = Child(name, argv, env=env, log_file=log_file, grace_s=self._grace_s, cpus=cpus)
        self._children[name] = child
        await child.start()
        return child

    async def _death_of(self, name: str) -> str:
        child = self._children[name]
        return with_log(f"{name} {how_it_ended(await child.wait())} during service", child)

    async def _keep_alive(self, engine: EngineLaunch) -> NoReturn:
        pause_s = _BACKOFF_FIRST_S
        while True:
            started_s = time.monotonic()
            text = await self._death_of(engine.name)
            if time.monotonic() - started_s >= _STEADY_S:
                pause_s = _BACKOFF_FIRST_S
            self._console.line(f"{text}\n{engine.name}: starting again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)
            pause_s = min(_BACKOFF_MOST_S, 2 * pause_s)
            await self._spawn(engine.name, engine.argv, engine.env, engine.cpus)

    async def _check_engines_fit(self) -> None:
        prints = {engine.name: await self._fingerprint(engine) for engine in self.plan.engines}
        for ours in (engine for engine in self.plan.engines if engine.role == "prefill"):
            for theirs in (engine for engine in self.plan.engines if engine.role == "decode"):
                check_compatible(prints[ours.name], prints[theirs.name])

    async def _fingerprint(self, engine: EngineLaunch) -> dict[str, str]:
        try:
            status, body = await self._get_json(f"{engine.url}/disagg/status")
            if status == 200:
                return {str(name): str(value) for name, value in body["fingerprint"].items()}
        except (aiohttp.ClientError, TimeoutError, OSError, KeyError, TypeError, AttributeError):
            pass
        raise LaunchError(
            f"{engine.name} has no /disagg/status: is the vllm_disagg plugin shut out by the variable VLLM_PLUGINS?"
        )

    async def _all_or_first_error(
        self, jobs: Sequence[Coroutine[Any, Any, None]], status: Callable[[], str] | None = None
    ) -> None:
        """Run all to their end, or to the first error, which is raised alone."""
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            while pending := [task for task in tasks if not task.done()]:
                done, _ = await asyncio.wait(
                    pending, timeout=1.0 if status else None, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
                if status:
                    self._console.status(status())
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stop_all(self) -> None:
        await asyncio.gather(*(child.stop() for child in self._children.values()), return_exceptions=True)
        if self._http is not None:
            await self._http.close()
