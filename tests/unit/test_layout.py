"""Where blocks and heads lie, which ranks have to read each other, and which copies move what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vllm_disagg.errors import IncompatiblePeer
from vllm_disagg.transport.base import Region
from vllm_disagg.transport.layout import RankLayout, Segment, describe_heads, plan_reads, plan_routes
from vllm_disagg.transport.regions import RegionTable, plan_copies

Bytes = NDArray[np.uint8]


def segment(name: str, *, address: int, stride: int = 64, heads: range = range(4), num_blocks: int = 40) -> Segment:
    """Heads of 16 bytes per block, one after the other."""
    return Segment(
        name=name, address=address, num_blocks=num_blocks, block_stride=stride, first_head=heads.start,
        num_heads=len(heads), head_stride=16, num_rows=1, row_stride=16, row_bytes=16,
    )  # fmt: skip


def inseparable(name: str, *, heads: range, size: int = 64) -> Segment:
    return Segment(
        name=name, address=0, num_blocks=40, block_stride=size, first_head=heads.start,
        num_heads=len(heads), head_stride=0, num_rows=1, row_stride=size, row_bytes=size,
    )  # fmt: skip


def layout(*groups: tuple[Segment, ...]) -> RankLayout:
    return RankLayout(groups=groups)


WHOLE = layout((segment("l0", address=0),))


def copies_of(near: RankLayout, far: RankLayout, mine: Any, other: Any) -> list[tuple[int, int, int]]:
    """What is read of one rank that has all we need."""
    (routes,) = plan_routes(near, [far]).values()
    return [(copy.local, copy.remote, copy.num_bytes) for copy in plan_reads(routes, mine, other)]


def test_neighbouring_blocks_become_one_copy() -> None:
    near, far = layout((segment("l0", address=1000),)), layout((segment("l0", address=9000),))

    assert copies_of(near, far, ((4, 5, 6, 9),), ((1, 2, 3, 4),)) == [
        (1000 + 4 * 64, 9000 + 64, 3 * 64),
        (1000 + 9 * 64, 9000 + 4 * 64, 64),
    ]


def test_blocks_that_are_padded_on_one_side_are_copied_one_by_one() -> None:
    near, far = layout((segment("l0", address=0, stride=80),)), layout((segment("l0", address=9000),))

    assert [size for _, _, size in copies_of(near, far, ((1, 2),), ((1, 2),))] == [64, 64]


def test_placeholder_blocks_are_left_out() -> None:
    near, far = layout((segment("l0", address=0),)), layout((segment("l0", address=9000),))

    assert len(copies_of(near, far, ((0, 2, 5),), ((1, 0, 7),))) == 1


def test_layers_are_matched_by_name_not_by_order() -> None:
    near = layout((segment("l0", address=0), segment("l1", address=10_000)))
    far = layout((segment("l1", address=20_000), segment("l0", address=30_000)))

    copies = copies_of(near, far, ((1,),), ((1,),))

    assert {(local, remote) for local, remote, _ in copies} == {(64, 30_064), (10_064, 20_064)}


@pytest.mark.parametrize(
    "blocks", [(((1, 2),), ((1,),)), (((41,),), ((1,),)), (((1,),), ((41,),)), (((-1,),), ((1,),))]
)
def test_blocks_that_do_not_pair_or_lie_outside_are_refused(blocks: tuple[Any, Any]) -> None:
    near, far = layout((segment("l0", address=0),)), layout((segment("l0", address=9000),))

    with pytest.raises(ValueError, match="blocks"):
        copies_of(near, far, *blocks)


def test_two_ranks_make_one() -> None:
    near = layout((segment("l0", address=0, heads=range(4)),))
    halves = [layout((segment("l0", address=9000, stride=32, heads=heads),)) for heads in (range(2), range(2, 4))]

    routes = plan_routes(near, halves)
    copies = [plan_reads(routes[index], ((3,),), ((5,),)) for index in (0, 1)]

    assert [[(copy.local, copy.remote, copy.num_bytes) for copy in of_rank] for of_rank in copies] == [
        [(3 * 64, 9000 + 5 * 32, 32)],
        [(3 * 64 + 32, 9000 + 5 * 32, 32)],
    ]


def test_one_rank_makes_two_and_each_reads_its_half() -> None:
    whole = layout((segment("l0", address=9000),))
    second = layout((segment("l0", address=0, stride=32, heads=range(2, 4)),))

    assert copies_of(second, whole, ((3, 4),), ((5, 6),)) == [
        (3 * 32, 9000 + 5 * 64 + 32, 32),
        (4 * 32, 9000 + 6 * 64 + 32, 32),
    ]


def test_shares_that_do_not_divide_each_other_are_taken_from_several_ranks() -> None:
    thirds = [layout((segment("l0", address=0, heads=range(2 * i, 2 * i + 2)),)) for i in range(3)]
    half = layout((segment("l0", address=0, heads=range(3, 6)),))

    routes = plan_routes(half, thirds)

    assert {index: [piece[2] for piece in group[0].pieces] for index, (group,) in routes.items()} == {1: [16], 2: [32]}


def test_a_rank_reads_only_the_stages_that_have_its_layers() -> None:
    stages = [layout((segment(f"l{layer}", address=0),)) for layer in range(4)]
    near = layout((segment("l1", address=0), segment("l2", address=9000)))

    assert list(plan_routes(near, stages)) == [1, 2]


def test_ranks_that_hold_the_same_share_the_load() -> None:
    copies = [layout((segment("l0", address=0, heads=range(1)),)) for _ in range(4)]
    near = layout((segment("l0", address=0, heads=range(1)),))

    assert [list(plan_routes(near, copies, spread=spread)) for spread in range(5)] == [[0], [1], [2], [3], [0]]


@pytest.mark.parametrize(
    ("near", "far", "factor"),
    [
        (
            layout((inseparable("l0", heads=range(2)),)),
            layout((inseparable("l0", heads=range(4)),)),
            "tensor parallel size is .* holds heads 0-1 of l0 inseparably' here and .* 0-3 inseparably",
        ),
        (WHOLE, layout((segment("other", address=0),)), "KV cache of l0 is 'present' here and 'absent'"),
        (WHOLE, layout((segment("l0", address=0, heads=range(2)),)), "KV heads of l0 is '0-3' here and '0-1'"),
        (WHOLE, layout((segment("l0", address=0, heads=range(3, 4)),)), "KV heads of l0 is '0-3' here and '3'"),
        (WHOLE, layout((segment("l0", address=0),), (segment("l1", address=0),)), "number of KV cache groups"),
    ],
)
def test_what_cannot_be_cut_out_of_a_peer_is_refused_by_name(near: RankLayout, far: RankLayout, factor: str) -> None:
    with pytest.raises(IncompatiblePeer, match=factor):
        plan_routes(near, [far])


def test_other_sizes_of_a_head_are_refused_by_name() -> None:
    near, far = inseparable("l0", heads=range(1), size=64), inseparable("l0", heads=range(1), size=32)

    with pytest.raises(IncompatiblePeer, match="bytes per block of a KV head of l0 is '64' here and '32'"):
        plan_routes(layout((near,)), [layout((far,))])


def test_inseparable_heads_are_read_whole_by_a_rank_with_the_same() -> None:
    near = layout((inseparable("l0", heads=range(4, 8)),))
    far = [layout((inseparable("l0", heads=heads),)) for heads in (range(4), range(4, 8))]

    ((index, routes),) = plan_routes(near, far).items()
    (copy,) = plan_reads(routes, ((1, 2),), ((5, 6),))

    assert (index, copy.local, copy.remote, copy.num_bytes) == (1, 64, 320, 128)


def test_an_engine_is_described_the_same_however_it_is_shared() -> None:
    whole = [layout((segment("l0", address=0), segment("l1", address=9000)))]
    stages = [layout((segment(name, address=0),)) for name in ("l0", "l1")]
    halves = [
        layout(tuple(segment(name, address=0, heads=heads) for name in ("l0", "l1")))
        for heads in (range(2), range(2, 4))
    ]
    others = [layout((segment("l0", address=0, heads=range(2)), segment("l1", address=9000)))]

    assert describe_heads(whole) == describe_heads(stages) == describe_heads(halves)
    assert describe_heads(whole) != describe_heads(others)


# Every byte to its place, exactly once.


ORDERS = {"LBHNC": "lbhnc", "LBNHC": "lbnhc", "LHBNC": "lhbnc", "BLHNC": "blhnc", "BHLNC": "bhlnc"}
"""Orders of memory that vLLM's attention backends have."""


