"""The transports alone, against raw NIXL with the same descriptors and against a plain memory copy.

    taskset -c 0,1 python -m benchmarks.kv_transfer

Two processes on one machine: this one reads, the other owns the memory that is read. In each repetition every shape of
read is timed in all ways, one after the other, so that each ratio is of neighbours in time and a slow moment of the
machine does not fall on one shape alone. The ways take turns in going first: whichever reads second finds the memory in
a warmer cache.

- ours: from block numbers or a list of copies to the outcome, by the `nixl` transport. Planning, checking and joining
  the copies is in the time.
- raw: one NIXL transfer of the joined copies, from tables that are ready, in the way NIXL is fastest: no progress
  thread, one request, polled without a pause. Preparing and releasing it is in the time; it has no checks, no batches
  and no way to cancel.
- raw, one piece: the same number of bytes as one descriptor: the most that NIXL can do.
- gloo: ours by the `nccl` transport, which sends messages.
- memcpy: the same number of bytes in one piece, within this process.

Each shape is read once in each way before it is timed, and compared byte by byte.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ROOT, OtherLoad, busy_seconds, fact_list, facts, table
from vllm_disagg.testing.check_transport import Memory, finish
from vllm_disagg.transport import open_transport
from vllm_disagg.transport.base import Copy, Region, Transport
from vllm_disagg.transport.layout import RankLayout, Routes, Segment, plan_reads, plan_routes
from vllm_disagg.transport.regions import CopyTable, RegionTable, plan_copies

KIB, MIB = 1 << 10, 1 << 20
MEMORY_BYTES = 640 * MIB
SEED = 5
ANSWER = b"owner: "
WARM_UPS = 2
"""Repetitions that are not reported."""

NUM_LAYERS, BLOCK_BYTES, BLOCKS_PER_LAYER = 32, 16 * KIB, 1200
"""Llama-3-8B in bfloat16 on one of four tensor-parallel ranks: 2 x 2 heads x 128 x 2 bytes x 16 tokens of a block."""

Plan = Callable[[int, int], Sequence[Copy]]
"""The copies of a read, given where our memory and the owner's begin."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What to read."""

    name: str
    plan: Plan


def equal_pieces(num_pieces: int, num_bytes: int, name: str) -> Shape:
    """Pieces with a gap as long as a piece after each, in another order on either side."""
    order = np.random.default_rng(SEED).permutation(num_pieces)
    stride = num_bytes if num_pieces == 1 else 2 * num_bytes

    def plan(near: int, far: int) -> Sequence[Copy]:
        columns = near + np.arange(num_pieces) * stride, far + order * stride, np.full(num_pieces, num_bytes)
        return CopyTable(np.stack(columns, axis=1))

    return Shape(name=name, plan=plan)


def kv_blocks(near_blocks: Sequence[int], far_blocks: Sequence[int], name: str) -> Shape:
    """A prompt's blocks in every layer."""
    assert max(*near_blocks, *far_blocks) < BLOCKS_PER_LAYER
    blocks = (tuple(near_blocks),), (tuple(far_blocks),)

    def plan(near: int, far: int) -> Sequence[Copy]:
        return plan_reads(routes_between(near, far), *blocks)

    return Shape(name=f"{name}: {len(near_blocks)} blocks x {NUM_LAYERS} layers x {BLOCK_BYTES // KIB} KiB", plan=plan)


@cache
def routes_between(near: int, far: int) -> Routes:
    """Made once when two engines meet."""
    ours, theirs = (RankLayout(groups=(tuple(layers_at(base)),)) for base in (near, far))
    return plan_routes(ours, [theirs])[0]


def layers_at(base: int) -> Iterator[Segment]:
    for index in range(NUM_LAYERS):
        yield Segment(
            name=f"layer{index}",
            address=base + index * BLOCKS_PER_LAYER * BLOCK_BYTES,
            num_blocks=BLOCKS_PER_LAYER,
            block_stride=BLOCK_BYTES,
            first_head=0,
            num_heads=1,
            head_stride=BLOCK_BYTES,
            num_rows=1,
            row_stride=BLOCK_BYTES,
            row_bytes=BLOCK_BYTES,
        )


def in_runs(num_blocks: int, longest: int, random: np.random.Generator) -> tuple[list[int], list[int]]:
    """Block numbers on both sides: runs of one to `longest`, in a random order, with a block between any two."""
    lengths: list[int] = []
    while (left := num_blocks - sum(lengths)) > 0:
        lengths.append(min(left, int(random.integers(1, longest + 1))))
    sides: list[list[int]] = []
    for _ in range(2):
        places, at = {}, 1
        for run in random.permutation(len(lengths)).tolist():
            places[run] = at
            at += lengths[run] + 1
        sides.append([places[run] + index for run, length in enumerate(lengths) for index in range(length)])
    return sides[0], sides[1]


