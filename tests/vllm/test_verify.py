"""`--kv-verify`: what prefill had computed is compared with what decode has read, for any parallelism of the two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from tests.vllm.emulated import Split, emulated
from tests.vllm.in_process import BLOCK_SIZE, NUM_HEADS, NUM_LAYERS, Pair, free_port, prompt
from vllm_disagg.core.handoff import unseal
from vllm_disagg.core.lifetime import State
from vllm_disagg.core.verify import chosen
from vllm_disagg.emulation.settings import FAULTS_ENV
from vllm_disagg.testing.leaks import assert_no_leaks

pytestmark = pytest.mark.vllm

LENGTH = 5 * BLOCK_SIZE - 7
SHAPES = [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 3), (2, 1)), ((4, 1), (1, 3)), ((8, 1), (2, 3))]


def ended(pair: Pair) -> None:
    pair.settle()
    for engine in (pair.prefill, pair.decode):
        assert_no_leaks(engine.scheduler)
    pair.close()


@pytest.fixture
def verified(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path, verify="full")
    yield pair
    ended(pair)


def change(pair: Pair, params: dict[str, Any], *, layer: int, head: int, place: int) -> None:
    """A value of a held block, in the memory of every rank that has it."""
    key = pair.prefill.scheduler.connector._key
    block_id = unseal(params["handoff"], key).block_ids[0][place]
    done = 0
    for rank in pair.prefill.ranks:
        if layer in rank.caches and head in rank.heads:
            rank.caches[layer][block_id, head - rank.heads.start, 3, 5] += 1
            done += 1
    assert done


def wait_for_digests(pair: Pair) -> None:
    """Until prefill's workers have said what the held blocks contain."""
    control = pair.prefill.scheduler.connector._control
    pair.prefill.run_until(
        lambda: control._vouchers and not any(item.waiting for item in control._vouchers.values()), "digests"
    )


