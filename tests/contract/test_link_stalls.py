"""Reads that stand still although their prefill engine lives go on long before the pull timeout, rightly."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from tests.contract.control_harness import WAIT_S, eventually
from tests.contract.pair_harness import Pair, pair
from vllm_disagg.connector.messages import BeginRead
from vllm_disagg.connector.pull import Settled
from vllm_disagg.connector.tally import LINK_REBUILDS, LINK_STALLS
from vllm_disagg.core.handoff import HANDOFF_VERSION, Handoff
from vllm_disagg.core.types import new_nonce, new_transfer_id
from vllm_disagg.transport.base import PeerName
from vllm_disagg.transport.loopback import LoopbackTransport

PULL_TIMEOUT_S, STALL_S = 60.0, 0.3
BLOCKS = ((1, 3),)


def handed_over(engines: Pair) -> Handoff:
    """A hold on prefill that decode knows of, with its engine connected."""
    handoff = Handoff(
        version=HANDOFF_VERSION, transfer_id=new_transfer_id(), engine_id=engines.prefill_id, control=engines.address,
        block_ids=BLOCKS, num_tokens=40, prompt_digest=b"", lease_s=30.0, nonce=new_nonce(),
    )  # fmt: skip
    assert engines.holds.grant(handoff.transfer_id, handoff.nonce, BLOCKS)
    engines.prefill.granted()
    engines.decode.announce(handoff)
    eventually(lambda: engines.decode.readiness(handoff)[0] == "ready", "the connection")
    return handoff


def read(engines: Pair, handoff: Handoff) -> None:
    engines.owner.cache[:] = np.resize(np.arange(251, dtype=np.uint8), 4096)
    engines.decode.begin(
        handoff,
        BeginRead(
            transfer_id=handoff.transfer_id, engine_id=engines.prefill_id, local_blocks=((2, 1),), remote_blocks=BLOCKS
        ),
    )


def settled(engines: Pair) -> Settled:
    reports: list[Any] = []
    eventually(lambda: reports.extend(engines.decode.take_reports()) or reports, "the end of the read")
    return next(item for item in reports if isinstance(item, Settled))


def counts(engines: Pair) -> tuple[float, float]:
    amounts = {name: amount for (name, _), amount in engines.decode.tally.take().items()}
    return amounts.get(LINK_STALLS, 0), amounts.get(LINK_REBUILDS, 0)


def arrived_rightly(engines: Pair) -> bool:
    near, far = engines.reader.cache.reshape(4, 1024), engines.owner.cache.reshape(4, 1024)
    return bool((near[2] == far[1]).all() and (near[1] == far[3]).all())


def source(engines: Pair) -> PeerName:
    (name,) = engines.reader.transport._peers
    return name


def test_a_link_that_stands_still_is_replaced_and_its_reads_go_on() -> None:
    with pair(pull_timeout_s=PULL_TIMEOUT_S, stall_s=STALL_S) as engines:
        handoff = handed_over(engines)
        engines.reader.transport.stuck.add(source(engines))
        begun_s = time.monotonic()
        read(engines, handoff)

        report = settled(engines)

        assert (report.result, report.cause) == ("received", None)
        assert arrived_rightly(engines)
        assert counts(engines) == (1, 1)
        assert 2 * STALL_S <= time.monotonic() - begun_s < WAIT_S


class SleepyOwner(LoopbackTransport):
    """One whose memory is read only while it serves, as where reads are emulated."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.frozen = True
        self.served = threading.Event()

    def progress(self) -> None:
        self.frozen = False
        self.served.set()


def test_an_owner_that_sleeps_though_it_is_read_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever became of the order to serve: the reader's word brings it once more. No link is touched."""
    with monkeypatch.context() as patch:
        patch.setattr("tests.contract.pair_harness.LoopbackTransport", SleepyOwner)
        with pair(pull_timeout_s=PULL_TIMEOUT_S, stall_s=STALL_S) as engines:
            handoff = handed_over(engines)
            owner = engines.owner.transport
            assert isinstance(owner, SleepyOwner) and owner.served.wait(WAIT_S)
            engines.owner.thread._serving = False  # the order is lost
            owner.served.clear()
            eventually(lambda: not engines.owner.thread._serving, "its rest")
            owner.frozen = True
            engines.reader.transport.frozen = False
            read(engines, handoff)

            report = settled(engines)

            assert report.result == "received"
            assert arrived_rightly(engines)
            assert counts(engines) == (1, 0)


def test_a_silent_prefill_engine_keeps_its_links_until_the_pull_timeout() -> None:
    """To tear one down could end it when it goes on."""
    with pair(pull_timeout_s=5 * STALL_S, stall_s=STALL_S) as engines:
        handoff = handed_over(engines)
        engines.prefill._reply = lambda request: None  # type: ignore[method-assign]
        engines.reader.transport.stuck.add(source(engines))
        read(engines, handoff)

        report = settled(engines)

        assert (report.result, report.cause) == ("failed", "pull_timeout")
        assert counts(engines) == (1, 0)
