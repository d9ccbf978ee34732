"""How a model's KV is cut over the ranks of an emulated engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.emulation.shape import CELL_BYTES, CacheShape, emulated_heads
from vllm_disagg.errors import ConfigError

SHAPE = CacheShape(num_groups=4, num_heads=4, block_size=16)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_ranks_share_heads_and_groups_without_gaps(degree: int) -> None:
    heads = [head for rank in range(degree) for head in SHAPE.heads_of(rank, degree)]
    groups = [group for rank in range(degree) for group in SHAPE.groups_of(rank, degree)]

    assert heads == groups == [0, 1, 2, 3]


def test_ranks_beyond_the_heads_hold_copies() -> None:
    assert [list(SHAPE.heads_of(rank, 8)) for rank in range(8)] == [[0], [0], [1], [1], [2], [2], [3], [3]]


@pytest.mark.parametrize("degree", [3, 6])
def test_unequal_ranks_are_refused(degree: int) -> None:
    with pytest.raises(ConfigError, match=f"4 emulated KV heads cannot be shared by {degree}"):
        SHAPE.heads_of(0, degree)


def test_unequal_stages_are_refused_with_the_flag_to_change() -> None:
    with pytest.raises(ConfigError, match="--emulate-layer-groups 4 cannot be cut into 3 pipeline stages"):
        SHAPE.groups_of(0, 3)


def test_real_memory_of_a_token() -> None:
    assert SHAPE.bytes_per_token == 16 * CELL_BYTES


@given(st.integers(1, 256))
def test_emulated_heads_divide_the_models(num_kv_heads: int) -> None:
    count = emulated_heads(num_kv_heads)

    assert num_kv_heads % count == 0
    assert 1 <= count <= 24


@pytest.mark.parametrize(("real", "emulated"), [(1, 1), (4, 4), (8, 8), (16, 8), (32, 8), (40, 8), (64, 8), (72, 24)])
def test_emulated_heads_keep_the_usual_degrees(real: int, emulated: int) -> None:
    assert emulated_heads(real) == emulated
