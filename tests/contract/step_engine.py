"""An engine that is nothing but steps: continuous batching of prompts and streams behind the part of vLLM's API that
the profiler uses, each step as long as a latency model says. It runs in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from vllm_disagg.core.latency import LatencyModel, work_of
from vllm_disagg.core.steps import RecordedStep


@dataclass(eq=False)
class Answer:
    """One prompt and its tokens."""

    num_prompt: int
    num_tokens: int
    computed: int = 0
    given: int = 0
    news: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    @property
    def is_over(self) -> bool:
        return self.given == self.num_tokens

    def next(self, room: int) -> int:
        """New tokens of the next step."""
        return min(room, self.num_prompt - self.computed) if self.computed < self.num_prompt else min(room, 1)


class StepEngine:
    """A context manager.

    Args:
        latency: how long steps take.
        log: file for its steps; None to write none.
        step_tokens: most new tokens of a step.
        breaks_after: requests, after which it answers with an error.
    """

    def __init__(
        self,
        latency: LatencyModel,
        *,
        log: Path | None = None,
        step_tokens: int = 512,
        max_model_len: int = 2048,
        num_blocks: int = 501,
        breaks_after: int | None = None,
    ) -> None:
        self._latency, self._log, self._step_tokens = latency, log, step_tokens
        self._max_model_len, self._num_blocks, self._breaks_after = max_model_len, num_blocks, breaks_after
        self._answers: list[Answer] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.num_requests = 0
        self.most_running = 0
        self.url = ""

    def __enter__(self) -> Self:
        if self._log is not None:
            self._log.touch()
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.add_routes(
            [
                web.get("/health", self._health), web.get("/v1/models", self._models),
                web.get("/version", self._version), web.get("/metrics", self._metrics),
                web.post("/v1/completions", self._completions),
            ]
        )  # fmt: skip
        self._work = asyncio.Event()
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._stepping = asyncio.create_task(self._run())

    async def _stop(self) -> None:
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _run(self) -> None:
        """Step after step, for as long as there is something to do."""
        while True:
            if not self._answers:
                self._work.clear()
                await self._work.wait()
            room, parts = self._step_tokens, list[tuple[Answer, int]]()
            for answer in sorted(self._answers, key=lambda item: item.computed < item.num_prompt):  # streams first
                if room and (new := answer.next(room)):
                    parts.append((answer, new))
                    room -= new
            requests = tuple((answer.computed, new) for answer, new in parts)
            self.most_running = max(self.most_running, len(requests))
            begun_s, step_s = time.monotonic(), self._latency.step_s(work_of(requests))
            await asyncio.sleep(step_s)
            # What the model says, not what the sleep took: the log is of a device that is never late.
            step = RecordedStep(at_s=begun_s, step_s=step_s, requests=requests)
            if self._log is not None:
                with self._log.open("a") as file:
                    file.write(step.line())
            for answer, new in parts:
                answer.computed += new
                if answer.computed >= answer.num_prompt:
                    answer.given += 1
                    answer.news.put_nowait(1)
            self._answers = [answer for answer in self._answers if not answer.is_over]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "of steps"})

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": "steps", "root": "/no/such/folder", "max_model_len": self._max_model_len}
        return web.json_response({"data": [model]})

    async def _metrics(self, request: web.Request) -> web.Response:
        labels = f'block_size="16",cache_dtype="auto",num_gpu_blocks="{self._num_blocks}"'
        return web.Response(text=f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{labels}}} 1.0\n")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.num_requests += 1
        if self._breaks_after is not None and self.num_requests > self._breaks_after:
            return web.json_response({"error": "broken"}, status=500)
        answers = [Answer(len(prompt), body["max_tokens"]) for prompt in body["prompt"]]
        self._answers += answers
        self._work.set()
        try:
            if body["stream"]:
                with contextlib.suppress(ConnectionResetError):  # the client has left
                    return await self._stream(request, answers)
                return web.Response()
            choices = [
                {"index": index, "token_ids": [1 async for _ in _tokens(one)]} for index, one in enumerate(answers)
            ]
            return web.json_response({"choices": choices})
        finally:
            self._answers = [answer for answer in self._answers if answer not in answers]

    async def _stream(self, request: web.Request, answers: list[Answer]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(index: int, answer: Answer) -> None:
            async for _ in _tokens(answer):
                await response.write(_event({"choices": [{"index": index, "token_ids": [1]}]}))

        await asyncio.gather(*(send(index, answer) for index, answer in enumerate(answers)))
        await response.write(b"data: [DONE]\n\n")
        return response


async def _tokens(answer: Answer) -> AsyncIterator[int]:
    for _ in range(answer.num_tokens):
        yield await answer.news.get()


def _event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"
