"""From a request's digest to its next token: a small, deterministic stand-in for logits and sampling.

A digest gives a handful of candidates with falling logits; every other token is out of reach. What a request may ask
of vLLM's sampler is done to these: biases, penalties, bans, temperature, top-k, top-p, seeds and log probabilities.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vllm_disagg.emulation.stamps import mix_int

NUM_CANDIDATES: Final = 24
"""More than the 20 alternatives that vLLM returns at most."""

_BIASED_LOGIT: Final = -8.0
_FILLER_LOGIT: Final = -40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Token ids that an emulated model may say.

    Args:
        size: how many token ids the model has.
        words: ids of ordinary tokens.
        eos: the token that ends an answer.
        eos_probability: how likely each token is the last.
    """

    size: int
    words: range
    eos: int
    eos_probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The sampling parameters that are honoured; names and meanings are vLLM's."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed: Sequence[int] | None = None
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token and its log probabilities.

    Args:
        token_id: the token.
        logprob, rank: its own, rank 1 being the likeliest.
        top: the likeliest `Wishes.num_logprobs` tokens with their log probabilities.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def choose(
    digest: int,
    wishes: Wishes,
    vocabulary: Vocabulary,
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    allowed_now: Sequence[int] | None = None,
) -> Choice:
    """Sample one token.

    Args:
        digest: of the request's KV.
        wishes: its sampling parameters.
        vocabulary: of the model.
        prompt, output: its tokens so far.
        allowed_now: what a grammar permits for this token; None without one.
    """
    raw = candidates(digest, vocabulary)
    allowed = wishes.allowed if allowed_now is None else allowed_now
    logits = dict(raw) if allowed is None else _among(digest, raw, allowed)
    if len(output) < wishes.min_tokens:
        logits = _without(logits, {vocabulary.eos, *wishes.stop_token_ids}, digest, vocabulary)
    for token_id, bias in wishes.logit_bias.items():
        logits[token_id] = logits.get(token_id, _BIASED_LOGIT) + bias
    _penalise(logits, wishes, prompt, output)
    token_id = _draw(logits, wishes, len(output), digest)
    return with_logprobs(token_id, raw, wishes.num_logprobs, vocabulary)


def candidates(digest: int, vocabulary: Vocabulary) -> dict[int, float]:
    """Tokens and logits that follow a digest, the likeliest first."""
    found: dict[int, float] = {}
    logit, state = 0.0, digest
    if mix_int(digest ^ 0xE05) < vocabulary.eos_probability * 2**64:
        found[vocabulary.eos] = 0.5
    while len(found) < min(NUM_CANDIDATES, len(vocabulary.words)):
        state = mix_int(state + 0x9E3779B97F4A7C15)
        token_id = vocabulary.words[state % len(vocabulary.words)]
        if token_id not in found:
            found[token_id] = logit
            logit -= 0.1 + (state >> 40) / 2**24
    return found


def logprobs_of(logits: Mapping[int, float]) -> dict[int, float]:
    """Log-softmax over the tokens given."""
    top = max(logits.values())
    log_sum = top + math.log(sum(math.exp(logit - top) for logit in logits.values()))
    return {token_id: logit - log_sum for token_id, logit in logits.items()}


def with_logprobs(token_id: int, raw: Mapping[int, float], count: int | None, vocabulary: Vocabulary) -> Choice:
    """A token with its place among the candidates before any penalty or bias, and the likeliest `count` of them."""
    if count is None:
        return Choice(token_id, 0.0, 1, ())
    logits = dict(raw)
    logits.setdefault(token_id, _FILLER_LOGIT)
    for filler in range(vocabulary.size):
        if len(logits) >= count:
            break
        logits.setdefault(filler, _FILLER_LOGIT)
    logprobs = logprobs_of(logits)
    ranked = sorted(logprobs, key=lambda candidate: (-logprobs[candidate], candidate))
    return Choice(
        token_id,
        logprobs[token_id],
        ranked.index(token_id) + 1,
        tuple((candidate, logprobs[candidate]) for candidate in ranked[:count]),
    )


def _among(digest: int, raw: Mapping[int, float], allowed: Sequence[int]) -> dict[int, float]:
    """Candidates out of the few or many tokens that are allowed."""
    permitted = allowed if isinstance(allowed, Collection) and not isinstance(allowed, Sequence) else set(allowed)
    kept = {token_id: logit for token_id, logit in raw.items() if token_id in permitted}
    state, logit = mix_int(digest ^ 0xA110), min(kept.values(), default=0.0)
    for _ in range(min(NUM_CANDIDATES, len(allowed)) - len(kept)):
        state = mix_int(state + 1)
        logit -= 0.1 + (state >> 40) / 2**24
        kept.setdefault(allowed[state % len(allowed)], logit)
    return kept


def _without(
    logits: dict[int, float], banned: Collection[int], digest: int, vocabulary: Vocabulary
) -> dict[int, float]:
    kept = {token_id: logit for token_id, logit in logits.items() if token_id not in banned}
    state = digest
    while not kept:
        state = mix_int(state + 0xBA4)
        token_id = vocabulary.words[state % len(vocabulary.words)]
        if token_id not in banned or len(banned) >= len(vocabulary.words):
            kept[token_id] = 0.0
    return kept


def _penalise(logits: dict[int, float], wishes: Wishes, prompt: Sequence[int], output: Sequence[int]) -> None:
    if wishes.presence_penalty or wishes.frequency_penalty:
        for token_id, count in Counter(output).items():
            if token_id in logits:
                logits[token_id] -= wishes.presence_penalty + wishes.frequency_penalty * count
    if wishes.repetition_penalty != 1.0:
        seen = {*prompt, *output}
        for token_id, logit in logits.items():
            if token_id in seen:
                factor = wishes.repetition_penalty
                logits[token_id] = logit * factor if logit < 0 else logit / factor


def _draw(logits: Mapping[int, float], wishes: Wishes, index: int, digest: int) -> int:
    ranked = sorted(logits, key=lambda token_id: (-logits[token_id], token_id))
    if wishes.temperature <= 0:
        return ranked[0]
    if wishes.top_k > 0:
        ranked = ranked[: wishes.top_k]
    top = logits[ranked[0]]
    weights = [math.exp((logits[token_id] - top) / wishes.temperature) for token_id in ranked]
    total, kept, mass = sum(weights), 0, 0.0
    while kept < len(ranked) and (kept == 0 or (mass < wishes.top_p * total and weights[kept] >= wishes.min_p)):
        mass += weights[kept]
        kept += 1
    # A seed fixes the draw of the n-th token, whichever engine makes it.
    source = random.Random(f"{wishes.seed} {index} {digest}") if wishes.seed is not None else random  # noqa: S311
    return source.choices(ranked[:kept], weights[:kept])[0]