def shapes() -> tuple[Shape, ...]:
    """All that is measured."""
    random = np.random.default_rng(SEED)
    return (
        equal_pieces(1, 64 * MIB, "1 x 64 MiB"),
        equal_pieces(64, MIB, "64 x 1 MiB"),
        equal_pieces(1024, 64 * KIB, "1024 x 64 KiB"),
        equal_pieces(4096, 16 * KIB, "4096 x 16 KiB"),
        kv_blocks(range(1, 1001), range(100, 1100), "in order"),
        kv_blocks(range(1000, 0, -1), range(1100, 100, -1), "given out again"),
        kv_blocks(*in_runs(1000, 16, random), "in runs of 1-16"),
        kv_blocks(*(random.permutation(np.arange(1, 1001)).tolist() for _ in range(2)), "scattered"),
    )


class Raw:
    """A NIXL agent as NIXL's own examples use it, without its progress thread, which is slower on a shared core."""

    def __init__(self, name: str, memory: Memory) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
        self.agent.create_backend("UCX", {})
        self.agent.register_memory([(memory.address, len(memory.data), 0, "")], "DRAM")

    def metadata(self) -> bytes:
        return bytes(self.agent.get_agent_metadata())

    def connect(self, metadata: bytes) -> str:
        name = self.agent.add_remote_agent(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def read(self, peer: str, near: np.ndarray[Any, Any], far: np.ndarray[Any, Any]) -> None:
        near_list, far_list = (self.agent.get_xfer_descs(side, "DRAM") for side in (near, far))
        handle = self.agent.initialize_xfer("READ", near_list, far_list, peer)
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        assert state == "DONE", state
        self.agent.release_xfer_handle(handle)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What the reading side knows of the process it reads from."""

    address: int
    descriptor: bytes
    nccl_descriptor: bytes
    metadata: bytes


@contextmanager
def owner_process(core: int | None) -> Iterator[Owner]:
    """Start the owner on its core, and end it."""
    argv = [sys.executable, "-m", "benchmarks.kv_transfer", "--own", "" if core is None else str(core)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith(ANSWER))
        address, *parts = line.removeprefix(ANSWER).split()
        descriptor, nccl_descriptor, metadata = map(base64.b64decode, parts)
        yield Owner(address=int(address), descriptor=descriptor, nccl_descriptor=nccl_descriptor, metadata=metadata)
    finally:
        process.kill()
        process.communicate()


def own(core: str) -> None:
    """Be the owner, until the reader is gone. Where the owner must answer reads it makes progress all the time."""
    if core:
        os.sched_setaffinity(0, {int(core)})
    memory = Memory(MEMORY_BYTES, seed=SEED)
    name = f"owner-{os.getpid()}"
    transports, raw = [open_transport("nixl", name), open_transport("nccl", name)], Raw(f"raw-{name}", memory)
    parts = [transport.register([memory.region]) for transport in transports] + [raw.metadata()]
    line = b" ".join([str(memory.address).encode(), *map(base64.b64encode, parts)])
    os.write(sys.stdout.fileno(), ANSWER + line + b"\n")
    pause_s = 0.0 if "UCX_TLS" in os.environ else 0.001
    while not select.select([sys.stdin], [], [], pause_s)[0]:
        transports[0].progress()
        raw.agent.get_new_notifs()


class Reader:
    """Reads a shape in each of the ways."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._memory, self._source = Memory(MEMORY_BYTES), Memory(MEMORY_BYTES, seed=SEED)
        self._nixl, self._gloo = (open_transport(name, f"reader-{os.getpid()}") for name in ("nixl", "nccl"))
        for transport in (self._nixl, self._gloo):
            transport.register([self._memory.region])
        self._peers = {
            "nixl": self._nixl.connect(owner.descriptor), "nccl": self._gloo.connect(owner.nccl_descriptor),
        }  # fmt: skip
        self._raw = Raw(f"raw-reader-{os.getpid()}", self._memory)
        self._raw_peer = self._raw.connect(owner.metadata)

    def ways(self, shape: Shape) -> dict[str, Callable[[], int]]:
        """Each way to read the shape, ready to go; returns how many copies the library was given."""
        ours, theirs = (RegionTable([Region(address=at, num_bytes=MEMORY_BYTES)]) for at in self._addresses)
        runs = plan_copies(shape.plan(*self._addresses), ours=ours, theirs=theirs, max_bytes=MEMORY_BYTES)
        tables = [np.stack((side, runs.num_bytes, np.zeros_like(side)), axis=1) for side in (runs.local, runs.remote)]
        whole = [np.array([(at, runs.total, 0)], np.uint64) for at in self._addresses]

        def raw(near: np.ndarray[Any, Any], far: np.ndarray[Any, Any]) -> int:
            self._raw.read(self._raw_peer, near, far)
            return len(near)

        def memcpy() -> int:
            ctypes.memmove(self._memory.address, self._source.address, runs.total)
            return 1

        return {
            "ours": partial(self._read, self._nixl, shape), "raw": partial(raw, *tables),
            "raw, one piece": partial(raw, *whole), "gloo": partial(self._read, self._gloo, shape), "memcpy": memcpy,
        }  # fmt: skip

    @property
    def _addresses(self) -> tuple[int, int]:
        return self._memory.address, self._owner.address

    def _read(self, transport: Transport, shape: Shape) -> int:
        transport.read(self._peers[transport.name], shape.plan(*self._addresses))
        (outcome,) = finish(transport)
        assert outcome.state == "done", outcome
        return outcome.num_descriptors

    def check(self, shape: Shape, read: Callable[[], int]) -> tuple[int, int]:
        """Read once, untimed, and compare every byte. Returns the bytes and how many copies the library was given."""
        self._memory.data.fill(0)
        num_descriptors, num_bytes = read(), 0
        for copy in shape.plan(0, 0):
            near = self._memory.data[copy.local : copy.local + copy.num_bytes]
            far = self._source.data[copy.remote : copy.remote + copy.num_bytes]
            assert np.array_equal(near, far), f"{shape.name}: wrong bytes at {copy.local}"
            num_bytes += copy.num_bytes
        return num_bytes, num_descriptors

    def close(self) -> None:
        self._nixl.close()
        self._gloo.close()


def timed(call: Callable[[], int]) -> float:
    """Seconds of one call."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def measure(reader: Reader, shapes: Sequence[Shape], repetitions: int) -> list[dict[str, Any]]:
    """GB/s of each way in each repetition, by shape."""
    results: list[dict[str, Any]] = []
    all_ways: list[dict[str, Callable[[], int]]] = []
    for shape in shapes:
        ways = reader.ways(shape)
        checked = {way: reader.check(shape, ways[way]) for way in ("ours", "raw", "gloo")}
        counts = {way: num_descriptors for way, (_, num_descriptors) in checked.items()}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        results.append(
            {"shape": shape.name, "num_bytes": checked["ours"][0], "num_descriptors": counts, "gb_per_s": rates}
        )
        all_ways.append(ways)
    for repetition in range(-WARM_UPS, repetitions):
        for result, ways in zip(results, all_ways, strict=True):
            names = list(ways)
            if repetition % 2:
                names.reverse()
            first = repetition // 2 % len(names)
            for name in names[first:] + names[:first]:
                rate = result["num_bytes"] / timed(ways[name]) / 1e9
                if repetition >= 0:
                    result["gb_per_s"][name].append(rate)
    return results


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def report(results: Sequence[dict[str, Any]]) -> str:
    """The tables: rates, and ratios of pairs."""
    ways = tuple(results[0]["gb_per_s"])
    others = ("raw", "raw, one piece", "memcpy")
    rates, ratios = [], []
    for result in results:
        found, counts = result["gb_per_s"], result["num_descriptors"]
        rates.append(
            (
                result["shape"], f"{result['num_bytes'] / MIB:.0f}", f"{counts['ours']}/{counts['raw']}",
                *(spread(found[way]) for way in ways),
            )
        )  # fmt: skip
        paired = {other: [one / two for one, two in zip(found["ours"], found[other], strict=True)] for other in others}
        ratios.append((result["shape"], *(spread(paired[other]) for other in others)))
    return (
        f"GB/s:\n\n{table(('read', 'MiB', 'descriptors ours/raw', *ways), rates)}\n\n"
        f"Ratios:\n\n{table(('read', *(f'ours/{other}' for other in others)), ratios)}"
    )


def own_cpu_seconds() -> float:
    """Processor time of this process and of the owner once it has ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def main() -> None:
    """Measure, print, and write the result if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_transfer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repetitions", type=int, default=30, help="how often each shape is timed (default: 30)")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    parser.add_argument("--own", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    if arguments.own is not None:
        own(arguments.own)
        return
    cores = sorted(os.sched_getaffinity(0))
    owner_core = cores[1] if len(cores) > 1 else None
    start_s, busy_s, cpu_s = time.perf_counter(), busy_seconds(cores), own_cpu_seconds()
    with OtherLoad() as other_load, owner_process(owner_core) as owner:
        os.sched_setaffinity(0, {cores[0]})
        reader = Reader(owner)
        results = measure(reader, shapes(), arguments.repetitions)
        reader.close()
        os.sched_setaffinity(0, cores)
    wall_s, busy_s, cpu_s = time.perf_counter() - start_s, busy_seconds(cores) - busy_s, own_cpu_seconds() - cpu_s
    found = facts("benchmarks.kv_transfer", other_load)
    found["used cores"] = f"other processes took {max(0.0, busy_s - cpu_s):.1f} s of their {wall_s * len(cores):.1f} s"
    text = (
        f"# KV transfer: the transport alone\n\n{fact_list(found)}\n\n"
        f"Median (least-most) of {arguments.repetitions} repetitions. GB/s: 10^9 bytes per second, more is better. "
        "Ratios are of the two\nreads of one repetition. One core for each process.\n\n"
        f"{report(results)}\n"
    )
    print(text)
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(json.dumps({"facts": found, "results": results}) + "\n")


if __name__ == "__main__":
    main()
