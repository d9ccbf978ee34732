"""The transport contract as checks that any implementation can be held to.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_transport(check: Check) -> None:
        check(MyTransport)

A check opens transports with the function it is given, called with the agent's name, and asserts. The peers live in
one process, one thread drives them all. Before its import `pytest.register_assert_rewrite` makes failures show the
values that were compared. What needs a second process (a peer that is stopped or killed) is up to the caller;
`run_until` and `Memory` help there as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import ParamSpec

import msgspec
import numpy as np

from vllm_disagg.errors import TransportError
from vllm_disagg.transport.base import CANCEL_BOUND_S, Copy, Outcome, PeerName, Region, TransferHandle, Transport

Open = Callable[[str], Transport]
"""Build a transport for host memory whose agent has this name."""

Check = Callable[[Open], None]

P = ParamSpec("P")

DEADLINE_S = 60.0
"""The longest that anything here may take: far more than it does, for machines that are busy."""

_SLICE_S = 0.1
"""What one turn of waiting counts for at most, so that a process or host that stood still does not count as a peer
that did."""

_PAUSE_S = 50e-6
"""Between two turns, so that threads of the transports get on."""

_numbers = count()


def _new_name() -> str:
    # Checks are run again and again, and no two agents of all times may share a name.
    return f"check-{os.getpid()}-{next(_numbers)}"


class Memory:
    """Host memory with a pattern in it, and the region that describes it."""

    def __init__(self, num_bytes: int, *, seed: int | None = None) -> None:
        """Zeros, or pseudo-random bytes from `seed`."""
        if seed is None:
            self.data = np.zeros(num_bytes, np.uint8)
        else:
            # The period is prime, so that no two blocks of a usual size are equal.
            self.data = np.resize(np.random.default_rng(seed).integers(0, 256, 1_000_003, np.uint8), num_bytes)

    @property
    def address(self) -> int:
        """Of the first byte."""
        return int(self.data.ctypes.data)

    @property
    def region(self) -> Region:
        """All of it."""
        return Region(address=self.address, num_bytes=len(self.data))


def run_until(
    condition: Callable[[], bool],
    *transports: Transport,
    deadline_s: float = DEADLINE_S,
    outcomes: list[Outcome] | None = None,
) -> list[Outcome]:
    """Poll and progress these transports until something holds.

    Returns:
        Every outcome seen meanwhile; the same list as `outcomes` where one is given.

    Raises:
        AssertionError: it does not hold within `deadline_s` in which this process was running.
    """
    seen = [] if outcomes is None else outcomes
    waited_s, now_s = 0.0, time.monotonic()
    while not condition():
        assert waited_s < deadline_s, f"not within {deadline_s} s; outcomes so far: {seen}"
        num_before = len(seen)
        for transport in transports:
            if transport.num_active:
                seen.extend(transport.poll())
            transport.progress()
        if len(seen) == num_before:
            time.sleep(_PAUSE_S)
        before_s, now_s = now_s, time.monotonic()
        waited_s += min(now_s - before_s, _SLICE_S)
    return seen


def finish(reader: Transport, *others: Transport, deadline_s: float = DEADLINE_S) -> list[Outcome]:
    """Run until the reader has nothing under way; its outcomes, in the order they came."""
    return run_until(lambda: reader.num_active == 0, reader, *others, deadline_s=deadline_s)


@dataclass(slots=True, eq=False)
class Agent:
    """A transport with memory registered."""

    name: str
    transport: Transport
    memories: tuple[Memory, ...]
    descriptor: bytes

    @property
    def memory(self) -> Memory:
        return self.memories[0]


@dataclass(slots=True)
class Rig:
    """Opens agents and closes them all."""

    open: Open
    agents: list[Agent] = field(default_factory=list)

    def agent(self, *memories: Memory) -> Agent:
        name = _new_name()
        transport = self.open(name)
        agent = Agent(name, transport, memories, b"")
        self.agents.append(agent)
        agent.descriptor = transport.register([memory.region for memory in memories])
        return agent

    def pair(self, num_bytes: int = 1 << 16) -> tuple[Agent, Agent, PeerName]:
        """A reader with zeros, an owner with a pattern, and the owner's name at the reader."""
        reader, owner = self.agent(Memory(num_bytes)), self.agent(Memory(num_bytes, seed=1))
        return reader, owner, reader.transport.connect(owner.descriptor)


