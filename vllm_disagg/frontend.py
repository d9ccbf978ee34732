"""Routes on the API server of an engine with a role, all but the last one for the proxy:

    GET  /disagg/status      the role and the fingerprint of this engine
    GET  /disagg/introduce   a challenge to be answered by a prefill instance (decode instances)
    POST /disagg/introduce   {"challenge": ...}: this prefill instance's introduction, which answers it; or
                             {"introduction": ...}: this decode instance connects to that prefill instance
    POST /disagg/release     {"transfer_id": ...}: the client has left, let its KV go (prefill instances)
    POST /disagg/probe       a signed order of `vllm-disagg doctor`: say who you are, or probe a prefill instance

A transfer id is 128 random bits that only the proxy and the two engines know; whoever names one may release it. Orders,
challenges and introductions are signed with the deployment key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from vllm_disagg.config import EngineSettings
from vllm_disagg.connector import messages
from vllm_disagg.connector.door import INTRODUCE_TIMEOUT_S, PROBE_TIMEOUT_S, Errand, door_address
from vllm_disagg.connector.engine_fingerprint import config_fingerprint
from vllm_disagg.connector.messages import Forbid, Released
from vllm_disagg.connector.secure import client_socket, curve_keys
from vllm_disagg.core.fingerprint import digest_of
from vllm_disagg.core.host import host_facts
from vllm_disagg.core.introduction import INTRODUCE_PATH, IntroductionRefused, answer_challenge, make_challenge
from vllm_disagg.core.keys import load_key
from vllm_disagg.core.probe import PROBE_PATH, Identity, OrderRefused, check_order
from vllm_disagg.core.types import EngineId, TransferId, is_transfer_id
from vllm_disagg.transport import choose_transport

STATUS_PATH, RELEASE_PATH = "/disagg/status", "/disagg/release"
RELEASE_TIMEOUT_S = 2.0
_MAX_BODY_BYTES = 4096

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class DisaggFrontend:
    """ASGI middleware that vLLM's `--middleware` loads by its import path."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._fingerprint: dict[str, str] | None = None
        self._context: zmq.asyncio.Context | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer our routes, pass everything else on."""
        route = (scope.get("method"), scope.get("path")) if scope["type"] == "http" else None
        if route == ("GET", STATUS_PATH):
            await _reply(send, 200, await self._status(scope))
        elif route == ("GET", INTRODUCE_PATH):
            await _reply(send, *self._challenge(scope))
        elif route == ("POST", INTRODUCE_PATH):
            await _reply(send, *await self._introduce(scope, receive))
        elif route == ("POST", PROBE_PATH):
            await _reply(send, *await self._probe(scope, receive))
        elif route == ("POST", RELEASE_PATH):
            await _reply(send, *await self._release(scope, receive))
        else:
            await self._app(scope, receive, send)

    async def _status(self, scope: Scope) -> dict[str, Any]:
        vllm_config = scope["app"].state.vllm_config
        return {"role": _settings(vllm_config).role, "fingerprint": await self._factors(scope)}

    async def _factors(self, scope: Scope) -> dict[str, str]:
        if self._fingerprint is None:
            factors = await asyncio.to_thread(config_fingerprint, scope["app"].state.vllm_config)
            self._fingerprint = {**factors, "chat rendering": _rendering(scope["app"].state)}
        return self._fingerprint

    async def _probe(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, Any]]:
        vllm_config = scope["app"].state.vllm_config
        settings, engine_id = _settings(vllm_config), EngineId(vllm_config.kv_transfer_config.engine_id)
        key = load_key(settings.key_file)
        raw = await _body(receive)
        try:
            order = check_order(raw, key)
        except OrderRefused as refusal:
            return (409 if refusal.signed else 403), {"error": str(refusal)}
        if order.task == "identify":
            identity = Identity(
                role=settings.role,
                engine_id=engine_id,
                control=_control(settings) if settings.role == "prefill" else "",
                transport=choose_transport(settings.transport)[0],
                fingerprint=await self._factors(scope),
                facts=host_facts(),
            )
            return 200, msgspec.to_builtins(identity)
        if settings.role != "decode":
            return 409, {"error": "only a decode instance probes others"}
        try:
            return 200, await asyncio.wait_for(self._through_door(engine_id, b"probe", raw, key), PROBE_TIMEOUT_S)
        except (TimeoutError, msgspec.DecodeError):
            return 504, {"error": "the engine did not answer"}

    def _challenge(self, scope: Scope) -> tuple[int, dict[str, Any]]:
        vllm_config = scope["app"].state.vllm_config
        settings, engine_id = _settings(vllm_config), EngineId(vllm_config.kv_transfer_config.engine_id)
        if settings.role != "decode":
            return 409, {"error": "only a decode instance is introduced to others"}
        challenge = make_challenge(engine_id, load_key(settings.key_file), now_s=time.monotonic())
        return 200, {"challenge": challenge}

    async def _introduce(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, Any]]:
        vllm_config = scope["app"].state.vllm_config
        settings, engine_id = _settings(vllm_config), EngineId(vllm_config.kv_transfer_config.engine_id)
        wanted = "challenge" if settings.role == "prefill" else "introduction"
        text, key = _text_field(await _body(receive), wanted), load_key(settings.key_file)
        if text is None:
            return 400, {"error": f'expected {{"{wanted}": "..."}} of a {settings.role} instance'}
        if settings.role == "prefill":
            try:
                answer = answer_challenge(text, engine_id=engine_id, control=_control(settings), key=key)
            except IntroductionRefused as refusal:
                return 403, {"error": str(refusal)}
            return 200, {"introduction": answer}
        raw = text.encode(errors="replace")
        try:
            told = await asyncio.wait_for(self._through_door(engine_id, b"introduce", raw, key), INTRODUCE_TIMEOUT_S)
        except (TimeoutError, msgspec.DecodeError):
            return 504, {"error": "the engine did not answer"}
        return (200 if told.get("outcome") == "taken" else 403), told

    async def _through_door(self, engine_id: EngineId, errand: Errand, raw: bytes, key: bytes) -> dict[str, Any]:
        """Hand something to this instance's engine, and wait for its answer."""
        with client_socket(self._sockets(), zmq.DEALER, curve_keys(key)) as link:
            link.connect(door_address(engine_id))
            await link.send_multipart([errand, raw])
            report: dict[str, Any] = msgspec.json.decode(await link.recv())
        return report

    def _sockets(self) -> zmq.asyncio.Context:
        if self._context is None:
            self._context = zmq.asyncio.Context()
        return self._context

    async def _release(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, Any]]:
        settings = _settings(scope["app"].state.vllm_config)
        transfer_id = _transfer_id(await _body(receive))
        if transfer_id is None:
            return 400, {"error": 'expected {"transfer_id": "<32 hex digits>"}'}
        if settings.role != "prefill":
            return 200, {"released": False}
        try:
            released = await asyncio.wait_for(self._forbid(settings, transfer_id), RELEASE_TIMEOUT_S)
        except TimeoutError:
            return 504, {"error": "the engine did not answer"}
        return 200, {"released": released}

    async def _forbid(self, settings: EngineSettings, transfer_id: TransferId) -> bool:
        """Ask this instance's own control channel, as any engine of the deployment may."""
        with client_socket(self._sockets(), zmq.DEALER, curve_keys(load_key(settings.key_file))) as link:
            link.connect(_control(settings))
            await link.send(messages.encode(Forbid(transfer_id=transfer_id)))
            answer = messages.decode_or_none(messages.from_prefill, await link.recv_multipart())
        return isinstance(answer, Released) and answer.ok


