"""Streams are cut into whole events, whatever pieces the network brings."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.proxy.relay import Events, strip_answer
from vllm_disagg.proxy.upstream import LegFailed

EVENTS = [
    b": ping",
    b'data: {"choices":[{"text":"a_transfer_params"}]}',
    b'data: {"choices":[], "kv_transfer_params": {"remote_host": "secret"}}',
    b'data: {"id": 1}',
    b"data: [DONE]",
]
WHOLE = b"".join(event + b"\n\n" for event in EVENTS)


class Pieces:
    """The reading side of an upstream exchange, from given pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    async def read_some(self, *, deadline_s: float) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def events_of(*pieces: bytes) -> Events:
    return Events(Pieces(*pieces))  # type: ignore[arg-type]


async def everything(events: Events) -> list[bytes]:
    blocks = []
    while block := await events.next(deadline_s=0.0):
        blocks.append(block)
    return blocks


@given(cuts=st.lists(st.integers(0, len(WHOLE)), max_size=8))
async def test_any_cut_gives_whole_events_without_what_is_hidden(cuts: list[int]) -> None:
    places = [0, *sorted(set(cuts) - {0, len(WHOLE)}), len(WHOLE)]
    pieces = [WHOLE[a:b] for a, b in pairwise(places)]

    blocks = await everything(events_of(*pieces))

    assert all(block.endswith(b"\n\n") for block in blocks)
    expected = [*EVENTS]
    expected[2] = b'data: {"choices":[]}'
    assert b"".join(blocks) == b"".join(event + b"\n\n" for event in expected)


async def test_ordinary_events_pass_byte_for_byte() -> None:
    odd = b'data: {"a":   1.10, "b": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
    assert await everything(events_of(odd)) == [odd]


async def test_a_stream_without_its_end_has_failed() -> None:
    with pytest.raises(LegFailed) as caught:
        await everything(events_of(b'data: {"a": 1}\n\n', b'data: {"half'))
    assert caught.value.cause == "disconnect"


@pytest.mark.parametrize("code", [500, 503, None])
async def test_a_server_error_first_is_a_failed_leg(code: int | None) -> None:
    event = b": ping\n\ndata: " + json.dumps({"error": {"code": code}}).encode() + b"\n\n"
    with pytest.raises(LegFailed) as caught:
        await events_of(event).first(deadline_s=0.0)
    assert caught.value.cause == "error_event"


async def test_a_request_error_first_is_an_answer() -> None:
    event = b'data: {"error": {"code": 400}}\n\n'
    assert await events_of(event).first(deadline_s=0.0) == event


async def test_comments_do_not_count_as_the_first_event() -> None:
    assert await events_of(b": ping\n\n", b'data: {"a": 1}\n\n').first(deadline_s=0.0) == b'data: {"a": 1}\n\n'


def test_whole_answers_are_stripped() -> None:
    assert strip_answer(b'{"a": 1.0, "kv_transfer_params": null, "ec_transfer_params": {"x": 1}}') == b'{"a":1.0}'
    assert strip_answer(b'{"a":   1}') == b'{"a":   1}'


@pytest.mark.parametrize("raw", [b"", b"[]", b"<html>"])
def test_answers_that_are_no_answers(raw: bytes) -> None:
    with pytest.raises(LegFailed):
        strip_answer(raw)
