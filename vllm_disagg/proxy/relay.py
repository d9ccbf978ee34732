"""Answers on their way to the client: whole ones, and streams of server-sent events."""

from __future__ import annotations

import json
from typing import Any, Final

from vllm_disagg.proxy.upstream import LegFailed, Upstream

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""A single event that is larger ends the stream; log-probabilities of a whole vocabulary fit."""

_HIDDEN: Final = ("kv_transfer_params", "ec_transfer_params")
_TRACE: Final = b"_transfer_params"
_END: Final = b"\n\n"
_DONE: Final = b"data: [DONE]"
_DATA: Final = b"data:"


def strip_answer(raw: bytes) -> bytes:
    """A whole JSON answer without what is no business of clients.

    Raises:
        LegFailed: it is not a JSON object.
    """
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LegFailed("bad_answer") from error
    if not isinstance(answer, dict):
        raise LegFailed("bad_answer")
    return _dump(answer) if _strip(answer) else raw


class Events:
    """The events of one streamed answer, in blocks of whole events as the network brings them.

    A stream that breaks therefore never leaves half an event with the client.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._rest = bytearray()
        self._done = False

    async def first(self, *, deadline_s: float) -> bytes:
        """The block that holds the first event with data. Comments before it are dropped.

        Raises:
            LegFailed: the stream failed or ended before it, or it is a server error.
        """
        while block := await self.next(deadline_s=deadline_s):
            for event in block.split(_END):
                if event.startswith(_DATA):
                    if _is_server_error(event):
                        raise LegFailed("error_event")
                    return block
        raise LegFailed("bad_answer")

    async def next(self, *, deadline_s: float) -> bytes:
        """The next block; empty when the stream has ended as it should.

        Raises:
            LegFailed: the stream broke, or ended without `[DONE]`.
        """
        while True:
            data = await self._upstream.read_some(deadline_s=deadline_s)
            if not data:
                if not self._done:
                    raise LegFailed("disconnect")
                return b""
            if (block := self._whole_events(data)) is not None:
                return block

    def _whole_events(self, data: bytes) -> bytes | None:
        if not self._rest and data.endswith(_END):  # what vLLM sends nearly always
            return self._passed(data)
        self._rest += data
        end = self._rest.rfind(_END) + len(_END)
        if end < len(_END):
            if len(self._rest) > MAX_EVENT_BYTES:
                raise LegFailed("bad_answer")
            return None
        block = bytes(self._rest[:end])
        del self._rest[:end]
        return self._passed(block)

    def _passed(self, block: bytes) -> bytes:
        self._done = self._done or block.rstrip().endswith(_DONE)
        if _TRACE not in block:
            return block
        return b"".join(_strip_event(event) + _END for event in block.split(_END)[:-1])


def _strip_event(event: bytes) -> bytes:
    if _TRACE not in event or not event.startswith(_DATA):
        return event
    try:
        payload = json.loads(event[len(_DATA) :])
    except ValueError as error:
        raise LegFailed("bad_answer") from error
    if isinstance(payload, dict) and _strip(payload):
        return b"data: " + _dump(payload)
    return event


def _strip(answer: dict[str, Any]) -> bool:
    """Remove what is hidden from clients; whether there was any of it."""
    found = [name for name in _HIDDEN if name in answer]
    for name in found:
        del answer[name]
    return bool(found)


def _dump(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode("ascii")


def _is_server_error(event: bytes) -> bool:
    """Whether a stream begins with an error that another engine might not have. One that is the request's own fault
    is an answer like any other."""
    if b'"error"' not in event:
        return False
    try:
        payload = json.loads(event[len(_DATA) :])
    except ValueError:
        return False
    error = payload.get("error") if isinstance(payload, dict) else None
    if not isinstance(error, dict):
        return False
    code = error.get("code")
    return not isinstance(code, int) or code >= 500