@contextmanager
def rig(open_one: Open) -> Iterator[Rig]:
    """A rig whose agents are closed at the end."""
    made = Rig(open_one)
    try:
        yield made
    finally:
        for agent in made.agents:
            agent.transport.close()


def whole(reader: Agent, owner: Agent) -> list[Copy]:
    """One copy of all of the owner's first memory to the reader's."""
    return [Copy(reader.memory.address, owner.memory.address, len(owner.memory.data))]


def refused(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Whether the call raises `TransportError`. Any other exception passes through."""
    try:
        call(*args, **kwargs)
    except TransportError:
        return True
    return False


def states(outcomes: Sequence[Outcome]) -> list[str]:
    """How reads ended; a failed one with its error, for the text of an assertion that expects something else."""
    return [f"failed: {outcome.error}" if outcome.error else outcome.state for outcome in outcomes]


def check_read_copies_exactly_what_was_asked(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        ours, theirs = reader.memory, owner.memory
        copies = [Copy(ours.address + at, theirs.address + 60_000 - at, 100) for at in range(0, 40_000, 400)]
        expected = np.zeros_like(ours.data)
        for at in range(0, 40_000, 400):
            expected[at : at + 100] = theirs.data[60_000 - at : 60_100 - at]

        handle = reader.transport.read(peer, copies)
        (outcome,) = finish(reader.transport, owner.transport)

        assert (outcome.handle, outcome.state, outcome.error) == (handle, "done", "")
        assert (outcome.num_bytes, outcome.num_descriptors) == (100 * len(copies), len(copies))
        assert outcome.seconds >= 0
        assert np.array_equal(ours.data, expected)


def check_neighbours_are_joined(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        ours, theirs = reader.memory.address, owner.memory.address
        follow_each_other = [Copy(ours + at, theirs + at, 64) for at in range(0, 6400, 64)]
        only_remote_follows = [Copy(ours + 2 * at, theirs + at, 64) for at in range(6400, 6400 + 640, 64)]

        reader.transport.read(peer, [*follow_each_other, *only_remote_follows])
        (outcome,) = finish(reader.transport, owner.transport)

        assert (outcome.state, outcome.error) == ("done", "")
        assert outcome.num_descriptors == 1 + len(only_remote_follows)
        assert np.array_equal(reader.memory.data[:6400], owner.memory.data[:6400])


def check_regions_that_touch_stay_apart(open_one: Open) -> None:
    with rig(open_one) as made:
        source, target = Memory(8192, seed=2), Memory(8192)
        halves = [Memory(0), Memory(0)]
        halves[0].data, halves[1].data = source.data[:4096], source.data[4096:]
        reader, owner = made.agent(target), made.agent(*halves)
        peer = reader.transport.connect(owner.descriptor)
        across = [Copy(target.address, source.address, 4096), Copy(target.address + 4096, source.address + 4096, 4096)]

        assert refused(reader.transport.read, peer, [Copy(target.address, source.address, 8192)])
        reader.transport.read(peer, across)
        (outcome,) = finish(reader.transport, owner.transport)

        assert (outcome.state, outcome.error, outcome.num_descriptors) == ("done", "", 2)
        assert np.array_equal(target.data, source.data)


def check_a_large_read_arrives_whole(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair((80 << 20) + 12_345)

        reader.transport.read(peer, whole(reader, owner))
        (outcome,) = finish(reader.transport, owner.transport)

        assert (outcome.state, outcome.error) == ("done", "")
        assert np.array_equal(reader.memory.data, owner.memory.data)


def check_many_small_copies_arrive(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(8 << 20)
        ours, theirs = reader.memory.address, owner.memory.address
        backwards = [Copy(ours + at, theirs + at, 1024) for at in range((8 << 20) - 1024, -1, -1024)]

        reader.transport.read(peer, backwards)
        (outcome,) = finish(reader.transport, owner.transport)

        assert (outcome.state, outcome.error, outcome.num_descriptors) == ("done", "", 8192)
        assert np.array_equal(reader.memory.data, owner.memory.data)


def check_every_read_ends_once(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        handles = [
            reader.transport.read(peer, [Copy(reader.memory.address + at, owner.memory.address + at, 1000)])
            for at in range(0, 40_000, 1000)
        ]
        assert reader.transport.num_active == len(handles)

        outcomes = finish(reader.transport, owner.transport)

        assert {id(outcome.handle) for outcome in outcomes} == {id(handle) for handle in handles}
        assert len(outcomes) == len(handles)
        assert set(states(outcomes)) == {"done"}
        assert list(reader.transport.poll()) == []


def check_connect_is_idempotent(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()

        assert reader.transport.connect(owner.descriptor) == peer == owner.name
        reader.transport.read(peer, whole(reader, owner))
        assert reader.transport.connect(owner.descriptor) == peer
        assert states(finish(reader.transport, owner.transport)) == ["done"]


def check_it_tells_what_carries_reads(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        assert refused(reader.transport.wire, PeerName("nobody"))
        before = reader.transport.wire(peer)
        for _ in range(3):
            reader.transport.read(peer, whole(reader, owner))
            assert states(finish(reader.transport, owner.transport)) == ["done"]

        after = reader.transport.wire(peer)

        assert before.transport == after.transport
        assert before.wire and after.wire and after.evidence
        reader.transport.disconnect(peer)
        assert refused(reader.transport.wire, peer)


def check_malformed_descriptors_are_refused(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner = made.agent(Memory(4096)), made.agent(Memory(4096))
        good = owner.descriptor
        rng = np.random.default_rng(3)
        cut = [good[:end] for end in range(0, len(good), max(1, len(good) // 40))]
        noise = [rng.bytes(size) for size in (1, 10, 100, 10_000)]
        values: tuple[object, ...] = (None, 7, [], {}, ["nixl", 1], ["other", 1, "x", []])
        other = [msgspec.msgpack.encode(value) for value in values]

        for malformed in (*cut, *noise, *other, good + b"\x00"):
            assert refused(reader.transport.connect, malformed), malformed[:40]
        peer = reader.transport.connect(good)
        reader.transport.read(peer, whole(reader, owner))

        assert states(finish(reader.transport, owner.transport)) == ["done"]


def check_reads_out_of_bounds_are_refused(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(4096)
        ours, theirs = reader.memory.address, owner.memory.address
        good = Copy(ours, theirs, 4096)
        bad = [
            Copy(ours + 1, theirs, 4096),
            Copy(ours, theirs + 1, 4096),
            Copy(ours - 1, theirs, 10),
            Copy(ours, theirs - 1, 10),
            Copy(ours, theirs, 0),
            Copy(ours, theirs, -1),
            Copy(-1, theirs, 1),
            Copy(ours, 2**63 - 1, 2**63 - 1),
            Copy(ours, 2**64 - 1, 2),
            Copy(ours, theirs, 2**64),
        ]

        for copy in bad:
            assert refused(reader.transport.read, peer, [good, copy]), copy
        assert refused(reader.transport.read, peer, [])
        assert refused(reader.transport.read, PeerName("nobody"), [good])

        assert reader.transport.num_active == 0
        assert not reader.memory.data.any()


def check_bad_regions_are_refused(open_one: Open) -> None:
    memory = Memory(4096)
    overlap = Region(address=memory.address + 4095, num_bytes=10)
    bad: list[list[Region]] = [[], [Region(address=memory.address, num_bytes=0)], [memory.region, overlap]]
    for regions in bad:
        with rig(open_one) as made:
            transport = made.open(_new_name())
            try:
                assert refused(transport.register, regions), regions
            finally:
                transport.close()


def check_a_cancelled_read_ends_once_and_in_time(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(80 << 20)
        handle = reader.transport.read(peer, whole(reader, owner))
        reader.transport.cancel(handle)
        reader.transport.cancel(handle)

        outcomes = finish(reader.transport, owner.transport, deadline_s=CANCEL_BOUND_S)

        assert [outcome.handle for outcome in outcomes] == [handle]
        assert outcomes[0].state in ("done", "cancelled"), outcomes[0].error
        assert_quiet(reader, owner)
        reader.transport.cancel(handle)
        assert reader.transport.num_active == 0


def check_one_cancel_leaves_the_others_alone(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(24 << 20)
        kept: list[TransferHandle] = []
        for _ in range(3):
            kept.append(reader.transport.read(peer, whole(reader, owner)))
            reader.transport.cancel(reader.transport.read(peer, whole(reader, owner)))

        ended = {id(outcome.handle): outcome for outcome in finish(reader.transport, owner.transport)}

        assert len(ended) == 6
        assert states([ended[id(handle)] for handle in kept]) == ["done"] * 3
        assert np.array_equal(reader.memory.data, owner.memory.data)


def check_disconnect_ends_reads(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(80 << 20)
        other = made.agent(Memory(4096, seed=4))
        other_peer = reader.transport.connect(other.descriptor)
        handle = reader.transport.read(peer, whole(reader, owner))
        kept = reader.transport.read(other_peer, whole(reader, other))

        reader.transport.disconnect(peer)
        reader.transport.disconnect(peer)
        reader.transport.disconnect(PeerName("nobody"))
        ended = {id(outcome.handle): outcome for outcome in finish(reader.transport, owner.transport, other.transport)}

        assert ended[id(handle)].state == "failed"
        assert ended[id(handle)].error
        assert states([ended[id(kept)]]) == ["done"]
        assert refused(reader.transport.read, peer, whole(reader, owner))


def check_a_connection_can_come_up_before_the_first_read(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        reader.transport.warm(peer)
        reader.transport.warm(PeerName("nobody"))

        assert finish(reader.transport, owner.transport) == []
        assert (reader.memory.data == 0).all()

        reader.transport.warm(peer)
        reader.transport.read(peer, whole(reader, owner))

        assert states(finish(reader.transport, owner.transport)) == ["done"]
        assert np.array_equal(reader.memory.data, owner.memory.data)


def check_it_tells_whether_reads_get_on(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(24 << 20)
        before = reader.transport.movement(peer)
        reader.transport.read(peer, whole(reader, owner))
        assert states(finish(reader.transport, owner.transport)) == ["done"]
        after = reader.transport.movement(peer)

        assert (before.bytes_under_way, after.bytes_under_way) == (0, 0)
        assert after.num_arrived > before.num_arrived
        assert refused(reader.transport.movement, PeerName("nobody"))


def check_reads_go_on_over_a_new_connection(open_one: Open) -> None:
    """Those of the peer, once and whole, whether they had begun or not; a cancelled one ends."""
    with rig(open_one) as made:
        reader, owner, peer = made.pair(80 << 20)
        kept = [reader.transport.read(peer, whole(reader, owner)) for _ in range(2)]
        given_up = reader.transport.read(peer, whole(reader, owner))
        outcomes = list(reader.transport.poll())
        reader.transport.cancel(given_up)

        reader.transport.rebuild(peer)
        reader.transport.rebuild(PeerName("nobody"))
        run_until(lambda: reader.transport.num_active == 0, reader.transport, owner.transport, outcomes=outcomes)

        ended = {id(outcome.handle): outcome for outcome in outcomes}
        assert len(outcomes) == len(ended) == 3
        assert states([ended[id(handle)] for handle in kept]) == ["done"] * 2
        assert ended[id(given_up)].state in ("done", "cancelled"), ended[id(given_up)].error
        assert np.array_equal(reader.memory.data, owner.memory.data)
        assert_quiet(reader, owner)


def check_a_peer_can_be_connected_again(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        reader.transport.disconnect(peer)

        assert reader.transport.connect(owner.descriptor) == peer
        reader.transport.read(peer, whole(reader, owner))

        assert states(finish(reader.transport, owner.transport)) == ["done"]
        assert np.array_equal(reader.memory.data, owner.memory.data)


def check_reads_from_a_closed_peer_end(open_one: Open) -> None:
    """They fail, unless the connection was up and the memory still exists: some libraries then find it all the same."""
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        reader.transport.read(peer, whole(reader, owner))
        finish(reader.transport, owner.transport)
        other = made.agent(Memory(4096, seed=5))
        never_met = made.agent(Memory(4096))
        owner.transport.close()
        never_met.transport.close()

        known = reader.transport.read(peer, whole(reader, owner))
        lost = reader.transport.read(reader.transport.connect(never_met.descriptor), whole(reader, never_met))
        ended = {id(outcome.handle): outcome for outcome in finish(reader.transport)}
        reader.transport.read(reader.transport.connect(other.descriptor), whole(reader, other))
        done = finish(reader.transport, other.transport)

        assert ended[id(known)].state in ("done", "failed")
        assert ended[id(lost)].state == "failed"
        assert ended[id(lost)].error
        assert states(done) == ["done"]


def check_two_agents_may_read_from_each_other(open_one: Open) -> None:
    with rig(open_one) as made:
        one, two = made.agent(Memory(8192), Memory(8192, seed=6)), made.agent(Memory(8192), Memory(8192, seed=7))
        for reader, owner in ((one, two), (two, one)):
            peer = reader.transport.connect(owner.descriptor)
            reader.transport.read(peer, [Copy(reader.memory.address, owner.memories[1].address, 8192)])

        outcomes = run_until(
            lambda: one.transport.num_active + two.transport.num_active == 0, one.transport, two.transport
        )

        assert states(outcomes) == ["done", "done"]
        assert np.array_equal(one.memory.data, two.memories[1].data)
        assert np.array_equal(two.memory.data, one.memories[1].data)


def check_close_ends_reads_and_is_idempotent(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair(80 << 20)
        reader.transport.read(peer, whole(reader, owner))

        reader.transport.close()
        reader.transport.close()
        outcomes = reader.transport.poll()

        assert [outcome.state for outcome in outcomes] == ["failed"]
        assert reader.transport.num_active == 0
        assert_quiet(reader, owner)
        assert refused(reader.transport.read, peer, whole(reader, owner))


def check_idling_costs_nothing(open_one: Open) -> None:
    with rig(open_one) as made:
        reader, owner, peer = made.pair()
        reader.transport.read(peer, whole(reader, owner))
        finish(reader.transport, owner.transport)
        used_s = time.process_time()

        time.sleep(0.5)  # the measurement itself, not a wait for something

        assert time.process_time() - used_s < 0.05


def assert_quiet(reader: Agent, owner: Agent) -> None:
    """Nothing is written to the reader's memory any more, however much both sides progress."""
    reader.memory.data.fill(0xA5)
    for _ in range(200):
        reader.transport.poll()
        reader.transport.progress()
        owner.transport.progress()
    assert (reader.memory.data == 0xA5).all()


CHECKS: tuple[Check, ...] = (
    check_read_copies_exactly_what_was_asked,
    check_neighbours_are_joined,
    check_regions_that_touch_stay_apart,
    check_a_large_read_arrives_whole,
    check_many_small_copies_arrive,
    check_every_read_ends_once,
    check_connect_is_idempotent,
    check_it_tells_what_carries_reads,
    check_malformed_descriptors_are_refused,
    check_reads_out_of_bounds_are_refused,
    check_bad_regions_are_refused,
    check_a_cancelled_read_ends_once_and_in_time,
    check_one_cancel_leaves_the_others_alone,
    check_disconnect_ends_reads,
    check_a_connection_can_come_up_before_the_first_read,
    check_it_tells_whether_reads_get_on,
    check_reads_go_on_over_a_new_connection,
    check_a_peer_can_be_connected_again,
    check_reads_from_a_closed_peer_end,
    check_two_agents_may_read_from_each_other,
    check_close_ends_reads_and_is_idempotent,
    check_idling_costs_nothing,
)
"""The contract."""