_RENDERING_ARGS = (
    "chat_template", "chat_template_content_format", "default_chat_template_kwargs",
    "exclude_tools_when_tool_choice_none", "trust_request_chat_template", "tool_call_parser", "reasoning_parser",
)  # fmt: skip
"""Arguments of the API server that decide which tokens a chat becomes. Decode takes prefill's tokens, so both must
render alike, or the same chat would mean something else when it is served locally."""


def _rendering(state: Any) -> str:
    args = getattr(state, "args", None)
    values = {name: str(getattr(args, name, None)) for name in _RENDERING_ARGS}
    template = Path(values["chat_template"])
    if len(values["chat_template"]) < 1024 and template.is_file():  # the same template may lie elsewhere there
        values["chat_template"] = template.read_text(errors="replace")
    return digest_of(values)


def _settings(vllm_config: Any) -> EngineSettings:
    return EngineSettings.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)


def _control(settings: EngineSettings) -> str:
    return f"tcp://{settings.control_host}:{settings.control_port}"


def _transfer_id(body: bytes) -> TransferId | None:
    transfer_id = _text_field(body, "transfer_id")
    return transfer_id if is_transfer_id(transfer_id) else None


def _text_field(body: bytes, name: str) -> str | None:
    """One field of a body that is an object of texts; None for anything else."""
    try:
        return msgspec.json.decode(body, type=dict[str, str]).get(name)
    except msgspec.DecodeError:
        return None


async def _body(receive: Receive) -> bytes:
    """The request's body, or nothing if it is longer than any we accept."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += message.get("body", b"")
        if len(body) > _MAX_BODY_BYTES:
            return b""
        more = message.get("more_body", False)
    return body


async def _reply(send: Send, status: int, content: dict[str, Any]) -> None:
    body = msgspec.json.encode(content)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
