"""An engine without a model: OpenAI's interface over a real socket, with prefill, handoff, leases and faults.

    async with FakeEngine("prefill") as prefill, FakeEngine("decode") as decode:
        ...  # point a proxy at prefill.url and decode.url

Its tokens are a hash of the KV they come from and of their position. KV of another prompt, a repeated token or a gap
therefore shows in the text. `reference` says what an undivided engine would answer.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

import aiohttp
from aiohttp import web

from vllm_disagg.config import Role

FINGERPRINT: Final[Mapping[str, str]] = {"model": "fake-model", "kv_cache_dtype": "float32", "block_size": "16"}

_PROMPT_FIELDS: Final = ("messages", "tools", "documents", "chat_template", "chat_template_kwargs", "response_format")


@dataclass(slots=True, kw_only=True)
class Faults:
    """What goes wrong. All of it can be changed while the engine runs.

    Attributes:
        crash_on_request: the whole engine dies when the next request for tokens arrives.
        hang: requests are read and never answered, while `/health` says that all is well.
        freeze: as a stopped process: connections are accepted, and nothing is ever answered, `/health` included.
        healthy: what `/health` says.
        status: answer requests for tokens with this status and do nothing.
        die_after_tokens: the whole engine dies once one answer has this many tokens.
        cut_after_tokens: only that answer's connection is cut.
        error_first: streams begin with an error event of this code.
        no_handoff: prefills keep nothing.
        wrong_kv: pulls bring another prompt's KV.
        shy: no introductions: `error` answers with an error, `unknown` does not know the route.
    """

    crash_on_request: bool = False
    hang: bool = False
    freeze: bool = False
    healthy: bool = True
    status: int | None = None
    die_after_tokens: int | None = None
    cut_after_tokens: int | None = None
    error_first: int | None = None
    no_handoff: bool = False
    wrong_kv: bool = False
    shy: Literal["error", "unknown"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One request as it arrived."""

    path: str
    headers: Mapping[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        """Its body, parsed."""
        return json.loads(self.raw)


@dataclass(slots=True, kw_only=True)
class _Lease:
    num_blocks: int
    kv: str
    nonce: str
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class _Counts:
    """What an engine has done; reset when it restarts."""

    prefills: int = 0
    local_prefills: int = 0
    pulls: int = 0
    failed_pulls: int = 0
    aborted: int = 0
    tokens: int = 0
    releases: list[str] = field(default_factory=list)
    introduced: list[str] = field(default_factory=list)
    """Runs of prefill engines that a decode engine was introduced to."""


class FakeEngine:
    """One engine. Start it with `async with` or `start`.

    Args:
        role: what it says it is.
        fingerprint: what it says its KV is like.
        model: the one model it serves.
        num_blocks: its KV cache; a request that finds too few free blocks waits.
        block_size: tokens per block. A prompt shorter than a block is not handed over.
        lease_s: how long finished prefills are kept.
        prefill_s: how long a prefill takes.
        token_s: how long each token takes.
        padding: bytes added to each token, to make answers large.
    """

    def __init__(
        self,
        role: Role = "decode",
        *,
        fingerprint: Mapping[str, str] | None = FINGERPRINT,
        model: str = "fake-model",
        num_blocks: int = 4096,
        block_size: int = 16,
        lease_s: float = 30.0,
        prefill_s: float = 0.0,
        token_s: float = 0.0,
        padding: int = 0,
    ) -> None:
        self.role: Role = role
        self.fingerprint = fingerprint
        self.model, self.block_size, self.lease_s = model, block_size, lease_s
        self.num_blocks = num_blocks
        self.prefill_s, self.token_s, self.padding = prefill_s, token_s, padding
        self.num_cached_tokens = 0
        self.faults = Faults()
        self.received: list[Received] = []
        self.counts = _Counts()
        self.port = 0
        self.running = 0
        self.changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    # --- its life

    @property
    def url(self) -> str:
        """Where it listens. The port stays the same over a restart."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_leases(self) -> int:
        """Finished prefills that are kept for a decode instance."""
        return len(self._leases)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and no block is in use."""
        return self.running == 0 and not self._leases and self.free_blocks == self.num_blocks

    def requests(self, path: str = "completions") -> list[Received]:
        """What has arrived at paths that end so."""
        return [item for item in self.received if item.path.endswith(path)]

    async def start(self) -> None:
        """Start, or start again after `stop` or `die`, as a fresh engine on the same port."""
        await self.stop()
        self.engine_id = secrets.token_hex(4)
        self.counts = _Counts()
        self.free_blocks, self.running = self.num_blocks, 0
        self._leases: dict[str, _Lease] = {}
        self._forbidden: set[str] = set()
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        self._runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None)
        await self._runner.setup()
        assert self._runner.server is not None
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._server = await asyncio.get_running_loop().create_server(self._runner.server, sock=listener)

    async def stop(self) -> None:
        """Stop, cutting whatever runs."""
        if self._runner is not None:
            self.die()
            runner, self._runner = self._runner, None
            await self._http.close()
            await runner.cleanup()

    def die(self) -> None:
        """As `kill -9`: no more listening, every connection reset, everything in memory gone."""
        self._server.close()
        assert self._runner is not None and self._runner.server is not None
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        for lease in self._leases.values():
            lease.timer.cancel()
        self._leases.clear()

    async def until(self, what: str, condition: Any, *, timeout_s: float = 10.0) -> None:
        """Wait until `condition()` holds. It is looked at whenever the engine's state changes.

        Raises:
            TimeoutError: it did not come to hold; `what` names it.
        """
        try:
            async with asyncio.timeout(timeout_s), self.changed:
                await self.changed.wait_for(condition)
        except TimeoutError as error:
            raise TimeoutError(f"{what} did not come about within {timeout_s} s") from error

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # --- its routes

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/disagg/status", self._status)
        app.router.add_post("/disagg/release", self._release)
        app.router.add_get("/disagg/introduce", self._challenge)
        app.router.add_post("/disagg/introduce", self._introduce)
        app.router.add_post("/fake/pull", self._give)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        if self.faults.freeze:
            await asyncio.Event().wait()
        return web.Response(status=200 if self.faults.healthy else 503)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response({"role": self.role, "engine_id": self.engine_id, "fingerprint": self.fingerprint})

    async def _challenge(self, request: web.Request) -> web.Response:
        if self.faults.freeze:
            await asyncio.Event().wait()
        if self.role != "decode":
            return _error(409, "only a decode instance is introduced to others")
        return web.json_response({"challenge": self.engine_id})

    async def _introduce(self, request: web.Request) -> web.Response:
        if self.faults.freeze:
            await asyncio.Event().wait()
        if self.faults.shy is not None:
            return _error(500 if self.faults.shy == "error" else 404, "as told by its faults")
        body = json.loads(await request.read())
        if self.role == "prefill":
            return web.json_response({"introduction": f"{self.engine_id} {body['challenge']}"})
        prefill_id, _, challenge = body["introduction"].partition(" ")
        if challenge != self.engine_id:
            return web.json_response({"outcome": "foreign"}, status=403)
        self.counts.introduced.append(prefill_id)
        await self._tell()
        return web.json_response({"outcome": "taken"})

    async def _models(self, request: web.Request) -> web.Response:
        self._record(request, b"")
        return web.json_response({"object": "list", "data": [{"id": self.model, "object": "model"}]})

    async def _release(self, request: web.Request) -> web.Response:
        if self.faults.freeze:
            await asyncio.Event().wait()
        transfer_id = json.loads(await request.read())["transfer_id"]
        self.counts.releases.append(transfer_id)
        held = self._drop(transfer_id)
        if not held:
            self._forbidden.add(transfer_id)  # it may still be computed
        await self._tell()
        return web.json_response({"released": held})

    async def _give(self, request: web.Request) -> web.Response:
        """A decode engine reads a prompt's KV; the lease ends with it."""
        wanted = json.loads(await request.read())
        lease = self._leases.get(wanted["transfer_id"])
        if lease is None or not secrets.compare_digest(lease.nonce, wanted["nonce"]):
            return web.json_response({"kv": None}, status=410)
        self._drop(wanted["transfer_id"])
        await self._tell()
        return web.json_response({"kv": lease.kv})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, "completions")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, "chat")

    # --- one request

    async def _serve(self, request: web.Request, api: Literal["completions", "chat"]) -> web.StreamResponse:
        self._record(request, await request.read())
        await self._tell()
        if self.faults.crash_on_request:
            self.die()
        if self.faults.hang or self.faults.freeze:
            await asyncio.Event().wait()
        if self.faults.status is not None:
            return _error(self.faults.status, "as told by its faults")
        try:
            job = _Job.read(api, self.received[-1].json, self.model)
        except _Refused as refused:
            return _error(refused.status, str(refused))
        async with self._blocks(job.num_tokens, job.transfer_id if job.keeps_kv else None) as held:
            kv = await self._kv(job)
            if job.stream:
                return await self._answer_stream(request, job, kv)
            tokens = [token async for token in self._generate(request, job, kv)]
            params = self._hand_over(job, kv, held) if job.keeps_kv else None
            return web.json_response(job.answer(tokens, params))

    @asynccontextmanager
    async def _blocks(self, num_tokens: int, transfer_id: str | None) -> AsyncIterator[list[int]]:
        """Take blocks for a request. Those that are left in the yielded list at the end are free again."""
        number = -(-num_tokens // self.block_size)
        async with self.changed:
            await self.changed.wait_for(lambda: self.free_blocks >= number)
            self.free_blocks -= number
            self.running += 1
        held, leases = [number], self._leases
        try:
            yield held
        except asyncio.CancelledError:
            self.counts.aborted += 1
            raise
        finally:
            if leases is self._leases:  # else it has died and started again meanwhile
                self.free_blocks += sum(held)
                self.running -= 1
            self._forbidden.discard(transfer_id or "")
            await asyncio.shield(self._tell())

    async def _kv(self, job: _Job) -> str:
        """The prompt's KV: pulled if there is a handoff that still holds, else computed."""
        if job.handoff is not None:
            kv = await self._pull(job.handoff)
            if kv is not None:
                self.counts.pulls += 1
                return kv_of([0, *job.token_ids]) if self.faults.wrong_kv else kv
            self.counts.failed_pulls += 1
        if job.keeps_kv:
            self.counts.prefills += 1
        else:
            self.counts.local_prefills += 1
        await asyncio.sleep(self.prefill_s)
        return kv_of(job.token_ids, job.salt)

    async def _pull(self, handoff: str) -> str | None:
        try:
            where = json.loads(base64.b64decode(handoff))
            async with self._http.post(f"http://127.0.0.1:{where['port']}/fake/pull", json=where) as answer:
                kv: str | None = (await answer.json())["kv"]
                return kv
        except (aiohttp.ClientError, TimeoutError, binascii.Error, ValueError, LookupError):
            return None

    def _hand_over(self, job: _Job, kv: str, held: list[int]) -> dict[str, Any] | None:
        """Keep a finished prefill's blocks under a lease, unless it was released before it had finished."""
        transfer_id = job.transfer_id
        if self.faults.no_handoff or transfer_id in self._forbidden or job.num_tokens < self.block_size:
            return None
        timer = asyncio.get_running_loop().call_later(self.lease_s, self._drop, transfer_id)
        lease = _Lease(num_blocks=held.pop(), kv=kv, nonce=secrets.token_hex(16), timer=timer)
        self._leases[transfer_id] = lease
        where = {"port": self.port, "transfer_id": transfer_id, "nonce": lease.nonce}
        handoff = base64.b64encode(json.dumps(where).encode()).decode()
        params = {"handoff": handoff, "queue_s": 0.0, "run_s": self.prefill_s, "do_remote_prefill": True}
        return {**params, "remote_prefill_cached_tokens": self.num_cached_tokens}

    def _drop(self, transfer_id: str) -> bool:
        lease = self._leases.pop(transfer_id, None)
        if lease is None:
            return False
        lease.timer.cancel()
        self.free_blocks += lease.num_blocks
        return True

    async def _generate(self, request: web.Request, job: _Job, kv: str) -> AsyncIterator[str]:
        for number in range(job.max_tokens):
            await asyncio.sleep(self.token_s)
            self.counts.tokens += 1
            yield token_text(kv, number) + "." * self.padding
            if number + 1 == self.faults.die_after_tokens:
                self.die()
            if number + 1 == self.faults.cut_after_tokens and request.transport is not None:
                request.transport.abort()
                await asyncio.Event().wait()

    async def _answer_stream(self, request: web.Request, job: _Job, kv: str) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await stream.prepare(request)
        if self.faults.error_first is not None:
            await stream.write(_event(_error_body(self.faults.error_first, "as told by its faults")))
        else:
            async for token in self._generate(request, job, kv):
                await stream.write(_event(job.chunk(token)))
                await self._tell()
            await stream.write(_event(job.last_chunk()))
        await stream.write(b"data: [DONE]\n\n")
        return stream

    def _record(self, request: web.Request, raw: bytes) -> None:
        self.received.append(Received(path=request.path, headers=dict(request.headers), raw=raw))

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()


def token_ids_of(text: str) -> list[int]:
    """The fake tokenizer: one token per byte."""
    return list(text.encode("utf-8", "surrogatepass"))


def rendered(body: Mapping[str, Any]) -> str:
    """The fake chat template: every field that may change a prompt shows in it."""
    return json.dumps({name: body[name] for name in _PROMPT_FIELDS if body.get(name) is not None}, sort_keys=True)


def kv_of(token_ids: Sequence[int], salt: str = "") -> str:
    """The KV of a prompt."""
    return hashlib.blake2b(json.dumps([list(token_ids), salt]).encode(), digest_size=16).hexdigest()


def token_text(kv: str, position: int) -> str:
    """The token that follows `position` others after a prompt with this KV."""
    return " " + hashlib.blake2b(f"{kv}:{position}".encode(), digest_size=4).hexdigest()


def reference(prompt: str | Sequence[int] | Mapping[str, Any], num_tokens: int, *, salt: str = "") -> str:
    """The text that an undivided engine answers: to a prompt, its token ids, or a chat body."""
    if isinstance(prompt, Mapping):
        prompt = rendered(prompt)
    token_ids = token_ids_of(prompt) if isinstance(prompt, str) else prompt
    kv = kv_of(token_ids, salt)
    return "".join(token_text(kv, number) for number in range(num_tokens))


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A request for tokens, checked as vLLM would."""

    api: Literal["completions", "chat"]
    model: str
    token_ids: Sequence[int]
    salt: str
    max_tokens: int
    num_choices: int
    stream: bool
    return_token_ids: bool
    keeps_kv: bool
    transfer_id: str
    handoff: str | None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def read(cls, api: Literal["completions", "chat"], body: Any, model: str) -> _Job:
        params = body.get("kv_transfer_params") or {}
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        _check(body, params, max_tokens, model)
        return cls(
            api=api,
            model=model,
            token_ids=_prompt(api, body, params),
            salt=body.get("cache_salt") or "",
            max_tokens=max_tokens,
            num_choices=body.get("n") or 1,
            stream=bool(body.get("stream")),
            return_token_ids=bool(body.get("return_token_ids")),
            keeps_kv=bool(params.get("do_remote_decode")),
            transfer_id=params.get("transfer_id") or "",
            handoff=params["handoff"] if params.get("do_remote_prefill") else None,
        )

    def answer(self, tokens: Sequence[str], params: dict[str, Any] | None) -> dict[str, Any]:
        choices = [self._choice(i, "".join(tokens)) for i in range(self.num_choices)]
        ids = list(self.token_ids) if self.return_token_ids else None
        body = {**self._frame(""), "choices": choices, "kv_transfer_params": params, "usage": self._usage()}
        if self.api == "chat":
            return {**body, "prompt_token_ids": ids}
        for choice in choices:
            choice["prompt_token_ids"] = ids
        return body

    def chunk(self, token: str) -> dict[str, Any]:
        content: dict[str, Any] = {"text": token} if self.api == "completions" else {"delta": {"content": token}}
        return {**self._frame(".chunk"), "choices": [{"index": 0, **content, "finish_reason": None}]}

    def last_chunk(self) -> dict[str, Any]:
        """vLLM 0.33 puts the KV parameters here; a client must not see them."""
        content: dict[str, Any] = {"text": ""} if self.api == "completions" else {"delta": {}}
        choices = [{"index": 0, **content, "finish_reason": "length"}]
        return {**self._frame(".chunk"), "choices": choices, "kv_transfer_params": {"remote_host": "secret-host"}}

    def _frame(self, suffix: str) -> dict[str, Any]:
        kind = "text_completion" if self.api == "completions" else f"chat.completion{suffix}"
        return {"id": f"fake-{secrets.token_hex(8)}", "object": kind, "created": 0, "model": self.model}

    def _choice(self, index: int, text: str) -> dict[str, Any]:
        content = {"text": text} if self.api == "completions" else {"message": {"role": "assistant", "content": text}}
        return {"index": index, **content, "finish_reason": "length"}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_tokens,
            "completion_tokens": self.max_tokens,
            "total_tokens": self.num_tokens + self.max_tokens,
        }


def _check(body: Mapping[str, Any], params: Mapping[str, Any], max_tokens: int, model: str) -> None:
    if body.get("model") not in (None, model):
        raise _Refused(404, f"The model `{body['model']}` does not exist.")
    if body.get("stream_options") and not body.get("stream"):
        raise _Refused(400, "Stream options can only be defined when `stream=True`.")
    if (body.get("min_tokens") or 0) > max_tokens:
        raise _Refused(400, "min_tokens must be less than or equal to max_tokens")
    if body.get("temperature", 1) < 0:
        raise _Refused(400, "temperature must be non-negative")
    if params and (body.get("n") or 1) > 1:
        raise _Refused(400, "a request with KV parameters must have one choice")
    if params.get("do_remote_prefill") and not params.get("handoff"):
        raise _Refused(400, "do_remote_prefill needs a handoff")


def _prompt(api: str, body: Mapping[str, Any], params: Mapping[str, Any]) -> Sequence[int]:
    if api == "chat":
        if not body.get("messages"):
            raise _Refused(400, "messages must not be empty")
        ids = params.get("prompt_token_ids")
        return ids if ids is not None else token_ids_of(rendered(body))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several prompts only the first is answered: enough for a fake
    if not prompt:
        raise _Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.")
    return token_ids_of(prompt) if isinstance(prompt, str) else prompt


def _event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def _error(status: int, text: str) -> web.Response:
    return web.json_response(_error_body(status, text), status=status)


def _error_body(status: int, text: str) -> dict[str, Any]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"error": {"message": text, "type": kind, "param": None, "code": status}}
