"""What the device's side knows of each request, from what vLLM's scheduler sends each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_disagg.emulation.sampler import Wishes
from vllm_disagg.emulation.stamps import Prefix

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

_PLACEHOLDER = 0
"""Stands for tokens of a prompt that came as embeddings."""


@dataclass(slots=True, kw_only=True)
class RequestState:
    """One request on the device's side.

    Args:
        request_id: the engine's.
        tokens: prompt and output so far.
        prompt_len: how many of them are the prompt.
        block_ids: its block table, one KV cache group.
        num_computed: tokens whose KV was there before this step.
        prefix: digest of its tokens.
        wishes: its sampling parameters; None for a pooling request.
        prompt_logprobs: how many log probabilities of each prompt token are wanted.
    """

    request_id: str
    tokens: list[int]
    prompt_len: int
    block_ids: list[int]
    num_computed: int
    prefix: Prefix
    wishes: Wishes
    prompt_logprobs: int | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step: `state` computes its next `new` tokens."""

    state: RequestState
    new: int

    @property
    def end(self) -> int:
        """Tokens whose KV is there after the step."""
        return self.state.num_computed + self.new

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token: not so inside a prompt that comes in chunks."""
        return self.end >= len(self.state.tokens)


class RequestTable:
    """All requests that the device's side knows, as vLLM's model runners keep them.

    Args:
        seed: the model's.
        vocab_size: of the model.
    """

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._seed, self._vocab_size = seed, vocab_size
        self._states: dict[str, RequestState] = {}

    def update(self, step: SchedulerOutput) -> list[Scheduled]:
        """Take over a step's changes (`GPUModelRunner._update_states`). Returns what it computes."""
        for request_id in step.finished_req_ids:
            self._states.pop(request_id, None)
        for request in step.scheduled_new_reqs:
            self._states[request.req_id] = self._new(request)
        self._update_cached(step.scheduled_cached_reqs)
        return [Scheduled(self._states[request_id], new) for request_id, new in step.num_scheduled_tokens.items()]

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states.values())

    def _new(self, request: NewRequestData) -> RequestState:
        prompt = request.prompt_token_ids
        tokens = list(prompt) if prompt is not None else [_PLACEHOLDER] * request.prompt_len
        params = request.sampling_params
        return RequestState(
            request_id=request.req_id,
            tokens=tokens,
            prompt_len=len(tokens),
            block_ids=list(request.block_ids[0]),
            num_computed=request.num_computed_tokens,
            prefix=Prefix(self._seed),
            wishes=wishes_of(params, self._vocab_size),
            prompt_logprobs=None if params is None else params.prompt_logprobs,
        )

    def _update_cached(self, cached: CachedRequestData) -> None:
        for index, request_id in enumerate(cached.req_ids):
            state = self._states[request_id]
            new_blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                state.block_ids = list(new_blocks[0]) if new_blocks else []
            elif new_blocks:
                state.block_ids.extend(new_blocks[0])
            state.num_computed = cached.num_computed_tokens[index]
            del state.tokens[state.prompt_len + cached.num_output_tokens[index] :]  # outputs that were taken back


def wishes_of(params: Any, vocab_size: int) -> Wishes:
    """The part of vLLM's `SamplingParams` that is honoured."""
    if params is None:
        return Wishes()
    num_logprobs = params.logprobs
    return Wishes(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
        min_tokens=params.min_tokens,
        stop_token_ids=frozenset(params.all_stop_token_ids),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias or {}),
        allowed=params.allowed_token_ids,
        num_logprobs=None if num_logprobs is None else (vocab_size if num_logprobs < 0 else num_logprobs),
    )
