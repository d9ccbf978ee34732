"""`vllm-disagg up`: checks first, then a deployment, then service until someone stops it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shlex
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from vllm_disagg.core.keys import create_key_file
from vllm_disagg.errors import ConfigError
from vllm_disagg.folders import user_folder
from vllm_disagg.launcher.console import Console
from vllm_disagg.launcher.local import STOP_SIGNALS, Deployment
from vllm_disagg.launcher.machine import Machine, free_ports, require_free_port, this_machine
from vllm_disagg.launcher.plan import ENGINE_COMMAND, PROXY_COMMAND, plan_launch, ports_needed
from vllm_disagg.launcher.running import write_note
from vllm_disagg.launcher.settings import UpSettings, has_flag
from vllm_disagg.profiles import load_profile
from vllm_disagg.profiles.shapes import SHAPES

_MODEL_CONFIGS = ("config.json", "params.json")


def run_up(settings: UpSettings, console: Console | None = None) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP.

    Raises:
        ConfigError, VllmUnavailable: before anything is started.
        LaunchError, IncompatiblePeer: something did not start, does not fit, or died; everything is stopped by then.
    """
    with contextlib.suppress(asyncio.CancelledError):  # asked to stop, and everything has stopped
        asyncio.run(_up(settings, console or Console()))


async def _up(settings: UpSettings, console: Console) -> None:
    settings, _ = _what_to_serve(settings)
    async with deployed(settings, console, stop_signals=STOP_SIGNALS) as deployment:
        console.line(_summary(settings, deployment))
        await deployment.serve(restart=settings.restart)


@contextlib.asynccontextmanager
async def deployed(
    settings: UpSettings,
    console: Console,
    *,
    machine: Machine | None = None,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    proxy_command: Sequence[str] = PROXY_COMMAND,
    stop_signals: Sequence[signal.Signals] = (),
) -> AsyncIterator[Deployment]:
    """A deployment that is ready to serve; nothing is left of it afterwards.

    Args:
        settings: what to start.
        console: where progress is shown.
        machine: where to start it; this machine, unless a test says otherwise.
        engine_command: what stands before the model; tests start something else than vLLM.
        proxy_command: what stands before the proxy's options.
        stop_signals: those that end it, as `Deployment` says; for commands.

    Raises:
        ConfigError, VllmUnavailable: before anything is started.
        LaunchError, IncompatiblePeer: after everything has been stopped.
    """
    settings, model = _what_to_serve(settings)
    require_free_port(settings.host, settings.port)
    machine = machine or this_machine()
    log_dir = _log_dir(settings.log_dir)
    with tempfile.TemporaryDirectory(prefix="vllm-disagg-") as private:  # readable by this user only
        key_file = Path(private) / "deployment.key"
        create_key_file(key_file)
        plan = plan_launch(
            settings,
            machine,
            ports=free_ports(ports_needed(settings)),
            key_file=str(key_file),
            folder=private,
            weights_bytes=weights_bytes(model),
            environ=os.environ,
            engine_command=engine_command,
            proxy_command=proxy_command,
        )
        for line in (*(f"warning: {text}" for text in plan.warnings), *plan.notes):
            console.line(line)
        for engine in plan.engines:
            console.line(f"{engine.name}: {engine.place}, {engine.url}, log {log_dir / engine.name}.log")
        async with Deployment(
            plan, log_dir=log_dir, stop_grace_s=settings.stop_grace_s, console=console, stop_signals=stop_signals
        ) as deployment:
            note = write_note(
                log_dir,
                prefill=[engine.url for engine in plan.engines if engine.role == "prefill"],
                decode=[engine.url for engine in plan.engines if engine.role == "decode"],
                key_file=key_file,
            )
            try:
                await deployment.start(timeout_s=settings.start_timeout_s)
                yield deployment
            finally:
                note.unlink(missing_ok=True)


def _what_to_serve(settings: UpSettings) -> tuple[UpSettings, Path | None]:
    """The settings with a model's name, and the folder or file of a model that lies here."""
    if settings.emulate is not None:
        profile = load_profile(settings.emulate, model=settings.model if settings.model in SHAPES else None)
        settings = dataclasses.replace(settings, model=settings.model or profile.model.name)
        if settings.model == profile.model.name:
            return settings, None
    assert settings.model is not None
    return settings, check_model(settings.model)


def check_model(model: str) -> Path | None:
    """The folder or file of a local model; None for one that vLLM will find elsewhere.

    Raises:
        ConfigError: it looks like a path, and no model is there.
    """
    path = Path(model).expanduser()
    if path.is_file() or any((path / name).is_file() for name in _MODEL_CONFIGS):
        return path
    if path.is_dir():
        raise ConfigError(f"{model} has no config.json: give the folder of a model in Hugging Face's form")
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ConfigError(f"there is no model at {model}: give an existing folder, or a name such as org/model")
    return None


def weights_bytes(path: Path | None) -> int:
    """Size of a local model's files; 0 where it is not known."""
    if path is None:
        return 0
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return sum(file.stat().st_size for file in files)


def _log_dir(chosen: str | None) -> Path:
    if chosen is not None:
        folder = Path(chosen)
    else:
        folder = user_folder("state") / f"up-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the log folder {folder}: {error.strerror}; choose with --log-dir") from error
    return folder.absolute()


def _summary(settings: UpSettings, deployment: Deployment) -> str:
    url = deployment.plan.proxy_url
    body = msgspec.json.encode(
        {"model": _served_name(settings), "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    ).decode()
    kind = "emulated instances" if settings.emulate else "instances"
    return (
        f"\n{settings.prefill} prefill and {settings.decode} decode {kind} of {_served_name(settings)} serve at {url}\n"
        f"logs: {deployment.log_dir}\n"
        f"try:\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
        "Ctrl-C stops everything"
    )


def _served_name(settings: UpSettings) -> str:
    arguments = settings.engine_arg
    for index, argument in enumerate(arguments):
        if has_flag((argument,), "--served-model-name"):
            _, equals, value = argument.partition("=")
            return value if equals else arguments[index + 1]
    assert settings.model is not None
    return settings.model
