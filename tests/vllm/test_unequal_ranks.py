"""Prefill and decode of different tensor and pipeline parallelism: every rank gets its part, from whoever has it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from tests.vllm.emulated import Engine, Split, emulated
from tests.vllm.in_process import Pair, free_port, prompt
from vllm_disagg.connector import worker_side
from vllm_disagg.testing.leaks import assert_no_leaks
from vllm_disagg.transport.layout import Segment

pytestmark = pytest.mark.vllm

Degrees = tuple[int, int]
"""Tensor-parallel and pipeline degree."""

UNEQUAL: list[tuple[Degrees, Degrees]] = [
    ((2, 1), (1, 1)),
    ((1, 1), (2, 1)),
    ((4, 1), (2, 1)),
    ((2, 1), (4, 1)),
    ((8, 1), (2, 1)),  # twice as many ranks as KV heads: each head is held by two
    ((4, 1), (8, 1)),
    ((1, 2), (1, 1)),
    ((1, 1), (1, 3)),
    ((1, 3), (1, 2)),  # three layers on two stages: one and two
    ((2, 2), (1, 1)),
    ((1, 2), (4, 1)),
    ((4, 2), (2, 3)),
]


def name_of(degrees: object) -> str:
    return "tp{}pp{}".format(*degrees) if isinstance(degrees, tuple) else str(degrees)


each_pair = pytest.mark.parametrize(("prefill", "decode"), UNEQUAL, ids=name_of)


@contextmanager
def engines(folder: Path, **options: Any) -> Iterator[Pair]:
    pair = Pair(folder, **options)
    try:
        yield pair
        pair.settle()
        assert_no_leaks(pair.decode.scheduler)
        assert_no_leaks(pair.prefill.scheduler)
    finally:
        pair.close()


@each_pair
def test_every_rank_of_decode_gets_its_heads_and_layers(tmp_path: Path, prefill: Degrees, decode: Degrees) -> None:
    prompts = [prompt(length, seed=3) for length in (2, 32, 33, 64, 100, 300)]
    with engines(tmp_path, prefill=prefill, decode=decode) as pair:
        handed = [pair.prefilled(tokens) for tokens in prompts]
        pair.overwrite_prefills_cache()

        for tokens, params in zip(prompts, handed, strict=True):
            pair.decode_rightly(tokens, params)

        assert pair.received() == sum(map(len, prompts))
        assert pair.failures() == {}


def test_one_lost_rank_fails_the_pull_and_the_prompt_is_computed_on_decode(tmp_path: Path) -> None:
    with engines(tmp_path, prefill=(2, 2), decode=(1, 1)) as pair:
        pair.decode_rightly(prompt(40, seed=1), pair.prefilled(prompt(40, seed=1)))
        params = pair.prefilled(prompt(200))
        pair.prefill.ranks[2].transport.close()

        pair.decode_rightly(prompt(200), params)

        assert pair.failures() == {"transport": 1}


def test_one_frozen_rank_costs_the_pull_timeout_and_its_blocks_come_back(tmp_path: Path) -> None:
    with engines(tmp_path, prefill=(2, 1), decode=(1, 2), lease_s=5.0, pull_timeout_s=0.3) as pair:
        params = pair.prefilled(prompt(200))
        pair.prefill.ranks[1].transport.frozen = True

        pair.decode_rightly(prompt(200), params)

        assert pair.failures() == {"pull_timeout": 1}
        pair.prefill.ranks[1].transport.frozen = False
        pair.decode_rightly(prompt(90), pair.prefilled(prompt(90)))


def test_a_read_from_a_living_rank_is_not_waited_for_when_another_has_failed(tmp_path: Path) -> None:
    with engines(tmp_path, prefill=(2, 1), decode=(1, 1), pull_timeout_s=60.0) as pair:
        pair.decode_rightly(prompt(40, seed=1), pair.prefilled(prompt(40, seed=1)))
        params = pair.prefilled(prompt(200))
        pair.prefill.ranks[0].transport.frozen = True
        pair.prefill.ranks[1].transport.close()

        pair.decode_rightly(prompt(200), params)  # a minute before its timeout

        assert pair.failures() == {"transport": 1}


def test_heads_that_cannot_be_cut_out_are_refused_when_the_engines_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cut = worker_side.segments_of

    def inseparable(*args: Any) -> list[Segment]:
        return [
            Segment(
                name=found.name, address=found.address, num_blocks=found.num_blocks, block_stride=found.block_stride,
                first_head=found.first_head, num_heads=found.num_heads, head_stride=0, num_rows=1,
                row_stride=found.block_stride, row_bytes=found.block_stride,
            )
            for found in cut(*args)
        ]  # fmt: skip

    monkeypatch.setattr(worker_side, "segments_of", inseparable)
    logger = logging.getLogger("vllm_disagg.connector.control_client")  # its parents end at vLLM's own handlers
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with engines(tmp_path, prefill=(2, 1), decode=(1, 1), lease_s=1.0) as pair:
        pair.decode_rightly(prompt(40), pair.prefilled(prompt(40)))

        assert pair.failures() == {"incompatible": 1}
        assert "tensor parallel size" in caplog.text
        assert "holds heads 0-3" in caplog.text


# Whole emulated engines, whose tokens depend on every byte of KV.


@pytest.fixture(scope="module")
def undivided() -> Iterator[Engine]:
    engine = emulated("--emulate-layer-groups", "4")
    yield engine
    engine.stop()


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((2, 1), (1, 1)), ((1, 1), (4, 1)), ((4, 1), (2, 1)), ((1, 4), (1, 1)), ((2, 2), (1, 4)), ((1, 2), (4, 2))],
    ids=name_of,
)
def test_emulated_engines_answer_as_the_undivided_one(
    tmp_path: Path, undivided: Engine, prefill: Degrees, decode: Degrees
) -> None:
    def flags(degrees: Degrees) -> list[str]:
        return ["--tensor-parallel-size", str(degrees[0]), "--pipeline-parallel-size", str(degrees[1])]

    prompts = [prompt(length, seed=9) for length in (2, 15, 16, 17, 33, 100, 300)] * 2
    wishes = [SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)] * len(prompts)
    expected = [undivided.answer(*asked).words for asked in zip(prompts, wishes, strict=True)]
    split = Split(tmp_path, free_port(), [*flags(prefill), "--emulate-layer-groups", "4"], flags(decode))
    try:
        got = split.answers(prompts, wishes)

        assert [answer.words for answer in got] == expected
        fetched = [computed for decision in split.decode.decisions for _, computed in decision.new]
        assert sorted(fetched) == sorted(len(tokens) - 1 for tokens in prompts)
        split.settle()
    finally:
        split.stop()
