"""What the `nccl` transport promises beyond the contract: no stranger gets in, and nobody waits for a stuck peer."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

import numpy as np
import psutil
import zmq

from vllm_disagg.errors import ConfigError, TransportError
from vllm_disagg.testing.check_transport import Memory, Rig, finish, rig, run_until, whole
from vllm_disagg.transport import nccl, nccl_owner, nccl_reader, nccl_wire, open_transport
from vllm_disagg.transport.base import Copy
from vllm_disagg.transport.nccl_wire import Bye, Open, Opened, Put, Want, Wire

WAIT_MS = 10_000


@pytest.fixture
def made() -> Iterator[Rig]:
    with rig(lambda name: open_transport("nccl", name)) as opened:
        yield opened


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give stuck connections up after half a second."""
    for module in (nccl_owner, nccl_reader):
        monkeypatch.setattr(module, "STALL_S", 0.5)
    monkeypatch.setattr(nccl_wire, "LIBRARY_S", 0.5)


class Channel:
    """One end of an authenticated channel, in memory."""

    def __init__(self, mine: queue.Queue[tuple[str, bytes]], other: queue.Queue[tuple[str, bytes]]) -> None:
        self._mine, self._other = mine, other
        self._heard: dict[str, bytes] = {}

    def put(self, key: str, value: bytes) -> None:
        self._other.put((key, value))

    def wait(self, key: str) -> bytes:
        while key not in self._heard:
            name, value = self._mine.get(timeout=5)
            self._heard[name] = value
        return self._heard[key]


class Visitor:
    """Somebody who speaks to an owner's listener by hand."""

    def __init__(self, descriptor: bytes, *, with_key: bool = True) -> None:
        self.offer = nccl._decoder.decode(descriptor)
        self._told: dict[str, bytes] = {}
        public, secret = zmq.curve_keypair()
        self._context: zmq.Context[Any] = zmq.Context()
        self.socket = nccl_wire.secured(self._context.socket(zmq.DEALER))
        self.socket.curve_serverkey = self.offer.server_key
        self.socket.curve_publickey = self.offer.reader_public if with_key else public
        self.socket.curve_secretkey = self.offer.reader_secret if with_key else secret
        self.socket.connect(f"tcp://{self.offer.host}:{self.offer.port}")

    def say(self, frame: object) -> None:
        self.socket.send(frame if isinstance(frame, bytes) else nccl_wire.encode(frame))

    def hear(self, kind: type) -> Any:
        while True:
            assert self.socket.poll(WAIT_MS), f"no {kind.__name__}"
            frame = nccl_wire.to_reader.decode(self.socket.recv())
            if isinstance(frame, kind):
                return frame

    def open(self) -> Wire:
        """Become a reader in good standing."""
        proof = nccl_wire.new_proof()
        self.say(Open(version=nccl_owner.VERSION, proof=proof))
        opened = self.hear(Opened)
        return Wire(memory="DRAM", device_id=0, rank=1, address="127.0.0.1", channel=self, proofs=(proof, opened.proof))

    def put(self, key: str, value: bytes) -> None:
        self.say(Put(key=key, value=value))

    def wait(self, key: str) -> bytes:
        while key not in self._told:
            heard = self.hear(Put)
            self._told[heard.key] = heard.value
        return self._told[key]

    def want(self, address: int, length: int) -> None:
        columns = (np.array([value], np.uint64).tobytes() for value in (address, length))
        self.say(Want(number=1, addresses=next(columns), lengths=next(columns)))

    def close(self) -> None:
        self._context.destroy(linger=0)


def test_a_visitor_without_the_descriptors_key_is_not_answered(made: Rig) -> None:
    owner = made.agent(Memory(4096))
    stranger = Visitor(owner.descriptor, with_key=False)
    try:
        stranger.say(Open(version=nccl_owner.VERSION, proof=b"x" * 32))

        assert stranger.socket.poll(300) == 0
    finally:
        stranger.close()


