"""From chosen tokens to what vLLM expects of a model runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_disagg.emulation.requests import RequestState, Scheduled
from vllm_disagg.emulation.sampler import Choice, Vocabulary, Wishes, candidates, choose, with_logprobs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors


def sample(
    parts: Sequence[Scheduled], digests: Mapping[str, int], vocabulary: Vocabulary, grammar: GrammarOutput | None
) -> dict[str, Choice]:
    """Sample the next token of every request that is due one, and append it to the request."""
    permitted = _permitted(grammar, vocabulary.size)
    chosen = {}
    for part in parts:
        if not part.samples:
            continue
        state = part.state
        choice = choose(
            digests[state.request_id],
            state.wishes,
            vocabulary,
            prompt=state.tokens[: state.prompt_len],
            output=state.output,
            allowed_now=permitted.get(state.request_id),
        )
        state.tokens.append(choice.token_id)
        chosen[state.request_id] = choice
    return chosen


def logprobs_lists(parts: Sequence[Scheduled], chosen: Mapping[str, Choice]) -> LogprobsLists | None:
    """Log probabilities of the sampled tokens; None when no request wants any.

    Every request of the step has a row, as wide as the widest wish, with the sampled token first.
    """
    from vllm.v1.outputs import LogprobsLists

    wanted = [part.state.wishes.num_logprobs for part in parts]
    width = max((count for count in wanted if count is not None), default=None)
    if width is None:
        return None
    ids = np.zeros((len(parts), width + 1), np.int32)
    values = np.zeros((len(parts), width + 1), np.float32)
    ranks = np.ones(len(parts), np.int32)
    for row, part in enumerate(parts):
        choice = chosen.get(part.state.request_id)
        if choice is None:
            continue
        ids[row, 0], values[row, 0], ranks[row] = choice.token_id, choice.logprob, choice.rank
        for column, (token_id, logprob) in enumerate(choice.top, start=1):
            ids[row, column], values[row, column] = token_id, logprob
    return LogprobsLists(ids, values, ranks, None)


def take_prompt_logprobs(parts: Sequence[Scheduled], vocabulary: Vocabulary) -> dict[str, LogprobsTensors]:
    """Of the requests whose prompt ends in this step; each once, also when it is computed again after a preemption."""
    taken = {}
    for part in parts:
        state = part.state
        if state.prompt_logprobs is not None and state.num_computed < state.prompt_len <= part.end:
            taken[state.request_id] = prompt_logprobs(state, vocabulary)
            state.prompt_logprobs = None
    return taken


def prompt_logprobs(state: RequestState, vocabulary: Vocabulary) -> LogprobsTensors:
    """Log probabilities of a prompt's tokens but the first, from the digests of what stands before them."""
    import torch
    from vllm.v1.outputs import LogprobsTensors

    asked = state.prompt_logprobs or 0
    width = vocabulary.size if asked < 0 else asked
    digests = state.prefix.digests(state.tokens, 0, state.prompt_len)
    wishes = Wishes(num_logprobs=width)
    rows = [
        _row(int(digests[index]), state.tokens[index + 1], wishes, vocabulary) for index in range(state.prompt_len - 1)
    ]
    return LogprobsTensors(
        torch.tensor([[choice.token_id, *(item[0] for item in choice.top)] for choice in rows], dtype=torch.int32),
        torch.tensor([[choice.logprob, *(item[1] for item in choice.top)] for choice in rows], dtype=torch.float32),
        torch.tensor([choice.rank for choice in rows], dtype=torch.int32),
    )


def _row(digest: int, token_id: int, wishes: Wishes, vocabulary: Vocabulary) -> Choice:
    return with_logprobs(token_id, candidates(digest, vocabulary), wishes.num_logprobs, vocabulary)


def _permitted(grammar: GrammarOutput | None, vocab_size: int) -> dict[str, Sequence[int]]:
    """Request to the token ids its grammar allows now. One row of 32 tokens to a word for each request; the last word
    has bits for ids that do not exist."""
    if grammar is None:
        return {}
    bits: Any = np.unpackbits(np.ascontiguousarray(grammar.grammar_bitmask).view(np.uint8), axis=1, bitorder="little")
    return {
        request_id: np.flatnonzero(bits[row, :vocab_size]).tolist()
        for row, request_id in enumerate(grammar.structured_output_request_ids)
    }
