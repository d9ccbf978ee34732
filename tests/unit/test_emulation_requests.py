"""What the device's side keeps of each request, and what it hands to the sampler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_disagg.emulation import outputs
from vllm_disagg.emulation.requests import RequestTable, wishes_of
from vllm_disagg.emulation.sampler import Vocabulary, Wishes, candidates

VOCABULARY = Vocabulary(size=70, words=range(10, 60), eos=2, eos_probability=0.0)


def params(**wishes: Any) -> Any:
    """As vLLM's `SamplingParams`."""
    return SimpleNamespace(
        **{
            "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None, "min_tokens": 0,
            "all_stop_token_ids": set(), "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
            "logit_bias": None, "allowed_token_ids": None, "logprobs": None, "prompt_logprobs": None,
        }
        | wishes
    )  # fmt: skip


def new(name: str, prompt: list[int] | None, blocks: list[int], computed: int = 0, **more: Any) -> Any:
    return SimpleNamespace(
        req_id=name,
        prompt_token_ids=prompt,
        prompt_len=more.get("prompt_len", 0),
        block_ids=(blocks,),
        num_computed_tokens=computed,
        sampling_params=params(),
    )


def step(tokens: dict[str, int], *, fresh: Any = (), cached: Any = (), finished: Any = (), resumed: Any = ()) -> Any:
    """As vLLM's `SchedulerOutput`. `cached` holds name, new blocks, computed tokens, number of outputs."""
    names, blocks, computed, num_outputs = zip(*cached, strict=True) if cached else ((), (), (), ())
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=list(fresh),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(names),
            resumed_req_ids=set(resumed),
            new_block_ids=[None if item is None else (item,) for item in blocks],
            num_computed_tokens=list(computed),
            num_output_tokens=list(num_outputs),
        ),
        num_scheduled_tokens=tokens,
    )


def test_a_prompt_in_chunks_samples_after_its_last() -> None:
    table = RequestTable(1, 100)
    (first,) = table.update(step({"a": 3}, fresh=[new("a", [1, 2, 3, 4, 5], [7])]))
    assert (first.state.num_computed, first.end, first.samples) == (0, 3, False)

    (second,) = table.update(step({"a": 2}, cached=[("a", [8], 3, 0)]))

    assert (second.state.num_computed, second.end, second.samples) == (3, 5, True)
    assert second.state.block_ids == [7, 8]


def test_a_decoding_request_computes_its_last_token() -> None:
    table = RequestTable(1, 100)
    (part,) = table.update(step({"a": 2}, fresh=[new("a", [1, 2], [7])]))
    part.state.tokens.append(9)

    (part,) = table.update(step({"a": 1}, cached=[("a", None, 2, 1)]))

    assert (part.state.tokens, part.state.output, part.samples) == ([1, 2, 9], [9], True)
    assert part.state.block_ids == [7]


def test_a_preempted_request_comes_back_with_other_blocks_and_its_outputs() -> None:
    table = RequestTable(1, 100)
    (part,) = table.update(step({"a": 2}, fresh=[new("a", [1, 2], [7])]))
    part.state.tokens.append(9)
    table.update(step({}))

    (part,) = table.update(step({"a": 3}, cached=[("a", [4, 5], 0, 1)], resumed=["a"]))

    assert (part.state.block_ids, part.state.num_computed, part.samples) == ([4, 5], 0, True)
    assert part.state.tokens == [1, 2, 9]


def test_outputs_that_the_scheduler_has_taken_back_are_sampled_again() -> None:
    table = RequestTable(1, 100)
    (part,) = table.update(step({"a": 2}, fresh=[new("a", [1, 2], [7])]))
    part.state.tokens += [9, 8]

    (part,) = table.update(step({"a": 3}, cached=[("a", [4], 0, 1)], resumed=["a"]))

    assert part.state.tokens == [1, 2, 9]
    assert part.samples


def test_a_name_may_come_again() -> None:
    table = RequestTable(1, 100)
    table.update(step({"a": 2}, fresh=[new("a", [1, 2], [7])]))

    (part,) = table.update(step({"a": 1}, fresh=[new("a", [5], [3])], finished=["a"]))

    assert (part.state.tokens, part.state.block_ids) == ([5], [3])
    table.update(step({}, finished=["a"]))
    assert list(table) == []


def test_a_prompt_of_embeddings_has_tokens_that_stand_for_it() -> None:
    (part,) = RequestTable(1, 100).update(step({"a": 4}, fresh=[new("a", None, [7], prompt_len=4)]))

    assert part.state.prompt_len == len(part.state.tokens) == 4
    assert part.samples


def test_wishes_are_taken_over() -> None:
    wishes = wishes_of(
        params(temperature=0.5, all_stop_token_ids={3}, logit_bias={4: 1.0}, logprobs=-1, allowed_token_ids=[5]), 100
    )

    assert wishes == Wishes(
        temperature=0.5, stop_token_ids=frozenset({3}), logit_bias={4: 1.0}, num_logprobs=100, allowed=[5]
    )
    assert wishes_of(None, 100) == Wishes()


def parts_of(*names: str) -> Any:
    table = RequestTable(1, VOCABULARY.size)
    return table.update(step(dict.fromkeys(names, 1), fresh=[new(name, [1], [0]) for name in names]))


def mask(*allowed: set[int]) -> Any:
    """A grammar's bit for each token id; ids that do not exist are allowed, as the library leaves them."""
    words = -(-VOCABULARY.size // 32)
    bits = np.zeros((len(allowed), words * 32), np.uint8)
    for row, ids in enumerate(allowed):
        bits[row, list(ids)] = 1
    bits[:, VOCABULARY.size :] = 1
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


def test_each_request_keeps_its_own_grammar() -> None:
    for digest in range(200):
        grammar = SimpleNamespace(structured_output_request_ids=["b", "c"], grammar_bitmask=mask({5, 69}, {11}))
        chosen = outputs.sample(parts_of("a", "b", "c"), dict.fromkeys("abc", digest), VOCABULARY, grammar)

        assert chosen["a"].token_id == next(iter(candidates(digest, VOCABULARY)))
        assert chosen["b"].token_id in (5, 69)
        assert chosen["c"].token_id == 11


def test_sampled_tokens_are_appended_where_one_was_due() -> None:
    table = RequestTable(1, VOCABULARY.size)
    whole, chunk = table.update(
        step({"whole": 2, "chunk": 1}, fresh=[new("whole", [1, 2], [0]), new("chunk", [1, 2], [1])])
    )

    chosen = outputs.sample([whole, chunk], {"whole": 5}, VOCABULARY, None)

    assert list(chosen) == ["whole"]
    assert whole.state.tokens == [1, 2, chosen["whole"].token_id]
    assert chunk.state.tokens == [1, 2]
