"""The `nixl` transport alone, against raw NIXL with the same descriptors and against a plain memory copy.

    taskset -c 0,1 python -m benchmarks.kv_transfer

Two processes on one machine: this one reads, the other owns the memory that is read. In each repetition every shape of
read is timed in the three ways, one after the other, so that each ratio is of neighbours in time and a slow moment of
the machine does not fall on one shape alone. All orders of the three take turns: whichever reads second finds the
memory in a warmer cache.

- ours: `read` with a list of copies, then `poll` and `progress` until the outcome. Checking and joining the copies is
  in the time.
- raw: one NIXL transfer of the same copies, from tables that are ready, in the way NIXL is fastest: no progress thread,
  one request, polled without a pause. Preparing and releasing it is in the time; it has no checks, no batches and no
  way to cancel.
- memcpy: the same number of bytes in one piece, within this process.

Copies never touch each other, so that nothing is joined. Each shape is read once by both before it is timed, and
compared byte by byte.
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
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ROOT, OtherLoad, busy_seconds, fact_list, facts, table
from vllm_disagg.testing.check_transport import Memory, finish
from vllm_disagg.transport import open_transport
from vllm_disagg.transport.base import Copy, PeerName, Transport
from vllm_disagg.transport.layout import RankLayout, Segment, plan_reads, plan_routes

KIB, MIB = 1 << 10, 1 << 20
MEMORY_BYTES = 192 * MIB
SEED = 5
ANSWER = b"owner: "
WARM_UPS = 5
"""Repetitions that are not reported."""

NUM_LAYERS, BLOCK_BYTES, BLOCKS_PER_LAYER = 30, 48 * KIB, 128
"""SmolLM2-135M in float32, 32 tokens per block: 2 x 3 heads x 64 x 4 bytes x 32 tokens."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Copies as offsets: `(local, remote, num_bytes)`."""

    name: str
    offsets: tuple[tuple[int, int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, _, num_bytes in self.offsets)


def equal_pieces(num_pieces: int, num_bytes: int, name: str) -> Shape:
    """Pieces with a gap as long as a piece after each, in another order on either side."""
    order = np.random.default_rng(SEED).permutation(num_pieces)
    stride = num_bytes if num_pieces == 1 else 2 * num_bytes
    offsets = tuple((near * stride, int(far) * stride, num_bytes) for near, far in enumerate(order))
    return Shape(name=name, offsets=offsets)


def kv_layout(num_blocks: int) -> Shape:
    """A prompt's blocks in every layer, as runs of one to four that lie scattered over either cache."""
    layers = tuple(
        Segment(
            name=f"layer{index}",
            address=index * BLOCKS_PER_LAYER * BLOCK_BYTES,
            num_blocks=BLOCKS_PER_LAYER,
            block_stride=BLOCK_BYTES,
            first_head=0,
            num_heads=1,
            head_stride=BLOCK_BYTES,
            num_rows=1,
            row_stride=BLOCK_BYTES,
            row_bytes=BLOCK_BYTES,
        )
        for index in range(NUM_LAYERS)
    )
    layout = RankLayout(groups=(layers,))
    random = np.random.default_rng(SEED)
    lengths = [1, 2, 3, 4] * (num_blocks // 10)
    near, far = (_scattered(lengths, random) for _ in range(2))
    copies = plan_reads(plan_routes(layout, [layout])[0], (tuple(near),), (tuple(far),))
    name = f"{NUM_LAYERS} layers x {sum(lengths)} blocks of {BLOCK_BYTES // KIB} KiB in runs of 1-4"
    return Shape(name=name, offsets=tuple((copy.local, copy.remote, copy.num_bytes) for copy in copies))


def _scattered(lengths: Sequence[int], random: np.random.Generator) -> list[int]:
    """Block numbers of runs of these lengths, none next to another, placed in a random order; block 0 is never used."""
    places, at = {}, 1
    for run in random.permutation(len(lengths)):
        places[int(run)] = at
        at += lengths[run] + 1
    assert at <= BLOCKS_PER_LAYER
    return [places[run] + index for run, length in enumerate(lengths) for index in range(length)]


SHAPES = (
    equal_pieces(1, 64 * MIB, "1 x 64 MiB"),
    equal_pieces(64, MIB, "64 x 1 MiB"),
    equal_pieces(1024, 64 * KIB, "1024 x 64 KiB"),
    equal_pieces(4096, 16 * KIB, "4096 x 16 KiB"),
    kv_layout(40),
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
    metadata: bytes


@contextmanager
def owner_process(core: int | None) -> Iterator[Owner]:
    """Start the owner on its core, and end it."""
    argv = [sys.executable, "-m", "benchmarks.kv_transfer", "--own", "" if core is None else str(core)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith(ANSWER))
        address, descriptor, metadata = line.removeprefix(ANSWER).split()
        yield Owner(address=int(address), descriptor=base64.b64decode(descriptor), metadata=base64.b64decode(metadata))
    finally:
        process.kill()
        process.communicate()


def own(core: str) -> None:
    """Be the owner, until the reader is gone: make progress all the time, as a peer that is read through TCP must."""
    if core:
        os.sched_setaffinity(0, {int(core)})
    memory = Memory(MEMORY_BYTES, seed=SEED)
    transport, raw = open_transport("nixl", f"owner-{os.getpid()}"), Raw(f"raw-owner-{os.getpid()}", memory)
    parts = [transport.register([memory.region]), raw.metadata()]
    line = b" ".join([str(memory.address).encode(), *map(base64.b64encode, parts)])
    os.write(sys.stdout.fileno(), ANSWER + line + b"\n")
    while not select.select([sys.stdin], [], [], 0)[0]:
        transport.progress()
        raw.agent.get_new_notifs()


class Reader:
    """Reads a shape in each of the three ways."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._memory, self._source = Memory(MEMORY_BYTES), Memory(MEMORY_BYTES, seed=SEED)
        self._transport: Transport = open_transport("nixl", f"reader-{os.getpid()}")
        self._transport.register([self._memory.region])
        self._peer: PeerName = self._transport.connect(owner.descriptor)
        self._raw = Raw(f"raw-reader-{os.getpid()}", self._memory)
        self._raw_peer = self._raw.connect(owner.metadata)

    def ways(self, shape: Shape) -> dict[str, Callable[[], int]]:
        """Each way to read the shape, ready to go; returns how many copies the library was given."""
        offsets = np.array(shape.offsets, np.uint64)
        near, far = self._memory.address + offsets[:, 0], self._owner.address + offsets[:, 1]
        devices = np.zeros_like(near)
        tables = [np.stack((side, offsets[:, 2], devices), axis=1) for side in (near, far)]
        triples = zip(near.tolist(), far.tolist(), offsets[:, 2].tolist(), strict=True)
        copies = [Copy(local, remote, size) for local, remote, size in triples]

        def ours() -> int:
            self._transport.read(self._peer, copies)
            (outcome,) = finish(self._transport)
            assert outcome.state == "done", outcome
            return outcome.num_descriptors

        def raw() -> int:
            self._raw.read(self._raw_peer, *tables)
            return len(copies)

        def memcpy() -> int:
            ctypes.memmove(self._memory.address, self._source.address, shape.num_bytes)
            return 1

        return {"ours": ours, "raw": raw, "memcpy": memcpy}

    def check(self, shape: Shape, read: Callable[[], int]) -> int:
        """Read once, untimed, and compare every byte."""
        self._memory.data.fill(0)
        num_descriptors = read()
        for local, remote, num_bytes in shape.offsets:
            near, far = self._memory.data[local : local + num_bytes], self._source.data[remote : remote + num_bytes]
            assert np.array_equal(near, far), f"{shape.name}: wrong bytes at {local}"
        return num_descriptors

    def close(self) -> None:
        self._transport.close()


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
        counts = {way: reader.check(shape, ways[way]) for way in ("ours", "raw")}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        results.append(
            {"shape": shape.name, "num_bytes": shape.num_bytes, "num_descriptors": counts, "gb_per_s": rates}
        )
        all_ways.append(ways)
    for repetition in range(-WARM_UPS, repetitions):
        for result, ways in zip(results, all_ways, strict=True):
            orders = list(permutations(ways))
            for name in orders[repetition % len(orders)]:
                rate = result["num_bytes"] / timed(ways[name]) / 1e9
                if repetition >= 0:
                    result["gb_per_s"][name].append(rate)
    return results


def spread(values: Sequence[float]) -> str:
    """Median, and in brackets the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def report(results: Sequence[dict[str, Any]]) -> str:
    """The table: both sides of each ratio, and the ratios of pairs."""
    head = ("read", "MiB", "descriptors ours/raw", "ours GB/s", "raw GB/s", "memcpy GB/s", "ours/raw", "ours/memcpy")
    rows = []
    for result in results:
        rates, counts = result["gb_per_s"], result["num_descriptors"]
        ratios = {
            other: [one / two for one, two in zip(rates["ours"], rates[other], strict=True)]
            for other in ("raw", "memcpy")
        }
        rows.append(
            (
                result["shape"], f"{result['num_bytes'] / MIB:.0f}", f"{counts['ours']}/{counts['raw']}",
                *(spread(rates[name]) for name in ("ours", "raw", "memcpy")),
                *(spread(ratios[name]) for name in ("raw", "memcpy")),
            )
        )  # fmt: skip
    return table(head, rows)


def own_cpu_seconds() -> float:
    """Processor time of this process and of the owner once it has ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def main() -> None:
    """Measure, print, and write the result if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_transfer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repetitions", type=int, default=60, help="how often each shape is timed (default: 60)")
    parser.add_argument("--out", type=Path, help="write PATH.md and PATH.json")
    parser.add_argument("--own", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.modules["torch"] = None  # type: ignore[assignment]  # NIXL imports it to learn of CUDA, which takes a second
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
        results = measure(reader, SHAPES, arguments.repetitions)
        reader.close()
        os.sched_setaffinity(0, cores)
    wall_s, busy_s, cpu_s = time.perf_counter() - start_s, busy_seconds(cores) - busy_s, own_cpu_seconds() - cpu_s
    found = facts("benchmarks.kv_transfer", other_load)
    found["used cores"] = f"other processes took {max(0.0, busy_s - cpu_s):.1f} s of their {wall_s * len(cores):.1f} s"
    text = (
        f"# KV transfer: the transport alone\n\n{fact_list(found)}\n\n"
        f"Median (least-most) of {arguments.repetitions} repetitions. GB/s: 10^9 bytes per second, more is better. "
        "Ratios are of the two\nreads of one repetition.\n\n"
        f"{report(results)}\n"
    )
    print(text)
    if arguments.out is not None:
        arguments.out.with_suffix(".md").write_text(text)
        arguments.out.with_suffix(".json").write_text(json.dumps({"facts": found, "results": results}) + "\n")


if __name__ == "__main__":
    main()