@dataclass(frozen=True)
class Model:
    num_layers: int
    num_heads: int
    num_tokens: int
    content: int
    order: str


@dataclass
class Rank:
    """One rank's memory, and its KV cache as `[layer][block, head, token, content]` views of it."""

    layers: range
    heads: range
    memory: Bytes
    caches: dict[int, Bytes]
    layout: RankLayout


def rank(model: Model, layers: range, heads: range, num_blocks: int) -> Rank:
    sizes = {"l": len(layers), "b": num_blocks, "h": len(heads), "n": model.num_tokens, "c": model.content}
    order = ORDERS[model.order]
    margin = 7
    memory: Bytes = np.zeros(2 * margin + int(np.prod(list(sizes.values()))), np.uint8)
    stored = memory[margin:-margin].reshape([sizes[axis] for axis in order])
    logical = stored.transpose([order.index(axis) for axis in "lbhnc"])
    caches = {layer: logical[index] for index, layer in enumerate(layers)}
    segments = tuple(_segment(f"l{layer}", cache, memory, heads) for layer, cache in caches.items())
    return Rank(layers, heads, memory, caches, layout(segments))


def _segment(name: str, cache: Bytes, memory: Bytes, heads: range) -> Segment:
    num_blocks, num_heads, num_tokens, content = cache.shape
    in_one_piece = cache.strides[2] == content
    return Segment(
        name=name,
        address=cache.ctypes.data - memory.ctypes.data,
        num_blocks=num_blocks,
        block_stride=cache.strides[0],
        first_head=heads.start,
        num_heads=num_heads,
        head_stride=cache.strides[1] or 1,
        num_rows=1 if in_one_piece else num_tokens,
        row_stride=cache.strides[2],
        row_bytes=content * num_tokens if in_one_piece else content,
    )