@pytest.mark.parametrize("beyond", [(-1, 10), (4090, 10), (0, 0), (0, nccl_wire.CHUNK_BYTES + 1), (2**63, 8)])
def test_a_reader_that_asks_for_other_memory_gets_nothing_and_is_dropped(made: Rig, beyond: tuple[int, int]) -> None:
    reader, owner, peer = made.pair(4096)
    visitor = Visitor(owner.descriptor)
    try:
        wire = visitor.open()
        visitor.want((owner.memory.address + beyond[0]) % 2**64, beyond[1])

        assert "not in our own regions" in (reason := visitor.hear(Bye).reason) or "request" in reason
        wire.close()
    finally:
        visitor.close()
    reader.transport.read(peer, whole(reader, owner))
    assert [outcome.state for outcome in finish(reader.transport)] == ["done"]


def test_malformed_frames_change_nothing_for_others(made: Rig) -> None:
    reader, owner, peer = made.pair(4096)
    visitor = Visitor(owner.descriptor)
    try:
        odd: list[object] = [
            b"",
            b"\xff" * 100,
            ["Open", 1],
            {"a": 1},
            Bye(reason="never here"),
            Put(key="k", value=b"v"),
        ]
        for frame in odd:
            visitor.say(frame if isinstance(frame, (bytes, msgspec.Struct)) else msgspec.msgpack.encode(frame))
        for size in range(1, 200):
            visitor.say(os.urandom(size))
        visitor.say(Open(version=99, proof=b""))

        assert "version" in visitor.hear(Bye).reason
    finally:
        visitor.close()
    reader.transport.read(peer, whole(reader, owner))
    assert [outcome.state for outcome in finish(reader.transport)] == ["done"]


def test_a_connection_is_given_up_unless_both_ends_of_the_channel_are_its_ends() -> None:
    one, two = queue.Queue[tuple[str, bytes]](), queue.Queue[tuple[str, bytes]]()
    results: list[object] = []

    def make(rank: int, channel: Channel, expected: bytes) -> None:
        try:
            proofs = (b"a" * 32 if rank == 0 else b"b" * 32, expected)
            wire = Wire(memory="DRAM", device_id=0, rank=rank, address="127.0.0.1", channel=channel, proofs=proofs)
            wire.close()
            results.append(rank)
        except TransportError as error:
            results.append(str(error))

    ends = [
        threading.Thread(target=make, args=(0, Channel(one, two), b"c" * 32)),  # expects a third one
        threading.Thread(target=make, args=(1, Channel(two, one), b"a" * 32)),
    ]
    for end in ends:
        end.start()
    for end in ends:
        end.join()

    assert "somebody else has answered at the peer's address" in results


@pytest.mark.usefixtures("hasty")
def test_an_owner_that_stands_still_is_given_up_and_read_again_later(made: Rig) -> None:
    reader, owner, peer = made.pair()
    reader.transport.read(peer, whole(reader, owner))
    assert [outcome.state for outcome in finish(reader.transport)] == ["done"]
    reader.memory.data.fill(0)
    assert isinstance(owner.transport, nccl.NcclTransport) and owner.transport._owner is not None

    with owner.transport._owner.memory_lock:  # as if its serving thread did not get on
        reader.transport.read(peer, whole(reader, owner))
        (stuck,) = finish(reader.transport)

    assert stuck.state == "failed"
    assert "has not answered within" in stuck.error
    assert not reader.memory.data.any()
    reader.transport.read(peer, whole(reader, owner))
    assert [outcome.state for outcome in finish(reader.transport)] == ["done"]
    assert (reader.memory.data == owner.memory.data).all()


@pytest.mark.usefixtures("hasty")
def test_a_reader_that_takes_nothing_is_dropped_and_holds_up_nobody(made: Rig) -> None:
    size = 64 << 20
    owner = made.agent(Memory(size, seed=5))
    lazy = Visitor(owner.descriptor)
    try:
        wire = lazy.open()
        for at in range(0, size, nccl_wire.CHUNK_BYTES):
            lazy.want(owner.memory.address + at, nccl_wire.CHUNK_BYTES)  # and never receives
        reader = made.agent(Memory(1 << 20))
        peer = reader.transport.connect(owner.descriptor)
        reader.transport.read(peer, [Copy(reader.memory.address, owner.memory.address, 1 << 20)])

        assert [outcome.state for outcome in finish(reader.transport)] == ["done"]
        assert "did not pass" in lazy.hear(Bye).reason
        wire.close()
    finally:
        lazy.close()


