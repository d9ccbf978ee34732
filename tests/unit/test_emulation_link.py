"""A modelled link over a real transport: its time, who waits for whom, and faults of reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_disagg.core.link import Link
from vllm_disagg.emulation.faults import Faults
from vllm_disagg.emulation.link import EmulatedLink, Ledger, OwnLedger, SharedLedger
from vllm_disagg.errors import ConfigError, TransportError
from vllm_disagg.testing.check_transport import CHECKS, Check, Memory
from vllm_disagg.transport.base import Copy, Outcome, PeerName, TransferHandle
from vllm_disagg.transport.loopback import LoopbackTransport

LINK = Link(bytes_per_s=1024.0, latency_s=0.5)
NUM_BYTES = 512


@dataclass
class Clock:
    """Time that stands still until it is told."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Node:
    """An engine's end of the link."""

    name: str
    memory: Memory
    inner: LoopbackTransport
    transport: EmulatedLink
    descriptor: bytes

    def read(self, peer: Node, num_bytes: int = NUM_BYTES, offset: int = 0) -> TransferHandle:
        name = self.transport.connect(peer.descriptor)
        copy = Copy(self.memory.address + offset, peer.memory.address + offset, num_bytes)
        return self.transport.read(name, [copy])

    def states(self) -> list[str]:
        return [outcome.state for outcome in self.transport.poll()]


class Nodes:
    """Engines on one host, one clock and one ledger."""

    def __init__(self) -> None:
        self.clock, self.ledger = Clock(), OwnLedger()
        self._made: list[Node] = []

    def node(
        self, *, link: Link | None = LINK, faults: Path | None = None, ledger: Ledger | None = None, **options: Any
    ) -> Node:
        name = f"node-{len(self._made)}-{id(self)}"
        inner, memory = LoopbackTransport(name), Memory(4096, seed=len(self._made))
        transport = EmulatedLink(
            inner,
            link=link,
            own_name=name,
            ledger=ledger or self.ledger,
            faults=Faults(faults),
            now=self.clock,
            **{"scale": 1.0, "dilation": 1.0, **options},
        )
        self._made.append(Node(name, memory, inner, transport, transport.register([memory.region])))
        return self._made[-1]

    def close(self) -> None:
        for node in self._made:
            node.transport.close()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


def when_over(node: Node, clock: Clock, count: int = 1) -> list[float]:
    """When each read ends, seconds from now, looking every eighth."""
    begun_s, ends = clock.now_s, list[float]()
    while len(ends) < count:
        ends += [clock.now_s - begun_s] * len(node.states())
        clock.now_s += 0.125
        assert clock.now_s - begun_s < 1000
    return ends


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_it_keeps_the_transport_contract(check: Check) -> None:
    ledger = OwnLedger()

    def build(name: str) -> EmulatedLink:
        return EmulatedLink(
            LoopbackTransport(name),
            link=Link(bytes_per_s=1e9, latency_s=0.001),
            scale=1.0,
            dilation=1.0,
            own_name=name,
            ledger=ledger,
            faults=Faults(None),
        )

    check(build)


def test_a_read_alone_takes_latency_and_bytes_over_bandwidth(nodes: Nodes) -> None:
    reader, owner = nodes.node(), nodes.node()
    reader.read(owner)

    assert when_over(reader, nodes.clock) == [1.0]
    assert (reader.memory.data[:NUM_BYTES] == owner.memory.data[:NUM_BYTES]).all()


@pytest.mark.parametrize(
    ("options", "seconds"), [({"scale": 10.0}, 5.5), ({"dilation": 3.0}, 3.0), ({"link": None}, 0)]
)
def test_scale_counts_modelled_bytes_and_dilation_all_of_it(
    nodes: Nodes, options: dict[str, Any], seconds: float
) -> None:
    reader, owner = nodes.node(**options), nodes.node()
    reader.read(owner)

    assert when_over(reader, nodes.clock) == [seconds]


def test_reads_of_one_engine_follow_each_other(nodes: Nodes) -> None:
    reader, one, other = nodes.node(), nodes.node(), nodes.node()
    reader.read(one)
    reader.read(other)

    assert when_over(reader, nodes.clock, count=2) == [1.0, 2.0]


def test_reads_from_one_engine_follow_each_other(nodes: Nodes) -> None:
    one, other, owner = nodes.node(), nodes.node(), nodes.node()
    one.read(owner)
    other.read(owner)

    assert when_over(other, nodes.clock) == [2.0]
    assert one.states() == ["done"]


