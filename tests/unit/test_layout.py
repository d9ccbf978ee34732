"""Where blocks lie, and which copies move them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_disagg.errors import IncompatiblePeer
from vllm_disagg.transport.layout import RankLayout, Segment, check_same_shape, plan_reads


def segment(name: str, *, address: int, stride: int = 64, size: int = 64, num_blocks: int = 40) -> Segment:
    return Segment(name=name, address=address, block_stride=stride, block_bytes=size, num_blocks=num_blocks)


def layout(*groups: tuple[Segment, ...]) -> RankLayout:
    return RankLayout(groups=groups)


def test_neighbouring_blocks_become_one_copy() -> None:
    near, far = layout((segment("l0", address=1000),)), layout((segment("l0", address=9000),))

    copies = plan_reads(near, far, ((4, 5, 6, 9),), ((1, 2, 3, 4),))

    assert [(copy.local, copy.remote, copy.num_bytes) for copy in copies] == [
        (1000 + 4 * 64, 9000 + 64, 3 * 64),
        (1000 + 9 * 64, 9000 + 4 * 64, 64),
    ]


def test_blocks_that_are_padded_on_one_side_are_copied_one_by_one() -> None:
    near, far = layout((segment("l0", address=0, stride=80),)), layout((segment("l0", address=9000),))

    assert [copy.num_bytes for copy in plan_reads(near, far, ((1, 2),), ((1, 2),))] == [64, 64]


def test_placeholder_blocks_are_left_out() -> None:
    near, far = layout((segment("l0", address=0),)), layout((segment("l0", address=9000),))

    assert len(plan_reads(near, far, ((0, 2, 5),), ((1, 0, 7),))) == 1


def test_layers_are_matched_by_name_not_by_order() -> None:
    near = layout((segment("l0", address=0), segment("l1", address=10_000)))
    far = layout((segment("l1", address=20_000), segment("l0", address=30_000)))

    copies = plan_reads(near, far, ((1,),), ((1,),))

    assert {(copy.local, copy.remote) for copy in copies} == {(64, 30_064), (10_064, 20_064)}


@pytest.mark.parametrize(
    "blocks", [(((1, 2),), ((1,),)), (((41,),), ((1,),)), (((1,),), ((41,),)), (((-1,),), ((1,),))]
)
def test_blocks_that_do_not_pair_or_lie_outside_are_refused(blocks: tuple) -> None:  # type: ignore[type-arg]
    near, far = layout((segment("l0", address=0),)), layout((segment("l0", address=9000),))

    with pytest.raises(ValueError, match="blocks"):
        plan_reads(near, far, *blocks)


@pytest.mark.parametrize(
    ("far", "factor"),
    [
        (layout((segment("l0", address=0, size=32),)), "block bytes of l0"),
        (layout((segment("other", address=0),)), "block bytes of l0"),
        (layout((segment("l0", address=0), segment("l1", address=0))), "block bytes of l1"),
        (layout((segment("l0", address=0),), (segment("l1", address=0),)), "number of KV cache groups"),
    ],
)
def test_another_shape_is_refused_by_name(far: RankLayout, factor: str) -> None:
    with pytest.raises(IncompatiblePeer, match=factor):
        check_same_shape(layout((segment("l0", address=0),)), far)


@settings(max_examples=300)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.integers(1, 39), st.integers(1, 39)), max_size=30, unique_by=(lambda p: p[0], lambda p: p[1])
    ),
    st.booleans(),
)
def test_every_byte_moves_to_its_place_exactly_once(layers: int, pairs: list[tuple[int, int]], padded: bool) -> None:
    stride = 8 if padded else 5
    near = layout(tuple(segment(f"l{i}", address=10_000 * i, stride=stride, size=5) for i in range(layers)))
    far = layout(tuple(segment(f"l{i}", address=10_000 * (i + 7), stride=5, size=5) for i in range(layers)))

    moved: Counter[tuple[int, int]] = Counter()
    for copy in plan_reads(near, far, (tuple(p[0] for p in pairs),), (tuple(p[1] for p in pairs),)):
        moved.update((copy.local + offset, copy.remote + offset) for offset in range(copy.num_bytes))

    wanted = Counter(
        (10_000 * i + local * stride + offset, 10_000 * (i + 7) + remote * 5 + offset)
        for i in range(layers)
        for local, remote in pairs
        for offset in range(5)
    )
    assert moved == wanted
