"""A prefill and a decode engine without vLLM: both control threads, a worker's thread each, and decode's door."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from tests.contract.control_harness import FINGERPRINT, KEYS, WAIT_S, free_port
from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.control_server import PrefillControl
from vllm_disagg.connector.digests import Digester, host_reader
from vllm_disagg.connector.door import Door, door_address
from vllm_disagg.connector.holds import Holds
from vllm_disagg.connector.introductions import Introductions
from vllm_disagg.connector.messages import RankInfo
from vllm_disagg.connector.pair_probe import PairProbe
from vllm_disagg.connector.probe_memory import PROBE_BYTES, ProbeMemory
from vllm_disagg.connector.probe_orders import ProbeOrders
from vllm_disagg.connector.secure import client_socket
from vllm_disagg.connector.worker_thread import WorkerThread
from vllm_disagg.core.probe import PROBE_VERSION, PairReport, ProbeOrder, sign_order
from vllm_disagg.core.types import EngineId, new_nonce
from vllm_disagg.transport.base import Region, Transport
from vllm_disagg.transport.layout import RankLayout, Segment
from vllm_disagg.transport.loopback import LoopbackTransport

KEY = b"k" * 32
Wrap = Callable[[Transport], Transport]


class Worker:
    """A worker's thread with a KV cache of a few bytes."""

    def __init__(self, wrap: Wrap = lambda transport: transport, *, stall_s: float = 2.0) -> None:
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
            open_transport=opened,
            layout=self.layout,
            keys=KEYS,
            digester=digester,
            probe=self.memory,
            stall_s=stall_s,
        )
        self.rank = RankInfo(
            tp_rank=0, pp_rank=0, descriptor=self.thread.start(), layout=self.layout, probe=self.memory.region
        )


class Pair:
    """A prefill and a decode engine without vLLM."""

    def __init__(
        self,
        stack: ExitStack,
        *,
        wrap: Wrap = lambda transport: transport,
        fingerprint: dict[str, str] = FINGERPRINT,
        pull_timeout_s: float = 10.0,
        stall_s: float = 2.0,
    ) -> None:
        self.owner, self.reader = Worker(), Worker(wrap, stall_s=stall_s)
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
            keys=KEYS,
            fingerprint=fingerprint,
            worker_links=[self.reader.thread.endpoint],
            tp_ranks=[0],
            pull_timeout_s=pull_timeout_s,
            on_report=lambda: None,
        )
        self.introductions = Introductions(
            engine_id=self.decode_id, key=KEY, tally=self.decode.tally, introduce=self.decode.introduce
        )
        orders = ProbeOrders(
            engine_id=self.decode_id,
            key=KEY,
            make_probe=lambda order: PairProbe(keys=KEYS, fingerprint=fingerprint, control=self.decode, order=order),
        )
        self.door = Door(engine_id=self.decode_id, keys=KEYS, introduce=self.introductions.take, probe=orders.obey)
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
            link.send_multipart([b"probe", sign_order(order or self.order(), key)])
            assert link.poll(WAIT_S * 1000)
            return msgspec.json.decode(link.recv(), type=PairReport)


@contextmanager
def pair(**kinds: Any) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, **kinds)
