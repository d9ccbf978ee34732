"""Attacks on a control channel: frames that a peer with the key may send, and connections of those without it."""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.control_server import MAX_REQUEST_BYTES
from vllm_disagg.connector.messages import (
    Forbid,
    Hello,
    OpenProbe,
    Progress,
    ReadEnded,
    Release,
    Released,
    Renew,
    Welcome,
)
from vllm_disagg.connector.secure import CurveKeys, client_socket
from vllm_disagg.core.types import EngineId, TransferId, new_nonce, new_transfer_id

ZMTP_GREETING = b"\xff" + b"\x00" * 7 + b"\x01\x7f" + b"\x03"
"""How every ZMTP 3 greeting begins (23/ZMTP): signature and major version; 64 bytes in all."""

GREETING_BYTES = 64

Frames = list[bytes]


def valid_messages(rng: random.Random, engine_id: EngineId) -> list[Any]:
    """One of each kind that makes no sense here: transfers nobody holds, and words that others say."""
    transfer_id = TransferId(rng.randbytes(16).hex())
    return [
        Hello(version=rng.choice((0, 1, 2**31)), engine_id=engine_id, fingerprint={"model": "other"}),
        Hello(version=messages.PROTOCOL_VERSION, engine_id=EngineId("nobody"), fingerprint={}),
        Release(engine_id=engine_id, transfer_id=transfer_id, nonce="0" * 16),
        Release(engine_id=EngineId(""), transfer_id=TransferId(""), nonce=""),
        Renew(engine_id=engine_id, transfer_ids=(transfer_id, transfer_id, TransferId(""))),
        Renew(engine_id=engine_id, transfer_ids=()),
        Forbid(transfer_id=transfer_id),
        OpenProbe(engine_id=EngineId("nobody")),
        Released(transfer_id=transfer_id, ok=True),
        Welcome(engine_id=engine_id, ranks=()),
        Progress(active=False),
        ReadEnded(transfer_id=transfer_id, num_bytes=2**62, num_descriptors=0, seconds=float("inf")),
    ]


def hostile_frames(rng: random.Random, engine_id: EngineId) -> Iterator[Frames]:
    """Messages without end, of every kind that is malformed or out of place, each small enough to be delivered."""
    while True:
        valid = [messages.encode(message) for message in valid_messages(rng, engine_id)]
        frame = bytearray(rng.choice(valid))
        yield [rng.randbytes(rng.randrange(600))]
        yield [bytes(frame[: rng.randrange(len(frame))])]
        for _ in range(rng.randrange(1, 4)):
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        yield [bytes(frame)]
        yield [bytes(frame) + rng.randbytes(8)]
        yield [rng.choice(valid)]
        yield [messages.encode(rng.choice(_NESTED)(msgspec.msgpack.decode(rng.choice(valid))))]
        yield [rng.choice(_DECEPTIVE)]
        yield [b"\x91" * rng.randrange(1, 20_000)]  # an array in an array in an array
        yield [rng.choice(valid) for _ in range(rng.randrange(2, 5))]
        yield [rng.choice(valid), b""]


_NESTED: tuple[Callable[[list[Any]], Any], ...] = (
    lambda message: [message],
    lambda message: dict(enumerate(message)),
    lambda message: [*message, message],
    lambda message: [message[0], message[1:]],
    lambda message: [message[0], *([[item]] * 1 for item in message[1:])],
    lambda message: [*reversed(message)],
    lambda message: [message[0].lower(), *message[1:]],
    lambda message: message[1:],
    lambda message: [message[0], *[None] * len(message[1:])],
    lambda message: [message[0], *[2**63] * len(message[1:])],
)
_DECEPTIVE = (
    b"",
    b"\xdd\xff\xff\xff\xff",  # an array of 4 billion items
    b"\x93\xa5Renew\xa1e\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",  # a map of as many
    b"\x92\xa6Forbid\xdb\xff\xff\xff\xff",  # a string of 4 GiB
    b"\x92\xa6Forbid\xc4\x02\xff\xff",
    b"\x92\xa6Forbid\xa2\xff\xfe",  # not UTF-8
    b"\x92\xa6Forbid\xc0",
    b"\xc7\xff\x01",
    b"\xd4\x00\x00",
)


def is_malformed(frames: Frames) -> bool:
    """Whether prefill should count it as a bad frame."""
    return messages.decode_or_none(messages.to_prefill, frames) is None


@dataclass
class Fire:
    """What was sent by peers with the key."""

    num_frames: int = 0
    num_malformed: int = 0
    seconds: float = 0.0


def bombard(address: str, keys: CurveKeys, engine_id: EngineId, *, num_frames: int, seed: int, peers: int = 4) -> Fire:
    """Send hostile frames over some authenticated connections and wait until prefill has answered after the last."""
    rng, fire, begun_s = random.Random(seed), Fire(), time.monotonic()
    context: zmq.Context[Any] = zmq.Context()
    try:
        links = [client_socket(context, zmq.DEALER, keys) for _ in range(peers)]
        for link in links:
            link.connect(address)
        for index, frames in zip(range(num_frames), hostile_frames(rng, engine_id), strict=False):
            fire.num_frames += 1
            fire.num_malformed += is_malformed(frames)
            links[index % peers].send_multipart(frames)
        for link in links:
            last = new_transfer_id()
            link.send(messages.encode(Release(engine_id=engine_id, transfer_id=last, nonce=new_nonce())))
            answer = None
            while answer != Released(transfer_id=last, ok=False):
                assert link.poll(60_000), "prefill stopped answering"
                answer = messages.decode_or_none(messages.from_prefill, link.recv_multipart())
    finally:
        context.destroy(linger=0)
    fire.seconds = time.monotonic() - begun_s
    return fire