def test_reads_between_other_engines_do_not_wait(nodes: Nodes) -> None:
    one, other, first, second = (nodes.node() for _ in range(4))
    one.read(first)
    other.read(second)

    assert when_over(other, nodes.clock) == [1.0]


def test_both_directions_of_an_engine_are_free_of_each_other(nodes: Nodes) -> None:
    one, other = nodes.node(), nodes.node()
    one.read(other)
    other.read(one)

    assert when_over(other, nodes.clock) == [1.0]


def test_a_read_is_not_over_before_its_bytes_are_here(nodes: Nodes) -> None:
    reader, owner = nodes.node(), nodes.node()
    owner.inner.frozen = True
    reader.read(owner)
    nodes.clock.now_s += 50
    assert reader.states() == []

    owner.inner.frozen = False

    (outcome,) = reader.transport.poll()
    assert (outcome.state, outcome.seconds, outcome.num_bytes) == ("done", 50.0, NUM_BYTES)


def test_a_cancelled_read_does_not_wait_for_the_link(nodes: Nodes) -> None:
    reader, owner = nodes.node(), nodes.node()
    arrived, frozen = reader.read(owner), reader.read(owner, offset=1000)
    assert reader.states() == []
    assert reader.transport.num_active == 2

    reader.transport.cancel(arrived)
    reader.transport.cancel(frozen)

    assert len(reader.states()) == 2
    assert reader.transport.num_active == 0


@pytest.mark.parametrize("end", ["disconnect", "close"])
def test_a_read_that_is_cut_off_fails_at_once(nodes: Nodes, end: str) -> None:
    reader, owner = nodes.node(), nodes.node()
    reader.read(owner)
    assert reader.states() == []

    if end == "disconnect":
        reader.transport.disconnect(PeerName(owner.name))
    else:
        reader.transport.close()

    assert reader.states() == ["failed"]
    assert reader.transport.num_active == 0


def test_a_failed_read_does_not_wait_for_the_link(nodes: Nodes) -> None:
    reader, owner = nodes.node(), nodes.node()
    reader.read(owner)
    owner.transport.close()

    assert reader.states() == ["failed"]


def test_a_refused_read_occupies_nothing(nodes: Nodes, tmp_path: Path) -> None:
    path = faults(tmp_path, {"kind": "drop_block", "every": 1})
    reader, owner = nodes.node(faults=path), nodes.node()
    name = reader.transport.connect(owner.descriptor)
    with pytest.raises(TransportError):
        reader.transport.read(name, [])
    with pytest.raises(TransportError):
        reader.transport.read(name, [Copy(reader.memory.address, owner.memory.address, 9999)])

    reader.read(owner)

    assert when_over(reader, nodes.clock) == [1.0]


def faults(folder: Path, *items: dict[str, Any]) -> Path:
    path = folder / "faults.json"
    path.write_text(json.dumps({"faults": items}), encoding="utf-8")
    return path


def run_reads(nodes: Nodes, path: Path, count: int = 4) -> tuple[list[Outcome], list[int], Any]:
    """Reads one after the other, each its own part. Returns the outcomes and how many bytes of each are wrong."""
    reader, owner = nodes.node(faults=path, link=None), nodes.node()
    outcomes = []
    for index in range(count):
        reader.read(owner, offset=index * NUM_BYTES)
        outcomes += reader.transport.poll()
    wrong = (reader.memory.data != owner.memory.data)[: count * NUM_BYTES].reshape(count, -1).sum(axis=1)
    return outcomes, wrong.tolist(), (reader, owner)


def test_every_second_read_fails(nodes: Nodes, tmp_path: Path) -> None:
    outcomes, _, _ = run_reads(nodes, faults(tmp_path, {"kind": "fail_read", "every": 2}))

    assert [outcome.state for outcome in outcomes] == ["done", "failed", "done", "failed"]
    assert outcomes[1].error


def test_every_second_read_has_one_wrong_byte(nodes: Nodes, tmp_path: Path) -> None:
    outcomes, wrong, _ = run_reads(nodes, faults(tmp_path, {"kind": "corrupt_read", "every": 2}))

    assert [outcome.state for outcome in outcomes] == ["done"] * 4
    assert wrong == [0, 1, 0, 1]