def engine(model: Model, tp: int, stages: Sequence[range], num_blocks: int) -> list[Rank]:
    """All ranks of an engine, as vLLM shares heads and layers among them."""
    shares = min(tp, model.num_heads)
    each = model.num_heads // shares
    firsts = [index * shares // tp * each for index in range(tp)]
    return [rank(model, layers, range(first, first + each), num_blocks) for layers in stages for first in firsts]


@st.composite
def stages_of(draw: st.DrawFn, num_layers: int) -> list[range]:
    cuts = draw(st.lists(st.integers(1, num_layers - 1), unique=True, max_size=3)) if num_layers > 1 else []
    edges = [0, *sorted(cuts), num_layers]
    return [range(begin, end) for begin, end in pairwise(edges)]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Model, list[Rank], list[Rank], list[int], list[int], int]:
    model = Model(
        num_layers=draw(st.integers(1, 5)),
        num_heads=draw(st.sampled_from([1, 1, 2, 3, 4, 6, 8])),
        num_tokens=draw(st.integers(1, 3)),
        content=draw(st.integers(1, 3)),
        order=draw(st.sampled_from(sorted(ORDERS))),
    )
    degrees = [tp for tp in (1, 2, 3, 4, 6, 8) if model.num_heads % tp == 0 or tp % model.num_heads == 0]
    mine, other = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    decode = engine(model, draw(st.sampled_from(degrees)), draw(stages_of(model.num_layers)), mine)
    prefill = engine(model, draw(st.sampled_from(degrees)), draw(stages_of(model.num_layers)), other)
    count = draw(st.integers(0, min(mine, other) - 1))
    local = draw(st.permutations(range(1, mine)))[:count]
    remote = draw(st.permutations(range(1, other)))[:count]
    if draw(st.booleans()):
        local, remote = sorted(local), sorted(remote)
    return model, decode, prefill, local, remote, draw(st.integers(0, 100))


