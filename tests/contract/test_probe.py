"""A probe of one pair, through every thread that takes part in it: the door, both control channels and both workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from control_harness import FINGERPRINT, KEYS, STRANGER, WAIT_S, eventually, free_port

from vllm_disagg.connector import messages
from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.control_server import PrefillControl
from vllm_disagg.connector.digests import Digester, host_reader
from vllm_disagg.connector.holds import Holds
from vllm_disagg.connector.messages import OpenProbe, ProbeOpened, RankInfo
from vllm_disagg.connector.probe_door import ProbeDoor, door_address
from vllm_disagg.connector.probe_memory import PROBE_BYTES, ProbeMemory
from vllm_disagg.connector.probe_run import SIZES
from vllm_disagg.connector.secure import client_socket
from vllm_disagg.connector.worker_thread import WorkerThread
from vllm_disagg.core.probe import PROBE_VERSION, PairReport, ProbeOrder, sign_order
from vllm_disagg.core.types import EngineId, new_nonce
from vllm_disagg.transport.base import Copy, PeerName, Region, TransferHandle, Transport
from vllm_disagg.transport.layout import RankLayout, Segment
from vllm_disagg.transport.loopback import LoopbackTransport

KEY = b"k" * 32
Wrap = Callable[[Transport], Transport]


class Worker:
    """A worker's thread with a KV cache of a few bytes."""

    def __init__(self, wrap: Wrap = lambda transport: transport) -> None:
        torch = pytest.importorskip("torch")
        self.cache = np.zeros(4096, np.uint8)
        self.memory = ProbeMemory(torch.empty(PROBE_BYTES, dtype=torch.uint8))
        address = int(self.cache.ctypes.data)
        segment = Segment(
            name="layer", address=address, num_blocks=4, block_stride=1024, first_head=0, num_heads=1, head_stride=1024,
            num_rows=1, row_stride=1024, row_bytes=1024,
        )  # fmt: skip
        self.layout = RankLayout(groups=((segment,),))
        self.transport = LoopbackTransport(os.urandom(4).hex())

        def opened() -> tuple[Transport, bytes]:
            transport = wrap(self.transport)
            return transport, transport.register([Region(address=address, num_bytes=4096), self.memory.region])

        digester = Digester(layout=self.layout, key=KEY, read=host_reader)
        self.thread = WorkerThread(
            open_transport=opened, layout=self.layout, keys=KEYS, digester=digester, probe=self.memory
        )
        self.rank = RankInfo(
            tp_rank=0, pp_rank=0, descriptor=self.thread.start(), layout=self.layout, probe=self.memory.region
        )


class Pair:
    """A prefill and a decode engine without vLLM."""

    def __init__(
        self, stack: ExitStack, *, wrap: Wrap = lambda transport: transport, fingerprint: dict[str, str] = FINGERPRINT
    ) -> None:
        self.owner, self.reader = Worker(), Worker(wrap)
        for worker in (self.owner, self.reader):
            stack.callback(worker.thread.stop)
        self.prefill_id, self.decode_id = EngineId(os.urandom(4).hex()), EngineId(os.urandom(4).hex())
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.holds = Holds(lease_s=30.0, cap_s=300.0, on_freed=lambda: None)
        self.prefill = PrefillControl(
            engine_id=self.prefill_id, address=self.address, keys=KEYS, fingerprint=FINGERPRINT,
            ranks=[self.owner.rank], worker_links=[self.owner.thread.endpoint], holds=self.holds,
        )  # fmt: skip
        self.decode = DecodeControl(
            keys=KEYS, fingerprint=fingerprint, worker_links=[self.reader.thread.endpoint], pull_timeout_s=10.0,
            tp_ranks=[0], on_report=lambda: None,
        )  # fmt: skip
        self.door = ProbeDoor(
            engine_id=self.decode_id, key=KEY, keys=KEYS, fingerprint=fingerprint, control=self.decode
        )
        for part in (self.prefill, self.decode, self.door):
            part.start()
            stack.callback(part.stop)

    def order(self, **fields: Any) -> ProbeOrder:
        order = ProbeOrder(
            version=PROBE_VERSION, task="pair", nonce=new_nonce(), engine_id=self.decode_id,
            prefill_id=self.prefill_id, control=self.address,
        )  # fmt: skip
        return msgspec.structs.replace(order, **fields)

    def probe(self, order: ProbeOrder | None = None, *, key: bytes = KEY) -> PairReport:
        with zmq.Context() as context, client_socket(context, zmq.DEALER, KEYS) as link:
            link.connect(door_address(self.decode_id))
            link.send(sign_order(order or self.order(), key))
            assert link.poll(WAIT_S * 1000)
            return msgspec.json.decode(link.recv(), type=PairReport)


@contextmanager
def pair(**kinds: Any) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, **kinds)


