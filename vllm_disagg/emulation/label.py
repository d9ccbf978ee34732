"""ASGI middleware that marks every answer of an emulated engine as one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_disagg.config import EMULATED_HEADER
from vllm_disagg.emulation.settings import EmulationSettings, label_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class EmulationLabel:
    """Loaded by vLLM's `--middleware`, by its import path."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the header to every response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings = EmulationSettings.from_config(scope["app"].state.vllm_config.additional_config)
        label = "emulated" if settings is None else label_of(settings)

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (EMULATED_HEADER.encode(), label.encode("ascii", "replace")),
                ]
            await send(message)

        await self._app(scope, receive, labelled)