READING = """
import os
import signal
import sys

from vllm_disagg.testing.check_transport import finish, rig, run_until, states, whole
from vllm_disagg.transport import nccl_owner, nccl_reader, open_transport

nccl_owner.STALL_S = nccl_reader.STALL_S = 0.5
for moment in sys.argv[1:]:

    def stand_still_if(now):
        if moment == now:
            os.kill(os.getpid(), signal.SIGSTOP)

    with rig(lambda name: open_transport("nccl", name)) as made:
        reader, owner, peer = made.pair(64 << 20)
        reader.transport.read(peer, whole(reader, owner))
        stand_still_if("connecting")
        seen = run_until(lambda: bool(reader.memory.data.any()), reader.transport)
        stand_still_if("begun")
        run_until(lambda: bool(reader.memory.data[32 << 20 :].any()), reader.transport, outcomes=seen)
        stand_still_if("half")
        assert states(seen + finish(reader.transport)) == ["done"]
        stand_still_if("read")
        reader.transport.read(peer, whole(reader, owner))
        stand_still_if("reading again")
        assert states(finish(reader.transport)) == ["done"]
"""


def test_a_host_that_stands_still_blames_no_peer() -> None:
    """Both ends connect and read in a process that is stopped for longer than either waits."""
    moments = ("connecting", "begun", "half", "read", "reading again")
    with subprocess.Popen([sys.executable, "-c", READING, *moments]) as process:
        try:
            for _ in moments:
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
                time.sleep(0.7)  # longer than the 0.5 s after which a peer would be blamed
                process.send_signal(signal.SIGCONT)

            assert process.wait(60) == 0
        finally:
            process.kill()


def test_an_owner_that_has_closed_serves_nobody_who_was_connected(made: Rig) -> None:
    reader, owner, peer = made.pair()
    reader.transport.read(peer, whole(reader, owner))
    finish(reader.transport)
    reader.memory.data.fill(0)
    owner.transport.close()

    reader.transport.read(peer, whole(reader, owner))
    (outcome,) = finish(reader.transport)

    assert outcome.state == "failed"
    assert not reader.memory.data.any()


def test_strangers_at_the_data_ports_hear_nothing_and_disturb_nobody(made: Rig) -> None:
    before = listening_ports()
    reader, owner, peer = made.pair(16 << 20)
    reader.transport.read(peer, whole(reader, owner))
    finish(reader.transport)
    reader.memory.data.fill(0)
    strangers = []
    for port in listening_ports() - before:
        for number in range(4):
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.sendall(number.to_bytes(8, "little") + os.urandom(4096))  # gloo's hello is the number of a pair
            strangers.append(stranger)
    assert strangers

    reader.transport.read(peer, whole(reader, owner))
    (outcome,) = finish(reader.transport)

    assert outcome.state == "done"
    assert (reader.memory.data == owner.memory.data).all()
    for stranger in strangers:
        stranger.settimeout(0.05)
        try:
            heard = stranger.recv(1 << 16)
        except (TimeoutError, ConnectionError):
            heard = b""
        assert len(heard) <= 64  # a ZeroMQ greeting at most
        stranger.close()


def listening_ports() -> set[int]:
    connections = psutil.Process().net_connections("tcp")
    return {item.laddr.port for item in connections if item.status == psutil.CONN_LISTEN}


def test_a_reader_that_leaves_takes_its_thread_at_the_owner_with_it(made: Rig) -> None:
    reader, owner, peer = made.pair()
    reader.transport.read(peer, whole(reader, owner))
    finish(reader.transport)
    reader.transport.disconnect(peer)

    run_until(lambda: not any("disagg-nccl-serve" in thread.name for thread in threading.enumerate()))


def test_gpu_memory_needs_a_torch_with_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)

    with pytest.raises(ConfigError, match="NCCL"):
        open_transport("nccl", "x", memory="VRAM")


def test_a_peer_with_another_kind_of_memory_is_refused(made: Rig) -> None:
    reader, owner = made.agent(Memory(4096)), made.agent(Memory(4096))
    offer = msgspec.structs.replace(nccl._decoder.decode(owner.descriptor), memory="VRAM")

    with pytest.raises(TransportError, match="VRAM and ours DRAM"):
        reader.transport.connect(msgspec.msgpack.encode(offer))
