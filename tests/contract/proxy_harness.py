"""A real proxy under uvicorn in this loop, between fake engines and clients, all over loopback sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI

from vllm_disagg.config import ProxySettings
from vllm_disagg.proxy import create_app
from vllm_disagg.proxy.metrics import ProxyMetrics
from vllm_disagg.proxy.services import Services
from vllm_disagg.testing.fake_engine import FakeEngine

PROMPT = "The quick brown fox jumps over the lazy dog, again and again."


@dataclass(kw_only=True)
class Answer:
    """What a client got."""

    status: int
    headers: Any
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def events(self) -> list[Any]:
        """The data of all events but the last `[DONE]`, which must be there."""
        lines = [line[6:] for line in self.raw.split(b"\n\n") if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    @property
    def text(self) -> str:
        """The generated text, of either interface, streamed or not."""
        parts = self.events if self.headers["Content-Type"].startswith("text/event-stream") else [self.json]
        choices = [choice for part in parts for choice in part.get("choices", [])]
        return "".join(_text_of(choice) for choice in choices)

    @property
    def route(self) -> tuple[str | None, str | None]:
        return self.headers.get("X-Disagg-Route"), self.headers.get("X-Disagg-Reason")


class Proxy:
    """A running proxy and a client for it."""

    def __init__(self, app: FastAPI, server: uvicorn.Server, port: int, http: aiohttp.ClientSession) -> None:
        self.app, self.server, self.port, self.http = app, server, port, http
        self.url = f"http://127.0.0.1:{port}"

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def metrics(self) -> ProxyMetrics:
        return self.services.metrics

    def total(self, name: str, **labels: str) -> float:
        return self.metrics.value(f"vllm_disagg_proxy_{name}", **labels)

    async def get(self, path: str, **options: Any) -> Answer:
        async with self.http.get(self.url + path, **options) as answer:
            return Answer(status=answer.status, headers=answer.headers, raw=await answer.read())

    async def post(self, path: str, body: Any, **options: Any) -> Answer:
        content = {"json": body} if isinstance(body, dict | list) else {"data": body}
        async with self.http.post(self.url + path, **content, **options) as answer:
            return Answer(status=answer.status, headers=answer.headers, raw=await answer.read())

    async def complete(self, prompt: Any = PROMPT, *, max_tokens: int = 8, **fields: Any) -> Answer:
        return await self.post("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **fields})

    async def chat(self, text: str = PROMPT, *, max_tokens: int = 8, **fields: Any) -> Answer:
        messages = [{"role": "user", "content": text}]
        return await self.post("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens, **fields})


@asynccontextmanager
async def proxy(*engines: FakeEngine, **settings: Any) -> AsyncIterator[Proxy]:
    """A proxy before these engines, with quick probes unless told otherwise."""
    urls = {role: tuple(engine.url for engine in engines if engine.role == role) for role in ("prefill", "decode")}
    async with proxy_of(ProxySettings(**{**urls, "probe_interval_s": 0.05, "probe_timeout_s": 1.0, **settings})) as it:
        yield it


@asynccontextmanager
async def proxy_of(settings: ProxySettings) -> AsyncIterator[Proxy]:
    """A proxy with exactly these settings, but on a free port."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, access_log=False, lifespan="on", log_config=None, ws="none")
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await until("the proxy runs", lambda: server.started or serving.done())
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as http:
            yield Proxy(app, server, listener.getsockname()[1], http)
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def one_and_one(**settings: Any) -> AsyncIterator[tuple[Proxy, FakeEngine, FakeEngine]]:
    """A proxy, one prefill and one decode instance."""
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(FakeEngine("prefill"))
        decode = await stack.enter_async_context(FakeEngine("decode"))
        yield await stack.enter_async_context(proxy(prefill, decode, **settings)), prefill, decode


async def until(what: str, condition: Callable[[], Any], *, timeout_s: float = 10.0) -> None:
    """Wait until a condition holds; fail by name when it does not within `timeout_s`."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


async def all_idle(*engines: FakeEngine) -> None:
    """Wait until no engine runs or keeps anything."""
    for engine in engines:
        await until(f"{engine.role} is idle", lambda engine=engine: engine.is_idle)  # type: ignore[misc]


def _text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return str((choice.get("message") or choice.get("delta") or {}).get("content") or "")