def test_every_second_read_leaves_its_first_copy_as_it_was(nodes: Nodes, tmp_path: Path) -> None:
    before = Memory(4096, seed=0).data

    _, wrong, (reader, _) = run_reads(nodes, faults(tmp_path, {"kind": "drop_block", "every": 2}))

    assert wrong[0] == wrong[2] == 0
    assert (reader.memory.data[NUM_BYTES : 2 * NUM_BYTES] == before[NUM_BYTES : 2 * NUM_BYTES]).all()
    assert wrong[1] > 0


def test_a_late_block_comes_in_the_end(nodes: Nodes, tmp_path: Path) -> None:
    path = faults(tmp_path, {"kind": "late_block", "every": 2, "seconds": 3.0})
    _, wrong, (reader, owner) = run_reads(nodes, path)
    assert wrong[0] == wrong[2] == 0
    assert wrong[1] > 0
    assert reader.transport.num_active == 2, "the owner has to go on polling"

    nodes.clock.now_s += 3.0
    reader.transport.poll()

    assert (reader.memory.data[: 4 * NUM_BYTES] == owner.memory.data[: 4 * NUM_BYTES]).all()
    assert reader.transport.num_active == 0


def test_nothing_late_comes_after_the_memory_was_given_back(nodes: Nodes, tmp_path: Path) -> None:
    path = faults(tmp_path, {"kind": "late_block", "every": 2, "seconds": 3.0})
    _, _, (reader, _) = run_reads(nodes, path)
    reader.transport.close()
    before = reader.memory.data.copy()

    nodes.clock.now_s += 3.0

    assert reader.transport.num_active == 0
    assert reader.transport.poll() == []
    assert (reader.memory.data == before).all()


def test_the_corrupt_byte_is_of_the_read_that_ended(nodes: Nodes, tmp_path: Path) -> None:
    path = faults(tmp_path, {"kind": "corrupt_read", "every": 1})
    reader, owner = nodes.node(faults=path, link=None), nodes.node()
    for index in range(3):
        reader.read(owner, offset=index * NUM_BYTES)
    reader.transport.poll()

    wrong = np.flatnonzero(reader.memory.data[: 3 * NUM_BYTES] != owner.memory.data[: 3 * NUM_BYTES])

    assert wrong.tolist() == [1, NUM_BYTES + 2, 2 * NUM_BYTES + 3]


# The ledger that processes share.


def test_two_openers_of_a_ledger_see_each_other(tmp_path: Path) -> None:
    one, other = SharedLedger(tmp_path / "ledger"), SharedLedger(tmp_path / "ledger")

    assert one.reserve(["out a", "in b"], 2.0, 10.0) == 12.0
    assert other.reserve(["out a", "in c"], 2.0, 11.0) == 14.0
    assert other.reserve(["out d", "in b"], 1.0, 11.0) == 13.0
    assert one.reserve(["out d", "in e"], 1.0, 20.0) == 21.0


def test_a_ledger_counts_like_that_of_one_process(tmp_path: Path) -> None:
    shared, own = SharedLedger(tmp_path / "ledger"), OwnLedger()
    for step in range(3000):
        ends = [f"out {step % 37}", f"in {step % 29}"]
        now_s = step * 0.01
        assert shared.reserve(ends, 0.3, now_s) == own.reserve(ends, 0.3, now_s)


def test_processes_share_a_ledger_without_losing_a_reservation(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    script = (
        "import sys, threading\nfrom pathlib import Path\nfrom vllm_disagg.emulation.link import SharedLedger\n"
        "sys.setswitchinterval(1e-6)\ndef reserve():\n    ledger = SharedLedger(Path(sys.argv[1]))\n"
        "    for _ in range(250): ledger.reserve(['out a', 'in b'], 1.0, 0.0)\n"
        "threads = [threading.Thread(target=reserve) for _ in range(4)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(2)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]

    assert SharedLedger(path).reserve(["out a", "in x"], 1.0, 0.0) == 2001.0


def test_a_full_ledger_goes_on(tmp_path: Path) -> None:
    ledger = SharedLedger(tmp_path / "ledger")
    for index in range(1500):
        ledger.reserve([f"out {index}"], 1.0, 0.0)

    assert ledger.reserve(["out 1"], 1.0, 5000.0) == 5001.0


def test_some_other_file_is_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine", encoding="utf-8")

    with pytest.raises(ConfigError, match="is some other file"):
        SharedLedger(path)
    with pytest.raises(ConfigError, match="No such file"):
        SharedLedger(tmp_path / "nowhere" / "ledger")
    assert path.read_text(encoding="utf-8") == "mine"
