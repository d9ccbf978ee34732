"""Clients that leave, dawdle or misbehave: nothing stays behind on the engines, and memory stays bounded."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import socket
from typing import Any

import pytest

from tests.contract.proxy_harness import PROMPT, Answer, Proxy, all_idle, one_and_one, proxy, until
from vllm_disagg.proxy import server
from vllm_disagg.testing.fake_engine import FakeEngine, reference

NEVER_S = 60.0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_during_prefill_frees_it(stream: bool) -> None:
    async with one_and_one() as (client, prefill, decode):
        prefill.prefill_s = NEVER_S
        request = asyncio.ensure_future(client.complete(stream=stream))
        await until("the prefill runs", lambda: prefill.running == 1)
        request.cancel()

        await until("it was told to release", lambda: prefill.counts.releases)
        await all_idle(prefill, decode)
        transfer_id = prefill.requests()[0].json["kv_transfer_params"]["transfer_id"]
        assert prefill.counts.releases == [transfer_id]
        assert prefill.counts.aborted == 1
        assert not decode.requests()
        assert client.total("client_disconnects_total", phase="prefill") == 1
        assert client.total("releases_total", result="not_held") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_decodes_first_event_frees_both(stream: bool) -> None:
    async with one_and_one() as (client, prefill, decode):
        decode.faults.hang = True  # it has the handoff and has not pulled
        request = asyncio.ensure_future(client.complete(stream=stream))
        await until("decode has the request", lambda: decode.requests())
        assert prefill.num_leases == 1
        request.cancel()

        await all_idle(prefill, decode)
        await until("the release is counted", lambda: client.total("releases_total", result="released") == 1)
        assert client.total("client_disconnects_total", phase="decode") == 1


async def test_a_client_that_leaves_mid_stream_aborts_decode() -> None:
    async with one_and_one() as (client, prefill, decode):
        decode.token_s = 0.01
        body = {"prompt": PROMPT, "max_tokens": 100_000, "stream": True}
        async with client.http.post(f"{client.url}/v1/completions", json=body) as answer:
            await answer.content.readuntil(b"\n\n")
            answer.close()

        await all_idle(prefill, decode)
        assert decode.counts.aborted == 1
        assert not prefill.counts.releases
        assert client.total("client_disconnects_total", phase="stream") == 1
        await until("nothing is outstanding", lambda: not any(i.num_tokens for i in client.services.pool.all))


async def test_a_client_that_leaves_a_local_request_without_stream_aborts_it() -> None:
    async with one_and_one() as (client, prefill, decode):
        decode.prefill_s = NEVER_S
        request = asyncio.ensure_future(client.complete(n=2))
        await until("it runs", lambda: decode.running == 1)
        request.cancel()

        await all_idle(prefill, decode)


async def test_a_hundred_clients_leave_at_random_moments() -> None:
    rng = random.Random(20)
    async with (
        FakeEngine("prefill", prefill_s=0.01) as p1,
        FakeEngine("prefill", prefill_s=0.01) as p2,
        FakeEngine("decode", token_s=0.002) as d1,
        FakeEngine("decode", token_s=0.002) as d2,
        proxy(p1, p2, d1, d2) as client,
    ):
        cut = await asyncio.gather(*(_leave_early(client, rng.uniform(0, 0.25), i) for i in range(100)))

        assert any(cut)
        assert (await client.complete()).text == reference(PROMPT, 8)  # accepted after all the others
        await until("nothing is in progress", lambda: client.total("requests_in_progress") == 0)
        await all_idle(p1, p2, d1, d2)
        await until("nothing is outstanding", lambda: not any(i.num_tokens for i in client.services.pool.all))


async def test_a_client_that_does_not_read_stops_decode_and_loses_nothing() -> None:
    async with one_and_one() as (client, prefill, decode):
        decode.padding, num_tokens = 64 * 1024, 2000  # far more than all socket buffers between them
        body = json.dumps({"prompt": PROMPT, "max_tokens": num_tokens, "stream": True}).encode()
        reader, writer = await _raw(client, body, limit=64 * 1024, receive_buffer=32 * 1024)
        await until("decode has begun", lambda: decode.counts.tokens > 0)
        stalled_at = await _standstill(decode)
        assert stalled_at < num_tokens / 2

        received = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        assert received.count(b'"finish_reason": null') == num_tokens
        assert b"data: [DONE]" in received
        await all_idle(prefill, decode)


async def test_a_client_that_never_reads_is_cut_off() -> None:
    async with one_and_one(idle_timeout_s=0.3) as (client, prefill, decode):
        decode.padding = 64 * 1024
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1000, "stream": True}).encode()
        _, writer = await _raw(client, body, limit=64 * 1024, receive_buffer=32 * 1024)
        await until("it is given up", lambda: client.total("client_disconnects_total", phase="stalled") == 1)

        await all_idle(prefill, decode)
        writer.transport.abort()


async def test_bodies_that_are_refused() -> None:
    bad: list[tuple[bytes, str]] = [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
        (b'{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "'1' appears twice"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": 1e999}', "too large"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "a", "stream": "yes"}', "'stream'"),
        (b"[" * 100_000, "nested"),
        (b'{"prompt": "a", "kv_transfer_params": null}', "'kv_transfer_params'"),
        (b'{"prompt": "a", "ec_transfer_params": {}}', "'ec_transfer_params'"),
        (b'{"prompt": "a", "request_id": "x"}', "'request_id'"),
        (b'{"prompt": "a", "vllm_xargs": {"kv_transfer_params": "x"}}', "vllm_xargs.'kv_transfer_params'"),
        (b'{"prompt": "a", "vllm_xargs": {"KV-Transfer_Params ": "x"}}', "reserved"),
        (b'{"prompt": "a", "vllm_xargs": {"a": {"b": 1}}}', "vllm_xargs['a']"),
        (b'{"prompt": "a", "vllm_xargs": [1]}', "'vllm_xargs' must be an object"),
        (b'{"prompt": "a", "extra_body": {"request_id": "x"}}', "extra_body.'request_id'"),
    ]
    async with one_and_one() as (client, prefill, decode):
        for body, says in bad:
            answer = await _post_raw(client, body)
            assert answer.status == 400, body
            assert says in answer.json["error"]["message"], body
        assert not prefill.requests()
        assert not decode.requests()
        labels = {"api": "completions", "route": "refuse", "reason": "bad_request"}
        await until("all are counted", lambda: client.total("requests_total", **labels) == len(bad))


async def test_errors_have_openais_form() -> None:
    async with one_and_one(max_body_bytes=1000, body_timeout_s=0.2) as (client, _, _):
        answers = {
            404: await client.get("/v1/embeddings"),
            405: await client.get("/v1/completions"),
            413: await client.complete("x" * 2000),
            415: await client.post("/v1/completions", b"{}", headers={"Content-Type": "text/plain"}),
            408: await _slow_body(client),
        }
        zipped = await client.post(
            "/v1/completions", gzip.compress(b"{}"),
            headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
        )  # fmt: skip
        assert zipped.status == 415
        for status, answer in answers.items():
            assert answer.status == status
            error = answer.json["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["code"] == status
        for path in ("/docs", "/openapi.json", "/disagg/status", "/v1/completions/", "/tokenize"):
            assert (await client.get(path)).status == 404


async def test_a_chunked_body_has_the_same_limit() -> None:
    async with one_and_one(max_body_bytes=1000) as (client, _, _):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b" " * 1024 + b"\r\n")
        assert (await reader.readline()).split()[1] == b"413"
        writer.close()


async def test_more_than_max_requests_are_refused() -> None:
    async with one_and_one(max_requests=2) as (client, prefill, _):
        prefill.prefill_s = NEVER_S
        requests = [asyncio.ensure_future(client.complete()) for _ in range(2)]
        await until("two are in progress", lambda: prefill.running == 2)
        answer = await client.complete()

        assert answer.status == 503
        assert "Retry-After" in answer.headers
        for request in requests:
            request.cancel()
        await until("there is room again", lambda: client.total("requests_in_progress") == 0)
        prefill.prefill_s = 0.0
        assert (await client.complete()).status == 200


async def test_a_client_that_leaves_before_its_body_has_arrived_reaches_no_engine() -> None:
    async with one_and_one() as (client, prefill, decode):
        _, writer = await _raw(client, b"{", length=100)
        await until("it is in progress", lambda: client.total("requests_in_progress") == 1)
        writer.transport.abort()

        await until("it is over", lambda: client.total("client_disconnects_total", phase="admit") == 1)
        assert not prefill.requests()
        assert not decode.requests()


async def test_a_smuggled_second_request_does_not_reach_an_engine() -> None:
    async with one_and_one() as (client, prefill, decode):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        both = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(head + both + b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answer.split()[1] == b"400"
        assert not prefill.requests()
        assert not decode.requests()


async def _leave_early(client: Proxy, after_s: float, number: int) -> bool:
    """Send a request and leave after a while, unless it has ended by then. Whether it was cut."""
    request = client.complete(f"{number}: {PROMPT}", max_tokens=40, stream=number % 2 == 0)
    try:
        answer = await asyncio.wait_for(request, after_s)
    except TimeoutError:
        return True
    assert answer.text == reference(f"{number}: {PROMPT}", 40)
    return False


async def _raw(
    client: Proxy, body: bytes, *, length: int | None = None, limit: int = 65536, receive_buffer: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", client.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return reader, writer


async def _standstill(engine: FakeEngine) -> int:
    """The number of tokens at which an engine has stopped: unchanged over half a second."""
    loop = asyncio.get_running_loop()
    last, since_s = engine.counts.tokens, loop.time()

    def still() -> bool:
        nonlocal last, since_s
        if engine.counts.tokens != last:
            last, since_s = engine.counts.tokens, loop.time()
        return loop.time() - since_s > 0.5

    await until("the engine stands still", still)
    return last


async def _post_raw(client: Proxy, body: bytes) -> Answer:
    return await client.post("/v1/completions", body, headers={"Content-Type": "application/json"})


async def _slow_body(client: Proxy) -> Any:
    async def dripping() -> Any:
        yield b"{"
        await asyncio.sleep(NEVER_S)

    return await client.post("/v1/completions", dripping(), headers={"Content-Type": "application/json"})


async def test_a_proxy_that_stops_releases_what_is_held() -> None:
    async with FakeEngine("prefill") as prefill, FakeEngine("decode") as decode:
        async with proxy(prefill, decode) as client:
            decode.faults.hang = True
            reader, writer = await _raw(client, json.dumps({"prompt": PROMPT}).encode())
            await until("decode has the request", lambda: decode.requests())
            assert prefill.num_leases == 1
            client.server.config.timeout_graceful_shutdown = 0.1  # type: ignore[assignment]
        assert prefill.num_leases == 0
        writer.close()
        await reader.read()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_a_shutdown_cuts_short_is_told_so(stream: bool) -> None:
    async with FakeEngine("prefill") as prefill, FakeEngine("decode") as decode:
        async with proxy(prefill, decode) as client:
            if stream:
                decode.token_s = 0.01
                decode.faults.cut_after_tokens = None
            else:
                decode.faults.hang = True
            body = {"prompt": PROMPT, "max_tokens": 2000, "stream": stream}
            reader, writer = await _raw(client, json.dumps(body).encode())
            await until("decode has the request", lambda: decode.requests())
            if stream:
                assert b"200" in await reader.readline()
            client.server.config.timeout_graceful_shutdown = 0.1  # type: ignore[assignment]
        raw = await reader.read()
        writer.close()
    if stream:
        assert b'"error"' in raw
        assert b"[DONE]" in raw
    else:
        assert raw.startswith(b"HTTP/1.1 503")
        assert b"shutting down" in raw


def test_the_kernel_is_told_to_end_connections_that_take_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server._cut_off_clients_that_do_not_read(listener, 1.5)

        with socket.create_connection(listener.getsockname()[:2]):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
