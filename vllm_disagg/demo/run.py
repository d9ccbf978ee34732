"""`vllm-disagg demo`: SmolLM2 split over two engines on this machine, three chats, each checked against one engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import aiohttp
import click

from vllm_disagg.demo.compare import Comparison, Messages, compare
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.console import Console
from vllm_disagg.launcher.local import STOP_SIGNALS, Deployment
from vllm_disagg.launcher.machine import free_ports
from vllm_disagg.launcher.settings import UpSettings
from vllm_disagg.launcher.up import deployed

EXIT_INTERRUPTED = 130
MODEL_NAME = "SmolLM2-135M-Instruct"
_MAX_TOKENS = 48
_TIMEOUT = aiohttp.ClientTimeout(total=300.0)

CHATS: Final[tuple[Messages, ...]] = (
    ({"role": "user", "content": "What is the capital of France?"},),
    (
        {"role": "system", "content": "You are a patient teacher. You answer in one or two short sentences."},
        {
            "role": "user",
            "content": "A kettle holds two litres of water. Heating it takes energy that flows from the stove into the "
            "water, whose molecules move faster and faster until some of them escape as steam. "
            "Why does a lid on the kettle make the water boil sooner?",
        },
    ),
    (
        {"role": "user", "content": "My name is Ada and I keep bees."},
        {"role": "assistant", "content": "Nice to meet you, Ada! Bees are fascinating. How many hives do you have?"},
        {"role": "user", "content": "Three. Write one sentence about me."},
    ),
)


def run_demo() -> int:
    """Run it. Returns the exit status: 0 only if all answers are equal and the KV of each prompt really crossed.

    Raises:
        ConfigError, VllmUnavailable, LaunchError: it could not be started.
    """
    console = Console()
    console.line(f"preparing {MODEL_NAME} (once, about half a minute) ...")
    model = _prepare_model()
    settings = UpSettings(
        model=str(model),
        port=free_ports(1)[0],
        engine_arg=("--dtype=float32", "--max-model-len=2048", f"--served-model-name={MODEL_NAME}"),
    )
    try:
        return asyncio.run(_demo(settings, console))
    except asyncio.CancelledError:
        return EXIT_INTERRUPTED


def _prepare_model() -> Path:
    """The model's folder. Converted in a process of its own, so that this one stays free of torch."""
    command = [sys.executable, "-m", "vllm_disagg.demo.model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    if done.returncode != 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"the demo model could not be prepared: {last.removeprefix('error: ')}")
    return Path(done.stdout.strip().splitlines()[-1])


async def _demo(settings: UpSettings, console: Console) -> int:
    async with deployed(settings, console, stop_signals=STOP_SIGNALS) as deployment:
        comparisons = await _while_alive(deployment, _chats(deployment))
    good = all(comparison.equal and comparison.crossed for comparison in comparisons)
    click.echo("all answers are equal, and every prompt's KV crossed" if good else "the demo FAILED")
    return 0 if good else 1


async def _chats(deployment: Deployment) -> list[Comparison]:
    decode = next(engine for engine in deployment.plan.engines if engine.role == "decode")
    comparisons = []
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as http:
        for messages in CHATS:
            click.echo(f"\n> {messages[-1]['content']}")
            comparison = await compare(
                http,
                proxy_url=deployment.plan.proxy_url,
                decode_url=decode.url,
                request=_request(messages),
                on_text=lambda text: click.echo(text, nl=False),
            )
            click.echo("\n" + describe(comparison))
            comparisons.append(comparison)
    return comparisons


async def _while_alive(deployment: Deployment, work: Any) -> list[Comparison]:
    """The result of the work, or the error that ended the deployment meanwhile."""
    working = asyncio.ensure_future(work)
    serving = asyncio.ensure_future(deployment.serve(restart=False))
    try:
        done, _ = await asyncio.wait({working, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving in done:
            serving.result()
        return list(await working)
    finally:
        for task in (working, serving):
            task.cancel()
        await asyncio.gather(working, serving, return_exceptions=True)


def _request(messages: Messages) -> dict[str, Any]:
    return {"model": MODEL_NAME, "messages": list(messages), "temperature": 0.0, "max_tokens": _MAX_TOKENS}


def describe(comparison: Comparison) -> str:
    """The lines under an answer: equality, and where the time went."""
    split = comparison.split
    stages = ", ".join(f"{name.replace('_', ' ')} {ms:.0f} ms" for name, ms in split.stages_ms.items())
    return (
        f"  split == undivided: {'yes' if comparison.equal else 'NO'} ({len(split.token_ids)} tokens)\n"
        f"  time to the first event: {stages or 'unknown'}\n"
        f"  KV of {comparison.num_kv_tokens} of {split.num_prompt_tokens} prompt tokens crossed "
        f"in {comparison.kv_transfer_s * 1000:.0f} ms"
    )