def send_oversized(address: str, keys: CurveKeys, *, count: int) -> None:
    """Send frames that are longer than any request, each on a connection of its own, and wait for it to be closed."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        for _ in range(count):
            link = client_socket(context, zmq.DEALER, keys)
            monitor = link.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            link.connect(address)
            link.send(b"\x00" * (MAX_REQUEST_BYTES + 1))
            assert monitor.poll(10_000), "an oversized frame did not end its connection"
            link.disable_monitor()
            monitor.close()
            link.close()
    finally:
        context.destroy(linger=0)


def greeted_in(address: str, keys: CurveKeys, hello: Hello, *, limit_s: float = 30.0) -> float:
    """Seconds from opening a connection to the answer to a `Hello`."""
    context: zmq.Context[Any] = zmq.Context()
    try:
        begun_s = time.monotonic()
        link = client_socket(context, zmq.DEALER, keys)
        link.connect(address)
        link.send(messages.encode(hello))
        assert link.poll(int(limit_s * 1000)), "no answer to a greeting"
        answer = messages.decode_or_none(messages.from_prefill, link.recv_multipart())
        assert isinstance(answer, Welcome), answer
        return time.monotonic() - begun_s
    finally:
        context.destroy(linger=0)


@dataclass
class Strangers:
    """Connections of peers without the key, and what they were told."""

    sockets: list[socket.socket] = field(default_factory=list)
    heard: dict[int, bytes] = field(default_factory=dict)
    answers: list[list[bytes]] = field(default_factory=list)

    def listen(self, seconds: float) -> None:
        """Collect what the server says to raw connections."""
        open_ones = {each.fileno(): each for each in self.sockets if each.fileno() >= 0}
        poller = select.poll()
        for number in open_ones:
            poller.register(number, select.POLLIN)
        end_s = time.monotonic() + seconds
        while open_ones and (left_s := end_s - time.monotonic()) > 0:
            for number, _ in poller.poll(left_s * 1000):
                data = b""
                with suppress(OSError):
                    data = open_ones[number].recv(65536)
                self.heard[number] = self.heard.get(number, b"") + data
                if not data:
                    poller.unregister(number)
                    del open_ones[number]


def _greeting(mechanism: bytes, *, as_server: bool = False) -> bytes:
    return ZMTP_GREETING + b"\x01" + mechanism.ljust(20, b"\x00") + bytes([as_server]) + b"\x00" * 31


def _command(body: bytes) -> bytes:
    return b"\x06" + struct.pack(">Q", len(body)) + body


_CURVE_HELLO = b"\x05HELLO\x01\x00" + b"\x00" * 72
OPENINGS: tuple[bytes, ...] = (
    b"",
    b"\xff",
    _greeting(b"CURVE")[:40],
    _greeting(b"NULL"),
    _greeting(b"NULL") + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER",
    _greeting(b"PLAIN") + b"\x04\x0a\x05HELLO\x01a\x01b",
    _greeting(b"CURVE"),
    _greeting(b"CURVE") + b"\x04\xc8" + _CURVE_HELLO + b"\x01" * 120,
    _greeting(b"CURVE") + _command(_CURVE_HELLO + b"\x07" * 10_000),
    _greeting(b"CURVE") + b"\x06" + struct.pack(">Q", 2**62),
    _greeting(b"CURVE") + b"\x02" + struct.pack(">Q", 15 * 1024 * 1024),
    _greeting(b"CURVE", as_server=True) + b"\x04\xa8\x07WELCOME" + b"\x00" * 160,
    b"\x01\x00",  # ZMTP 1.0, which knows no security
    b"\x01\x00\x00\x05hello",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
)
"""What a stranger may begin with, silence first."""


@contextmanager
def strangers(address: str, wrong: CurveKeys, *, num_sockets: int, num_zmq: int) -> Iterator[Strangers]:
    """Open connections that never authenticate and stay open: raw ones with each of `OPENINGS`, half of them silent,
    and ZeroMQ's own without a key and with a wrong one, which keep trying."""
    where = urlsplit(address)
    crowd = Strangers()
    context: zmq.Context[Any] = zmq.Context()
    clients: list[zmq.Socket[Any]] = []
    try:
        for index in range(num_sockets):
            link = socket.create_connection((where.hostname or "", where.port or 0), timeout=10)
            opening = b"" if index % 2 else OPENINGS[index // 2 % len(OPENINGS)]
            with suppress(OSError):
                link.sendall(opening)
            link.setblocking(False)
            crowd.sockets.append(link)
        for index in range(num_zmq):
            client = client_socket(context, zmq.DEALER, wrong) if index % 2 else context.socket(zmq.DEALER)
            client.connect(address)
            with suppress(zmq.Again):
                client.send(messages.encode(Forbid(transfer_id=new_transfer_id())), zmq.NOBLOCK)
            clients.append(client)
        yield crowd
        crowd.answers = [client.recv_multipart() for client in clients if client.poll(0)]
    finally:
        for link in crowd.sockets:
            link.close()
        context.destroy(linger=0)