@pytest.mark.parametrize("mode", ["sample", "full"])
@pytest.mark.parametrize(("prefill", "decode"), SHAPES, ids=str)
def test_good_transfers_are_found_good(
    tmp_path: Path, mode: Any, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    pair = Pair(tmp_path, prefill=prefill, decode=decode, verify=mode)
    for length in (2, BLOCK_SIZE, LENGTH, 300):
        pair.decode_rightly(prompt(length), pair.prefilled(prompt(length)))

    data = pair.decode.take_stats()
    assert data["vllm_disagg_kv_tokens_received_total"] == 2 + BLOCK_SIZE + LENGTH + 300
    assert not any(name.startswith("vllm_disagg_kv_failures") for name in data)
    ended(pair)


@pytest.mark.parametrize(("prefill", "decode"), SHAPES, ids=str)
def test_a_changed_value_anywhere_is_a_failed_transfer(
    tmp_path: Path, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    pair = Pair(tmp_path, prefill=prefill, decode=decode, verify="full")
    corners = [(0, 0, 0), (NUM_LAYERS - 1, NUM_HEADS - 1, 4), (1, 2, 3)]
    for seed, (layer, head, place) in enumerate(corners):
        tokens = prompt(LENGTH, seed=seed)
        params = pair.prefilled(tokens)
        wait_for_digests(pair)
        change(pair, params, layer=layer, head=head, place=place)

        pair.decode_rightly(tokens, params)

        assert pair.failures() == {"kv_mismatch": 1}
        good = prompt(LENGTH, seed=90 + seed)  # so that the pair is not made to rest
        pair.decode_rightly(good, pair.prefilled(good))
    ended(pair)


def test_without_it_the_same_change_goes_unnoticed(tmp_path: Path) -> None:
    """What is compared is nothing that the other safeguards see: the hold stood, and the read was complete."""
    pair = Pair(tmp_path)
    params = pair.prefilled(prompt(LENGTH))
    change(pair, params, layer=1, head=2, place=3)

    request_id = pair.decode.add(prompt(LENGTH), params, max_tokens=4)
    pair.decode.run_until(lambda: pair.decode.status(request_id) == "RUNNING", "admission")

    assert not pair.decode.prompt_blocks_are_right(request_id)
    pair.decode.run_until_finished(request_id)
    assert pair.failures() == {}
    ended(pair)


def test_of_a_prompt_that_is_partly_cached_only_what_is_fetched_is_compared(verified: Pair) -> None:
    shared = prompt(3 * BLOCK_SIZE)
    verified.decode_rightly(shared, verified.prefilled(shared))
    longer = [*shared, *prompt(60, seed=5)]
    params = verified.prefilled(longer)
    wait_for_digests(verified)
    change(verified, params, layer=0, head=0, place=1)  # cached on decode

    verified.decode_rightly(longer, params)
    assert verified.failures() == {}

    longest = [*longer, *prompt(60, seed=6)]
    params = verified.prefilled(longest)
    wait_for_digests(verified)
    change(verified, params, layer=0, head=0, place=6)
    verified.decode_rightly(longest, params)
    assert verified.failures() == {"kv_mismatch": 1}


def test_a_sample_has_the_last_block_of_every_prompt(tmp_path: Path) -> None:
    pair = Pair(tmp_path, verify="sample")
    params = pair.prefilled(prompt(LENGTH))
    wait_for_digests(pair)
    change(pair, params, layer=2, head=1, place=4)

    pair.decode_rightly(prompt(LENGTH), params)

    assert pair.failures() == {"kv_mismatch": 1}
    ended(pair)


def test_a_client_that_leaves_while_digests_are_made_leaves_nothing(verified: Pair) -> None:
    for seed in range(10):
        tokens = prompt(300, seed=seed)
        request_id = verified.decode.add(tokens, verified.prefilled(tokens), max_tokens=9)
        fetch = verified.decode.scheduler.connector._decode._by_request[request_id]
        verified.decode.run_until(lambda fetch=fetch: fetch.state is State.RECEIVING, "the read")
        verified.decode.abort(request_id)

    verified.settle()
    assert verified.failures() == {}
    verified.prefill.run_until(lambda: not verified.prefill.scheduler.connector._control._vouchers, "rest")


def test_two_pairs_of_blocks_are_chosen_alike_on_both_sides() -> None:
    nonce = "0123456789abcdef"

    assert chosen("off", nonce, 100) == ()
    assert chosen("full", nonce, 100, first=97) == (97, 98, 99)
    whole, part = chosen("sample", nonce, 1000), chosen("sample", nonce, 1000, first=500)
    assert part == tuple(place for place in whole if place >= 500)
    assert whole[-1] == 999
    assert 30 < len(whole) < 100
    assert chosen("sample", "another", 1000) != whole


@pytest.mark.parametrize("kind", ["corrupt_read", "drop_block", "late_block"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_what_goes_wrong_on_the_way_changes_no_token(
    kind: str, tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faults that nothing else notices (`test_emulated_split`), on engines whose tokens depend on every byte."""
    fault = {"kind": kind, "every": 3} | ({"seconds": 3600} if kind == "late_block" else {})
    (tmp_path / "faults.json").write_text(json.dumps({"faults": [fault]}), encoding="utf-8")
    monkeypatch.setenv(FAULTS_ENV, str(tmp_path / "faults.json"))
    parallel = ["--tensor-parallel-size", str(tp), "--pipeline-parallel-size", str(pp)]
    whole, split = emulated(), Split(tmp_path, free_port(), [*parallel, "--kv-verify", "full"])
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

    for number in range(1, 13):  # one after the other: reads are counted in the order of their beginning
        tokens = [4300 + number] * (20 + 9 * number)
        (answer,) = split.answers([tokens], [greedy])
        assert answer.tokens == whole.answer(tokens, greedy).tokens

    local = sum(count > 1 for decision in split.decode.decisions for _, count in decision.tokens)
    assert local == 4
    for engine in (split, whole):
        engine.settle()
        engine.stop()
