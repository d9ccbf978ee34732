"""What the emulated forward pass writes, and that whatever is not what was written reads as something else."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_disagg.emulation.stamps import Prefix, Stamper, Words, combine, mix, mix_int, seed_of

BLOCK_SIZE = 4
NUM_BLOCKS = 8
GROUPS, HEADS = 4, 4
SEED = seed_of("a model")

tokens_of = st.lists(st.integers(0, 150_000), min_size=1, max_size=60)


@dataclass
class Rank:
    """One rank's stamper and cells."""

    stamper: Stamper
    cells: list[Words]

    @classmethod
    def of(cls, groups: range, heads: range) -> Rank:
        cells = [np.zeros((NUM_BLOCKS, len(heads), BLOCK_SIZE), np.uint64) for _ in groups]
        return cls(Stamper(SEED, groups=groups, heads=heads, block_size=BLOCK_SIZE), cells)


def ranks(tp: int, pp: int) -> list[Rank]:
    """All ranks of an engine."""
    groups, heads = GROUPS // pp, HEADS // tp
    return [
        Rank.of(range(stage * groups, (stage + 1) * groups), range(rank * heads, (rank + 1) * heads))
        for stage, rank in itertools.product(range(pp), range(tp))
    ]


def write(engine: list[Rank], tokens: list[int], blocks: list[int]) -> None:
    digests = Prefix(SEED).digests(tokens, 0, len(tokens))
    for rank in engine:
        for cells, stamps in zip(rank.cells, rank.stamper.stamps(digests), strict=True):
            for position in range(len(tokens)):
                cells[blocks[position // BLOCK_SIZE], :, position % BLOCK_SIZE] = stamps[:, position]


def read(engine: list[Rank], length: int, blocks: list[int]) -> int:
    used = np.array(blocks[: -(-length // BLOCK_SIZE)])
    lengths = np.minimum(length - np.arange(len(used)) * BLOCK_SIZE, BLOCK_SIZE)
    sums = np.zeros(len(used), np.uint64)
    for rank in engine:
        sums += rank.stamper.read(rank.cells, used, lengths)
    return combine(sums)


def digest(tokens: list[int], blocks: list[int], tp: int = 1, pp: int = 1) -> int:
    engine = ranks(tp, pp)
    write(engine, tokens, blocks)
    return read(engine, len(tokens), blocks)


@settings(deadline=None)
@given(tokens=tokens_of, data=st.data())
def test_digests_of_chunks_equal_those_of_the_whole(tokens: list[int], data: st.DataObject) -> None:
    whole = Prefix(SEED).digests(tokens, 0, len(tokens)).tolist()
    cuts = sorted({0, len(tokens), *data.draw(st.lists(st.integers(0, len(tokens))))})
    prefix = Prefix(SEED)

    for begin, end in itertools.pairwise(cuts):
        assert prefix.digests(tokens, begin, end).tolist() == whole[begin:end]


@settings(deadline=None)
@given(tokens=tokens_of, data=st.data())
def test_digests_follow_any_way_back_and_forth(tokens: list[int], data: st.DataObject) -> None:
    whole = Prefix(SEED).digests(tokens, 0, len(tokens)).tolist()
    prefix = Prefix(SEED)
    for _ in range(5):
        begin = data.draw(st.integers(0, len(tokens) - 1))
        end = data.draw(st.integers(begin + 1, len(tokens)))

        assert prefix.digests(tokens, begin, end).tolist() == whole[begin:end]


@settings(deadline=None)
@given(tokens=tokens_of, data=st.data())
def test_a_digest_holds_all_tokens_up_to_its_own_and_none_after(tokens: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[position] += 1

    mine, theirs = (Prefix(SEED).digests(item, 0, len(tokens)) for item in (tokens, other))

    assert (mine[:position] == theirs[:position]).all()
    assert (mine[position:] != theirs[position:]).all()


def test_digests_tell_the_order_of_tokens_and_the_model() -> None:
    assert Prefix(SEED).digests([5, 6], 0, 2)[1] != Prefix(SEED).digests([6, 5], 0, 2)[1]
    assert Prefix(SEED).digests([5, 6], 0, 2)[1] != Prefix(SEED + 1).digests([5, 6], 0, 2)[1]
    assert len(set(Prefix(SEED).digests([5] * 50, 0, 50).tolist())) == 50


@pytest.mark.parametrize(("tp", "pp"), itertools.product((1, 2, 4), repeat=2))
def test_every_parallelism_reads_the_same(tp: int, pp: int) -> None:
    tokens = list(range(100, 114))

    assert digest(tokens, [3, 1, 6, 0], tp, pp) == digest(tokens, [3, 1, 6, 0])


def test_where_the_blocks_lie_does_not_matter() -> None:
    tokens = list(range(100, 114))

    assert digest(tokens, [3, 1, 6, 0]) == digest(tokens, [0, 1, 2, 3])


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, NUM_BLOCKS * BLOCK_SIZE), seed=st.integers(0, 2**32))
def test_one_changed_bit_changes_the_digest_and_one_beyond_the_tokens_does_not(length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine, blocks = ranks(2, 2), rng.permutation(NUM_BLOCKS).tolist()
    write(engine, rng.integers(0, 1000, length).tolist(), blocks)
    right = read(engine, length, blocks)

    for cells in (cells for rank in engine for cells in rank.cells):
        position, head = int(rng.integers(0, NUM_BLOCKS * BLOCK_SIZE)), int(rng.integers(0, cells.shape[1]))
        place = blocks[position // BLOCK_SIZE], head, position % BLOCK_SIZE
        cells[place] ^= np.uint64(1) << np.uint64(rng.integers(0, 64))
        assert (read(engine, length, blocks) != right) == (position < length)
        right = read(engine, length, blocks)


@settings(deadline=None)
@given(
    first=st.lists(st.integers(0, 99), min_size=1, max_size=16),
    second=st.lists(st.integers(100, 199), min_size=1, max_size=16),
)
def test_swapped_blocks_of_two_requests_change_both(first: list[int], second: list[int]) -> None:
    engine = ranks(1, 1)
    write(engine, first, [0, 1, 2, 3])
    write(engine, second, [4, 5, 6, 7])
    right = read(engine, len(first), [0, 1, 2, 3]), read(engine, len(second), [4, 5, 6, 7])

    for cells in engine[0].cells:
        cells[[0, 4]] = cells[[4, 0]]

    found = read(engine, len(first), [0, 1, 2, 3]), read(engine, len(second), [4, 5, 6, 7])
    assert found[0] != right[0]
    assert found[1] != right[1]


def test_swapped_blocks_of_one_request_change_it() -> None:
    engine = ranks(1, 1)
    write(engine, list(range(16)), [0, 1, 2, 3])

    assert len({read(engine, 16, list(order)) for order in itertools.permutations(range(4))}) == 24


def test_equal_blocks_do_not_cancel_out() -> None:
    sums = np.array([7, 7, 9], np.uint64)

    assert len({combine(sums), combine(sums[:1]), combine(sums[2:]), combine(sums[::-1]), combine(sums * 0)}) == 5


def test_a_block_that_never_came_reads_as_something_else() -> None:
    engine = ranks(1, 1)
    write(engine, list(range(16)), [0, 1, 2, 3])
    right = read(engine, 16, [0, 1, 2, 3])

    engine[0].cells[1][2] = 0

    assert read(engine, 16, [0, 1, 2, 3]) != right


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_one_integer_is_mixed_as_an_array_is(values: list[int]) -> None:
    with np.errstate(over="ignore"):
        assert mix(np.array(values, np.uint64)).tolist() == [mix_int(value) for value in values]
