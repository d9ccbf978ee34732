"""Every transport keeps the contract, between agents of one process."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from vllm_disagg.errors import ConfigError, TransportError
from vllm_disagg.testing.check_transport import CHECKS, Check, Memory, Open, finish, rig, run_until, states, whole
from vllm_disagg.transport import auto, nixl, open_transport
from vllm_disagg.transport.base import CANCEL_BOUND_S, Copy, Region, Transport
from vllm_disagg.transport.loopback import LoopbackTransport
from vllm_disagg.transport.regions import CopyTable, RegionTable, batches, plan_copies

each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))


def open_nixl(agent_name: str) -> Transport:
    pytest.importorskip("nixl")
    return open_transport("nixl", agent_name)


@each_check
def test_loopback(check: Check) -> None:
    check(LoopbackTransport)


def open_nccl(agent_name: str) -> Transport:
    pytest.importorskip("torch")
    return open_transport("nccl", agent_name)


@each_check
def test_nccl(check: Check) -> None:
    check(open_nccl)


@each_check
def test_nixl(check: Check) -> None:
    check(open_nixl)


def open_auto(agent_name: str) -> Transport:
    pytest.importorskip("nixl")
    return open_transport("auto", agent_name)


@each_check
def test_auto(check: Check) -> None:
    check(open_auto)


@pytest.mark.full
@each_check
def test_auto_where_nixl_would_emulate_reads(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "can_read", lambda site: False)
    check(open_auto)


def test_auto_takes_messages_where_nixl_would_emulate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(open_auto) as made:
        reader, owner, peer = made.pair()
        other = made.agent(Memory(1 << 16))
        monkeypatch.setattr(nixl, "can_read", lambda site: False)
        far_peer = other.transport.connect(owner.descriptor)
        for agent, name in ((reader, peer), (other, far_peer)):
            agent.transport.read(name, whole(agent, owner))
            assert states(finish(agent.transport, owner.transport)) == ["done"]
            assert (agent.memory.data == owner.memory.data).all()

        near, far = reader.transport.wire(peer), other.transport.wire(far_peer)

        assert (far.transport, far.wire, far.sent_by_owner) == ("nccl", "gloo", True)
        assert "NIXL would emulate reads over tcp or shared memory" in far.evidence
        assert near.transport == "nixl"


def test_auto_refuses_a_descriptor_put_together_from_two_peers() -> None:
    decoder = auto._decoder
    with rig(open_auto) as made:
        reader, one, other = (made.agent(Memory(4096)) for _ in range(3))
        mixed = msgspec.structs.replace(decoder.decode(one.descriptor), nccl=decoder.decode(other.descriptor).nccl)

        with pytest.raises(TransportError, match="carries that of"):
            reader.transport.connect(msgspec.msgpack.encode(mixed))


def test_a_descriptor_of_another_transport_is_refused() -> None:
    with rig(LoopbackTransport) as loopback, rig(open_nixl) as nixl:
        one, other = loopback.agent(Memory(4096)), nixl.agent(Memory(4096))

        with pytest.raises(TransportError, match="not a descriptor of the loopback transport"):
            one.transport.connect(other.descriptor)
        with pytest.raises(TransportError, match="not a descriptor of the nixl transport"):
            other.transport.connect(one.descriptor)


def test_a_damaged_descriptor_never_reaches_nixl() -> None:
    with rig(open_nixl) as made:
        reader, owner = made.agent(Memory(4096)), made.agent(Memory(4096))
        middle = len(owner.descriptor) // 2
        damaged = owner.descriptor[:middle] + b"\x01\x02" + owner.descriptor[middle + 2 :]

        with pytest.raises(TransportError, match="damaged"):
            reader.transport.connect(damaged)


def test_loopback_handles_host_memory_only() -> None:
    with pytest.raises(ConfigError, match="use nixl"):
        open_transport("loopback", "x", memory="VRAM")


def test_a_frozen_loopback_peer_holds_reads_until_they_are_cancelled() -> None:
    with rig(LoopbackTransport) as made:
        reader, owner, peer = made.pair()
        assert isinstance(owner.transport, LoopbackTransport)
        owner.transport.frozen = True
        handle = reader.transport.read(peer, whole(reader, owner))
        assert list(reader.transport.poll()) == []

        reader.transport.cancel(handle)
        (outcome,) = finish(reader.transport, deadline_s=CANCEL_BOUND_S)

        assert outcome.state == "cancelled"
        assert not reader.memory.data.any()


def test_copies_are_joined_cut_and_batched_without_losing_a_byte() -> None:
    ours = RegionTable([Region(address=1000, num_bytes=10_000, device_id=3)])
    theirs = RegionTable([Region(address=50_000, num_bytes=5_000), Region(address=55_000, num_bytes=5_000)])
    copies = [Copy(1000, 50_000, 700), Copy(1700, 50_700, 1800), Copy(4000, 54_000, 1000), Copy(5000, 55_000, 10)]

    runs = plan_copies(copies, ours=ours, theirs=theirs, max_bytes=1000)
    parts = batches(runs, max_bytes=1500, max_copies=2)

    assert list(zip(runs.local, runs.remote, runs.num_bytes, strict=True)) == [
        (1000, 50_000, 1000), (2000, 51_000, 1000), (3000, 52_000, 500), (4000, 54_000, 1000), (5000, 55_000, 10),
    ]  # fmt: skip
    assert set(runs.local_device) == {3}
    assert [part.num_bytes.tolist() for part in parts] == [[1000], [1000, 500], [1000, 10]]


def test_bytes_move_only_while_somebody_polls() -> None:
    with rig(open_nixl) as made:
        reader, owner, peer = made.pair()
        reader.transport.read(peer, whole(reader, owner))

        assert not reader.memory.data.any()
        run_until(lambda: reader.transport.num_active == 0, reader.transport, owner.transport)
        assert reader.memory.data.any()


@pytest.mark.parametrize("open_one", [open_nixl, open_nccl])
def test_a_small_read_is_not_stuck_behind_a_huge_one(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(160 << 20)
        huge = reader.transport.read(peer, whole(reader, owner))
        small = reader.transport.read(peer, [Copy(reader.memory.address, owner.memory.address, 4096)])

        outcomes = finish(reader.transport, owner.transport)

        assert [outcome.handle for outcome in outcomes] == [small, huge]
        assert states(outcomes) == ["done", "done"]


def test_a_table_of_copies_is_read_like_a_list_of_them() -> None:
    rows = np.array([(1000, 50_000, 700), (1700, 50_700, 100), (4000, 52_000, 10)], np.int64)
    table = CopyTable(rows)
    ours, theirs = RegionTable([Region(address=0, num_bytes=9000)]), RegionTable([Region(address=0, num_bytes=90_000)])

    one, other = (plan_copies(copies, ours=ours, theirs=theirs, max_bytes=500) for copies in (table, list(table)))

    assert [table[index] for index in range(3)] == list(table) == [Copy(*row) for row in rows.tolist()]
    assert list(table[1:]) == list(table)[1:]
    assert one.local.tolist() == other.local.tolist() == [1000, 1500, 4000]
    assert one.num_bytes.tolist() == other.num_bytes.tolist() == [500, 300, 10]
    with pytest.raises(TransportError, match="at least one copy"):
        plan_copies(CopyTable(rows[:0]), ours=ours, theirs=theirs, max_bytes=500)
    with pytest.raises(TransportError, match="negative address"):
        plan_copies(CopyTable(-rows), ours=ours, theirs=theirs, max_bytes=500)
