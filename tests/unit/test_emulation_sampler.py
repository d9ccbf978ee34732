"""From digests to tokens: deterministic, and whatever a request asks of the sampler is done."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_disagg.emulation.sampler import NUM_CANDIDATES, Choice, Vocabulary, Wishes, candidates, choose, logprobs_of

VOCABULARY = Vocabulary(size=1000, words=range(125, 875), eos=2, eos_probability=0.0)
ENDING = Vocabulary(size=1000, words=range(125, 875), eos=2, eos_probability=1.0)
DIGESTS = range(1, 400)


def sample(digest: int, *, vocabulary: Vocabulary = VOCABULARY, allowed_now: Any = None, **wishes: Any) -> Choice:
    return choose(digest, Wishes(**wishes), vocabulary, prompt=[1], output=[], allowed_now=allowed_now)


def tokens(**wishes: Any) -> list[int]:
    return [sample(digest, **wishes).token_id for digest in DIGESTS]


def test_greedy_says_the_likeliest_and_always_the_same() -> None:
    assert tokens() == tokens()
    assert tokens() == [max(found, key=found.get) for found in map(likely, DIGESTS)]  # type: ignore[arg-type]
    assert len(set(tokens())) > 250


def likely(digest: int) -> dict[int, float]:
    return candidates(digest, VOCABULARY)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_candidates_are_words_with_falling_logits(digest: int) -> None:
    found = candidates(digest, VOCABULARY)

    assert len(found) == NUM_CANDIDATES
    assert all(token_id in VOCABULARY.words for token_id in found)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_answers_end_as_often_as_asked() -> None:
    often = Vocabulary(size=1000, words=range(125, 875), eos=2, eos_probability=0.25)

    ends = sum(sample(digest * 0x9E3779B97F4A7C15 % 2**64, vocabulary=often).token_id == 2 for digest in range(4000))

    assert ends == pytest.approx(1000, abs=100)


def test_a_seed_repeats_and_another_differs() -> None:
    assert tokens(temperature=1.0, seed=1) == tokens(temperature=1.0, seed=1)
    assert tokens(temperature=1.0, seed=1) != tokens(temperature=1.0, seed=2)


def test_a_seeded_draw_differs_from_token_to_token() -> None:
    wishes = Wishes(temperature=3.0, seed=1)
    drawn = {choose(7, wishes, VOCABULARY, prompt=[1], output=[9] * index).token_id for index in range(40)}

    assert len(drawn) > 5


def test_temperature_spreads_and_top_k_narrows() -> None:
    greedy = tokens()

    assert tokens(temperature=0.01, seed=1) == greedy
    assert tokens(temperature=2.0, seed=1) != greedy
    assert tokens(temperature=2.0, seed=1, top_k=1) == greedy
    for digest in DIGESTS:
        first_three = list(likely(digest))[:3]
        assert sample(digest, temperature=5.0, seed=digest, top_k=3).token_id in first_three


def test_top_p_keeps_just_enough_mass() -> None:
    for digest in DIGESTS:
        logprobs = logprobs_of(likely(digest))
        kept, mass = set(), 0.0
        for token_id, logprob in logprobs.items():
            if mass >= 0.5:
                break
            kept.add(token_id)
            mass += math.exp(logprob)
        assert sample(digest, temperature=1.0, seed=digest, top_p=0.5).token_id in kept
    assert tokens(temperature=1.0, seed=1, top_p=1e-9) == tokens()


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    for digest in DIGESTS:
        found = likely(digest)
        kept = {token_id for token_id, logit in found.items() if math.exp(logit - max(found.values())) >= 0.5}
        assert sample(digest, temperature=1.0, seed=digest, min_p=0.5).token_id in kept
    assert tokens(temperature=1.0, seed=1, min_p=1.0) == tokens()


def test_no_end_before_the_fewest_tokens() -> None:
    wishes = Wishes(min_tokens=2, stop_token_ids=frozenset({2, *range(125, 800)}))
    answers = [
        [choose(digest, wishes, ENDING, prompt=[1], output=[9] * length).token_id for length in (0, 1, 2)]
        for digest in DIGESTS
    ]

    assert {token for answer in answers for token in answer[:2]} <= set(range(800, 875))
    assert {answer[2] for answer in answers} == {2}


def test_a_bias_lifts_a_token_or_buries_it() -> None:
    assert set(tokens(logit_bias={5: 100.0})) == {5}
    assert all(
        sample(digest, logit_bias={token_id: -100.0}).token_id == list(likely(digest))[1]
        for digest, token_id in zip(DIGESTS, tokens(), strict=True)
    )


def test_only_allowed_tokens_come() -> None:
    assert set(tokens(allowed=[7, 8, 9])) == {7, 8, 9}
    assert set(tokens(allowed=[3])) == {3}
    assert set(tokens(allowed=list(VOCABULARY.words))) <= set(VOCABULARY.words)


def test_a_grammar_overrules_the_request() -> None:
    assert {sample(digest, allowed=[7], allowed_now=[4, 5]).token_id for digest in DIGESTS} == {4, 5}


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 50.0}, {"frequency_penalty": 20.0}, {"repetition_penalty": 1e9}]
)
def test_penalties_keep_off_what_was_said(penalty: dict[str, float]) -> None:
    digest = 77
    first, second = list(likely(digest))[:2]
    said = [first] * 3 if "repetition_penalty" not in penalty else [first]

    choice = choose(
        digest, Wishes(logit_bias={first: 1.0}, **penalty), VOCABULARY, prompt=[1], output=said
    )  # the bias lifts its logit above zero, where a repetition penalty divides it

    assert choice.token_id == (second if "repetition_penalty" not in penalty else first)


def test_a_repetition_penalty_counts_the_prompt_and_lowers_negative_logits() -> None:
    digest = 77
    first, second, third = list(likely(digest))[:3]
    wishes = Wishes(repetition_penalty=1e6, logit_bias={first: -50.0})

    assert choose(digest, wishes, VOCABULARY, prompt=[second], output=[]).token_id == third
    assert choose(digest, wishes, VOCABULARY, prompt=[], output=[]).token_id == second


def test_frequencies_count_each_time() -> None:
    digest = 77
    found = likely(digest)
    first, second = list(found)[:2]
    gap = found[first] - found[second]
    wishes = Wishes(frequency_penalty=0.6 * gap)

    assert choose(digest, wishes, VOCABULARY, prompt=[first], output=[first]).token_id == first
    assert choose(digest, wishes, VOCABULARY, prompt=[first], output=[first] * 2).token_id == second


def test_log_probabilities_are_those_before_any_wish() -> None:
    logprobs = logprobs_of(likely(77))
    first, second = list(logprobs)[:2]

    choice = sample(77, num_logprobs=3, logit_bias={second: 50.0}, temperature=0.5, seed=1)

    assert (choice.token_id, choice.rank) == (second, 2)
    assert choice.logprob == logprobs[second]
    assert choice.top == tuple(list(logprobs.items())[:3])
    assert choice.top[0][0] == first


@pytest.mark.parametrize("count", [0, 1, 20, NUM_CANDIDATES, 100, 1000])
def test_log_probabilities_of_as_many_tokens_as_asked(count: int) -> None:
    choice = sample(77, num_logprobs=count)

    assert len(choice.top) == len({token_id for token_id, _ in choice.top}) == count
    assert [logprob for _, logprob in choice.top] == sorted((logprob for _, logprob in choice.top), reverse=True)
    if count >= NUM_CANDIDATES:
        assert sum(math.exp(logprob) for _, logprob in choice.top) == pytest.approx(1.0)


def test_a_token_out_of_reach_has_a_log_probability_too() -> None:
    choice = sample(77, num_logprobs=2, logit_bias={5: 100.0})

    assert choice.token_id == 5
    assert choice.rank == NUM_CANDIDATES + 1
    assert choice.logprob < -30


def test_without_the_wish_there_are_none() -> None:
    assert sample(77).top == ()