Drawn = tuple[Model, list[Rank], list[Rank], list[int], list[int], int]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs())
def test_every_byte_moves_to_its_place_exactly_once(drawn: Drawn) -> None:
    moves_every_byte_once_in_as_few_copies_as_can_be(drawn)


@pytest.mark.full
@settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs())
def test_every_byte_of_thousands_of_pairs_moves_to_its_place_exactly_once(drawn: Drawn) -> None:
    moves_every_byte_once_in_as_few_copies_as_can_be(drawn)


def fewest(source: NDArray[np.int64]) -> int:
    """Runs of bytes that follow each other on both sides. `source`: where each of our bytes comes from, or -1."""
    goes_on = (source[1:] == source[:-1] + 1) & (source[:-1] >= 0)
    return int((source >= 0).sum() - (goes_on & (source[1:] >= 0)).sum())


def moves_every_byte_once_in_as_few_copies_as_can_be(drawn: Drawn) -> None:
    model, decode, prefill, local, remote, spread = drawn
    shape = (model.num_layers, len(prefill[0].caches[prefill[0].layers[0]]), model.num_heads)
    truth = np.random.default_rng(spread).integers(1, 256, (*shape, model.num_tokens, model.content), np.uint8)
    for holder in prefill:
        holder.memory[:] = 0
        for layer, cache in holder.caches.items():
            cache[:] = truth[layer][:, holder.heads.start : holder.heads.stop]

    assert describe_heads(each.layout for each in decode) == describe_heads(each.layout for each in prefill)
    for number, reader in enumerate(decode):
        times: Bytes = np.zeros_like(reader.memory)
        routes = plan_routes(reader.layout, [holder.layout for holder in prefill], spread=spread + number)
        for index, of_rank in routes.items():
            copies = plan_reads(of_rank, (tuple(local),), (tuple(remote),))
            source = np.full(len(reader.memory), -1, np.int64)
            for copy in copies:
                source[copy.local : copy.local + copy.num_bytes] = np.arange(copy.num_bytes) + copy.remote
                near = slice(copy.local, copy.local + copy.num_bytes)
                reader.memory[near] = prefill[index].memory[copy.remote : copy.remote + copy.num_bytes]
                times[near] += 1
            if copies:
                ours, theirs = (
                    RegionTable([Region(address=0, num_bytes=len(memory))])
                    for memory in (reader.memory, prefill[index].memory)
                )
                runs = plan_copies(copies, ours=ours, theirs=theirs, max_bytes=1 << 40)
                assert len(runs) == fewest(source)

        expected, once = np.zeros_like(reader.memory), np.zeros_like(reader.memory)
        for layer, cache in reader.caches.items():
            start = cache.ctypes.data - reader.memory.ctypes.data
            for arena, values in (
                (expected, truth[layer][remote][:, reader.heads.start : reader.heads.stop]),
                (once, np.uint8(1)),
            ):
                view = np.ndarray(cache.shape, np.uint8, arena, start, cache.strides)
                view[local] = values
        assert (reader.memory == expected).all()
        assert (times == once).all()
        assert len(routes) <= len(prefill)