def test_a_healthy_pair_is_measured_and_nothing_is_left_of_it() -> None:
    with pair() as engines:
        first, second = engines.probe(), engines.probe()

        for report in (first, second):
            assert (report.stage, report.cause, report.error) == ("done", "", "")
            assert report.greeting_s > 0 and len(report.round_trips_s) == 30
            assert report.lease is not None and report.lease.good
            [worker] = report.workers
            [source] = worker.sources
            assert worker.copy_bytes_per_s > 0 and (worker.error, source.error) == ("", "")
            assert source.intact
            assert [timing.copy_bytes for timing in source.reads] == list(SIZES)
            assert all(timing.seconds > 0 for timing in source.reads)
            assert max(timing.num_copies for timing in source.reads) == 1024
        assert len(engines.holds) == 0
        assert not engines.reader.cache.any() and not engines.owner.cache.any()  # the KV cache was not touched


class Spoiled:
    """A transport whose reads bring one wrong byte."""

    def __init__(self, inner: Transport) -> None:
        self.inner, self.name = inner, inner.name

    def read(self, peer: PeerName, copies: Sequence[Copy]) -> TransferHandle:
        first = copies[0]
        return self.inner.read(peer, [Copy(first.local, first.remote + 1, first.num_bytes - 1), *copies[1:]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_bytes_that_are_not_prefills_are_noticed() -> None:
    with pair(wrap=Spoiled) as engines:
        report = engines.probe()

        assert report.stage == "done" and not report.workers[0].sources[0].intact


def test_an_engine_that_does_not_fit_is_named_as_at_any_handshake() -> None:
    with pair(fingerprint={**FINGERPRINT, "dtype": "bfloat16"}) as engines:
        report = engines.probe()

        assert (report.stage, report.cause) == ("greeting", "incompatible")
        assert (report.factor, report.prefill, report.decode) == ("dtype", "float32", "bfloat16")


def test_another_run_of_the_prefill_engine_is_told_apart() -> None:
    with pair() as engines:
        report = engines.probe(engines.order(prefill_id=EngineId("earlier")))

        assert (report.stage, report.cause) == ("greeting", "peer_lost")


def test_nobody_listening_costs_the_greeting_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_disagg.connector.pair_probe.HELLO_TIMEOUT_S", 0.3)
    with pair() as engines:
        report = engines.probe(engines.order(control=f"tcp://127.0.0.1:{free_port()}"))

        assert (report.stage, report.cause) == ("greeting", "handshake_timeout")
        monkeypatch.undo()
        assert engines.probe().stage == "done"


def test_an_owner_that_answers_no_read_costs_the_limit_and_the_next_probe_is_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_disagg.connector.probe_run.RUN_LIMIT_S", 0.5)
    with pair() as engines:
        engines.owner.transport.frozen = True
        report = engines.probe()

        [source] = report.workers[0].sources
        assert "was not over" in source.error and not source.intact
        assert report.lease is not None and report.lease.good  # its control thread is well
        eventually(lambda: len(engines.holds) == 0, "the end of the hold")

        monkeypatch.undo()
        engines.owner.transport.frozen = False
        assert engines.probe().workers[0].sources[0].intact


def test_an_order_is_obeyed_once_by_the_engine_it_names_and_only_with_the_key() -> None:
    with pair() as engines:
        order = engines.order()
        assert engines.probe(order).stage == "done"

        assert "obeyed before" in engines.probe(order).error
        assert "another engine" in engines.probe(engines.order(engine_id=EngineId("other"))).error
        assert "not signed" in engines.probe(key=b"s" * 32).error
        assert "version" in engines.probe(engines.order(version=99)).error
        assert len(engines.holds) == 0


def test_probes_that_nobody_ends_are_limited_and_end_with_their_lease() -> None:
    with pair() as engines, zmq.Context() as context, client_socket(context, zmq.DEALER, KEYS) as link:
        link.connect(engines.address)
        for _ in range(100):
            link.send(messages.encode(OpenProbe(engine_id=engines.prefill_id)))
        link.send(messages.encode(OpenProbe(engine_id=EngineId("nobody"))))  # answered last
        answers = [messages.decode_or_none(messages.from_prefill, link.recv_multipart())]
        eventually(lambda: len(engines.holds) == 64, "the holds")
        while len(answers) < 65:
            assert link.poll(WAIT_S * 1000)
            answers.append(messages.decode_or_none(messages.from_prefill, link.recv_multipart()))

        assert sum(isinstance(answer, ProbeOpened) for answer in answers) == 64
        assert link.poll(100) == 0


def test_the_door_opens_to_no_stranger() -> None:
    with pair() as engines, zmq.Context() as context, client_socket(context, zmq.DEALER, STRANGER) as link:
        link.connect(door_address(engines.decode_id))
        link.send(sign_order(engines.order(), KEY))

        assert link.poll(300) == 0
