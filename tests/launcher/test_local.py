"""A deployment of fake processes: it starts, reports what dies, and leaves nothing."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from vllm_disagg.errors import ConfigError, IncompatiblePeer, LaunchError
from vllm_disagg.launcher.console import Console
from vllm_disagg.launcher.local import Deployment
from vllm_disagg.launcher.machine import Machine, free_ports
from vllm_disagg.launcher.settings import UpSettings
from vllm_disagg.launcher.up import deployed

from .helpers import FAKE, MARK, assert_gone, marked, wait_for

MACHINE = Machine(gpus=(), cores=((0,), (1,)), memory_bytes=2**30)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(MARK, str(tmp_path))
    yield str(tmp_path)
    for process in marked(str(tmp_path)):
        process.kill()


def settings(tmp_path: Path, **more: Any) -> UpSettings:
    given = {"stop_grace_s": 1.0, **more}
    return UpSettings(model="org/fake", port=free_ports(1)[0], log_dir=str(tmp_path), **given)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


async def run(asked: UpSettings, *, then: Any = None) -> str:
    """Bring a deployment up, serve until `then` is over, take it down. Returns what the user saw."""
    seen = io.StringIO()
    async with deployed(asked, Console(seen), machine=MACHINE, engine_command=FAKE, proxy_command=FAKE) as deployment:
        if then is not None:
            await then(deployment)
    return seen.getvalue()


async def die(url: str) -> None:
    """Tell a fake to end at once."""
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get(f"{url}/die")


def engine_url(deployment: Deployment, name: str) -> str:
    return next(engine.url for engine in deployment.plan.engines if engine.name == name)


async def until(condition: Callable[[], bool], serving: asyncio.Future[None]) -> None:
    """While the deployment serves."""
    async with asyncio.timeout(60):
        while not condition():
            assert not serving.done()
            await asyncio.sleep(0.05)  # bounded polling of what it has said and of logs


async def test_a_deployment_starts_and_leaves_nothing(tmp_path: Path, mark: str) -> None:
    seen = await run(settings(tmp_path, engine_arg=("--x-fake.grandchild=1",)))

    assert "prefill-0: ready after" in seen and "decode-0: ready after" in seen
    assert_gone(mark, within_s=0.5)
    assert names_in(tmp_path) == ["decode-0.log", "prefill-0.log", "proxy.log"]


async def test_a_crash_at_start_is_reported_with_its_log(tmp_path: Path, mark: str) -> None:
    with pytest.raises(LaunchError, match=r"(?s)decode-0 ended with exit status 3 while starting.*told to fail"):
        await run(settings(tmp_path, prefill_arg=("--x-fake.start_s=60",), decode_arg=("--x-fake.fail=1",)))

    assert_gone(mark, within_s=0.5)


async def test_an_engine_that_never_gets_ready_is_given_up(tmp_path: Path, mark: str) -> None:
    with pytest.raises(LaunchError, match="prefill-0 was not ready after 1 s"):
        await run(settings(tmp_path, prefill_arg=("--x-fake.start_s=60",), start_timeout_s=1.0))

    assert_gone(mark, within_s=0.5)


async def test_engines_that_do_not_fit_are_refused(tmp_path: Path, mark: str) -> None:
    with pytest.raises(IncompatiblePeer, match="dtype is 'float32' here and 'bfloat16' at the peer"):
        await run(settings(tmp_path, decode_arg=("--x-fake.dtype=bfloat16",)))

    assert_gone(mark, within_s=0.5)


async def test_a_busy_port_is_found_before_anything_starts(tmp_path: Path, mark: str) -> None:
    asked = settings(tmp_path)
    with (
        socket.create_server(("127.0.0.1", asked.port)),
        pytest.raises(ConfigError, match="choose another with --port"),
    ):
        await run(asked)

    assert names_in(tmp_path) == []


async def test_the_death_of_a_prefill_engine_is_reported_and_the_rest_serves(tmp_path: Path, mark: str) -> None:
    seen = io.StringIO()
    async with deployed(
        settings(tmp_path), Console(seen), machine=MACHINE, engine_command=FAKE, proxy_command=FAKE
    ) as deployment:
        serving = asyncio.ensure_future(deployment.serve(restart=False))
        await die(engine_url(deployment, "prefill-0"))
        await until(lambda: "the others go on serving" in seen.getvalue(), serving)
        assert not serving.done()
        serving.cancel()

    assert "prefill-0 ended with exit status 5 during service" in seen.getvalue()


async def test_service_ends_with_the_last_decode_engine(tmp_path: Path, mark: str) -> None:
    async def last_death(deployment: Deployment) -> None:
        await die(engine_url(deployment, "decode-0"))
        await deployment.serve(restart=False)

    with pytest.raises(LaunchError, match="no decode engine is left"):
        await run(settings(tmp_path), then=last_death)

    assert_gone(mark, within_s=0.5)


async def test_service_ends_with_the_proxy(tmp_path: Path, mark: str) -> None:
    async def proxy_dies(deployment: Deployment) -> None:
        await die(deployment.plan.proxy_url)
        await deployment.serve(restart=True)

    with pytest.raises(LaunchError, match="proxy ended with exit status 5"):
        await run(settings(tmp_path), then=proxy_dies)


async def test_a_dead_engine_is_started_again_if_asked(tmp_path: Path, mark: str) -> None:
    async def two_deaths(deployment: Deployment) -> None:
        serving = asyncio.ensure_future(deployment.serve(restart=True))
        log = tmp_path / "decode-0.log"
        for num_starts in (2, 3):
            await die(engine_url(deployment, "decode-0"))
            await until(lambda: log.read_text().count("serves") == num_starts, serving)  # noqa: B023 - used at once
        serving.cancel()

    seen = await run(settings(tmp_path), then=two_deaths)

    assert "decode-0: starting again in 1 s" in seen and "decode-0: starting again in 2 s" in seen


LAUNCHER = textwrap.dedent(
    """
    import asyncio, sys
    from vllm_disagg.launcher.console import Console
    from vllm_disagg.launcher.local import STOP_SIGNALS
    from vllm_disagg.launcher.up import deployed
    from tests.launcher.test_local import FAKE, MACHINE, settings
    from pathlib import Path

    async def main():
        owns_the_process = sys.argv[3] == "command"
        arguments = ("--x-fake.deaf=1", "--x-fake.grandchild=1", *sys.argv[4:])
        asked = settings(Path(sys.argv[1]), stop_grace_s=float(sys.argv[2]), engine_arg=arguments)
        async with deployed(
            asked, Console(sys.stdout), machine=MACHINE, engine_command=FAKE, proxy_command=FAKE,
            stop_signals=STOP_SIGNALS if owns_the_process else (),
        ) as deployment:
            print("serving", flush=True)
            await deployment.serve(restart=False)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("interrupted")
    """
)


@contextmanager
def launch(
    tmp_path: Path, *arguments: str, grace_s: float = 0.3, owner: str = "command"
) -> Iterator[subprocess.Popen[str]]:
    """Of engines that do not end when they are asked to, so that their grace is waited for."""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), str(grace_s), owner, *arguments],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()  # a failed test does not wait for it


def hear(process: subprocess.Popen[str], line: str) -> None:
    """Until it says so."""
    assert process.stdout is not None
    assert f"{line}\n" in iter(process.stdout.readline, "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_outlives_the_launcher(tmp_path: Path, mark: str, number: signal.Signals) -> None:
    with launch(tmp_path) as process:
        hear(process, "serving")

        process.send_signal(number)

        assert_gone(mark, within_s=20)


def test_nothing_outlives_a_launcher_killed_while_engines_start(tmp_path: Path, mark: str) -> None:
    with launch(tmp_path, "--x-fake.start_s=60") as process:
        wait_for(lambda: len(marked(mark)) >= 5)

        process.kill()

        assert_gone(mark, within_s=20)


def test_a_second_ctrl_c_does_not_wait_for_the_grace(tmp_path: Path, mark: str) -> None:
    with launch(tmp_path, grace_s=60.0) as process:
        hear(process, "serving")

        process.send_signal(signal.SIGINT)
        hear(process, "stopping ...")
        process.send_signal(signal.SIGINT)

        assert_gone(mark, within_s=3)


def test_who_uses_it_as_a_library_is_interrupted_by_ctrl_c(tmp_path: Path, mark: str) -> None:
    with launch(tmp_path, owner="library") as process:
        hear(process, "serving")

        process.send_signal(signal.SIGINT)

        hear(process, "interrupted")
        assert_gone(mark, within_s=3)
