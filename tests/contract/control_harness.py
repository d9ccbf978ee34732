"""Prefill's and decode's ends of the control channel over real sockets, with workers that follow a script."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from vllm_disagg.connector import messages
from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.control_server import PrefillControl
from vllm_disagg.connector.holds import Holds
from vllm_disagg.connector.messages import (
    ConnectPeer,
    PeerState,
    RankInfo,
    ReadEnded,
    ToWorker,
)
from vllm_disagg.connector.secure import CurveKeys, curve_keys, server_socket, start_authenticator
from vllm_disagg.core.handoff import HANDOFF_VERSION, Handoff
from vllm_disagg.core.types import EngineId, TransferId, new_nonce, new_transfer_id
from vllm_disagg.transport.layout import RankLayout

KEYS = curve_keys(b"k" * 32)
STRANGER = curve_keys(b"s" * 32)
FINGERPRINT = {"model": "llama", "dtype": "float32"}
BLOCKS = ((4, 5),)
WAIT_S = 15.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], Any], what: str = "condition") -> Any:
    """Poll until true, fail after a while. Returns the condition's value."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        threading.Event().wait(0.005)
    raise AssertionError(f"{what} did not come within {WAIT_S} s")


class Worker:
    """An engine's worker as its core sees it: hears everything, says what the test tells it to."""

    def __init__(self, keys: CurveKeys = KEYS) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.authenticator = start_authenticator(self.context, keys)
        self.link = server_socket(self.context, zmq.DEALER, keys)
        self.endpoint = f"tcp://127.0.0.1:{self.link.bind_to_random_port('tcp://127.0.0.1')}"
        self.heard: list[ToWorker] = []

    def hear(self) -> list[ToWorker]:
        while self.link.poll(0):
            message = messages.decode_or_none(messages.to_worker, self.link.recv_multipart())
            assert message is not None
            self.heard.append(message)
        return self.heard

    def wait_for(self, kind: type) -> Any:
        return eventually(lambda: next((item for item in self.hear() if isinstance(item, kind)), None), kind.__name__)

    def say(self, message: messages.FromWorker) -> None:
        self.link.send(messages.encode(message))

    def close(self) -> None:
        self.authenticator.stop()
        self.context.destroy(linger=0)


class Prefill:
    """A prefill engine's scheduler half, without the engine."""

    def __init__(self, *, lease_s: float = 30.0, fingerprint: dict[str, str] | None = None, ranks: int = 1) -> None:
        self.engine_id = EngineId(os.urandom(4).hex())
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.workers = [Worker() for _ in range(ranks)]
        self.lease_s = lease_s
        self.holds = Holds(lease_s=lease_s, cap_s=lease_s * 10, on_freed=lambda: None)
        self.control = PrefillControl(
            engine_id=self.engine_id,
            address=self.address,
            keys=KEYS,
            fingerprint=fingerprint or FINGERPRINT,
            ranks=[
                RankInfo(pp_rank=0, tp_rank=rank, descriptor=b"secret", layout=RankLayout(groups=()))
                for rank in range(ranks)
            ],
            worker_links=[worker.endpoint for worker in self.workers],
            holds=self.holds,
        )
        self.control.start()

    def hold(self) -> Handoff:
        handoff = Handoff(
            version=HANDOFF_VERSION,
            transfer_id=new_transfer_id(),
            engine_id=self.engine_id,
            control=self.address,
            block_ids=BLOCKS,
            num_tokens=40,
            prompt_digest=b"",
            lease_s=self.lease_s,
            nonce=new_nonce(),
        )
        assert self.holds.grant(handoff.transfer_id, handoff.nonce, BLOCKS)
        self.control.granted()
        return handoff

    def close(self) -> None:
        self.control.stop()
        for worker in self.workers:
            worker.close()


class Decode:
    """A decode engine's scheduler half, without the engine."""

    def __init__(
        self,
        *,
        pull_timeout_s: float = 10.0,
        ranks: int = 1,
        fingerprint: dict[str, str] | None = None,
        keys: CurveKeys = KEYS,
    ) -> None:
        self.workers = [Worker(keys) for _ in range(ranks)]
        self.reports: list[Any] = []
        self.control = DecodeControl(
            keys=keys,
            fingerprint=fingerprint or FINGERPRINT,
            worker_links=[worker.endpoint for worker in self.workers],
            tp_ranks=range(ranks),
            pull_timeout_s=pull_timeout_s,
            on_report=lambda: None,
        )
        self.control.start()

    def pair_with(self, handoff: Handoff) -> None:
        """Announce a handoff and let every worker connect."""
        self.control.announce(handoff)
        for worker in self.workers:
            connect: ConnectPeer = worker.wait_for(ConnectPeer)
            assert {rank.descriptor for rank in connect.ranks} == {b"secret"}
            worker.say(PeerState(engine_id=handoff.engine_id))
        eventually(lambda: self.control.readiness(handoff)[0] == "ready", "pairing")

    def expect(self, handoff: Handoff) -> None:
        self.control.expect(handoff.transfer_id)

    def read_ends(self, transfer_id: TransferId, *, error: str = "", rank: int = 0) -> None:
        self.workers[rank].say(
            ReadEnded(transfer_id=transfer_id, num_bytes=100, num_descriptors=2, seconds=0.01, error=error)
        )

    def report(self, kind: type) -> Any:
        def find() -> Any:
            self.reports.extend(self.control.take_reports())
            return next((item for item in self.reports if isinstance(item, kind)), None)

        return eventually(find, kind.__name__)

    def reports_of(self, transfer_id: TransferId) -> list[Any]:
        self.reports.extend(self.control.take_reports())
        return [item for item in self.reports if item.transfer_id == transfer_id]

    def close(self) -> None:
        self.control.stop()
        for worker in self.workers:
            worker.close()


@contextmanager
def engines(decode: Decode, *prefills: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for engine in (decode, *prefills):
            engine.close()
