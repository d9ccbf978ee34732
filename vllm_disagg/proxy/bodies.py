"""Bodies of requests: read strictly, and rebuilt for each engine from the fields named here.

The field names are those of vLLM 0.32's `CompletionRequest` and `ChatCompletionRequest`. A field that is not named
here reaches no engine. vLLM ignores unknown fields, so dropping them changes no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from vllm_disagg.core.scheduling.hints import NAMES
from vllm_disagg.core.shapes import Api
from vllm_disagg.core.types import TransferId
from vllm_disagg.proxy.replies import ApiError

RESERVED: Final = frozenset({"kv_transfer_params", "ec_transfer_params", "request_id"})
"""Fields that only the proxy may write."""

_NO_HINTS: Final[Mapping[str, float]] = {}

_PROMPT_FIELDS: Final[Mapping[Api, frozenset[str]]] = {
    # Whatever changes the prompt's tokens or its KV goes to both engines.
    "completions": frozenset({"model", "prompt", "add_special_tokens", "cache_salt", "priority"}),
    # `response_format` and `tool_choice` too: some chat templates render them.
    "chat": frozenset({
        "model", "messages", "tools", "tool_choice", "response_format", "documents", "reasoning_effort",
        "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
        "add_special_tokens", "media_io_kwargs", "mm_processor_kwargs", "cache_salt", "priority",
    }),
}  # fmt: skip

_SAMPLING_FIELDS: Final = frozenset({
    "allowed_token_ids", "bad_words", "best_of", "echo", "frequency_penalty", "ignore_eos",
    "include_stop_str_in_output", "length_penalty", "logit_bias", "logprob_token_ids", "logprobs", "max_tokens",
    "min_p", "min_tokens", "n", "presence_penalty", "prompt_logprobs", "repetition_detection", "repetition_penalty",
    "response_format", "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids",
    "routed_experts_prompt_start", "seed", "session_id", "skip_special_tokens", "spaces_between_special_tokens",
    "stop", "stop_token_ids", "stream", "stream_interval", "stream_options", "structured_outputs", "temperature",
    "thinking_token_budget", "top_k", "top_p", "truncate_prompt_tokens", "truncation_side", "use_beam_search", "user",
    "vllm_xargs", "watermarking",
})  # fmt: skip

_OWN_FIELDS: Final[Mapping[Api, frozenset[str]]] = {
    "completions": frozenset({"prompt_embeds", "suffix"}),
    "chat": frozenset({
        "include_reasoning", "max_completion_tokens", "parallel_tool_calls", "return_prompt_text", "top_logprobs",
    }),
}  # fmt: skip

FIELDS: Final[Mapping[Api, frozenset[str]]] = {
    "completions": _PROMPT_FIELDS["completions"] | _SAMPLING_FIELDS | _OWN_FIELDS["completions"],
    "chat": _PROMPT_FIELDS["chat"] | _SAMPLING_FIELDS | _OWN_FIELDS["chat"],
}
"""All fields of a client's body that may reach a decode instance."""


def parse(raw: bytes) -> dict[str, Any]:
    """Read a client's body.

    Raises:
        ApiError: 400 for anything but one JSON object in UTF-8 with finite numbers, distinct keys, no reserved field
            and a boolean `stream`.
    """
    try:
        body = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_not_json, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not UTF-8") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and what the hooks raise
        raise ApiError(400, f"the body is not acceptable JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    _check_reserved(body)
    if not isinstance(body.get("stream"), bool | None):
        raise ApiError(400, "'stream' must be true or false", param="stream")
    return body


def known(api: Api, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a client's body that may reach an engine."""
    return {name: value for name, value in body.items() if name in FIELDS[api]}


def without_hints(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without what `vllm_xargs` asks of the schedulers: that is written anew for each engine."""
    if not isinstance(fields.get("vllm_xargs"), dict):
        return dict(fields)
    others = {name: value for name, value in fields["vllm_xargs"].items() if name not in NAMES}
    return {name: value for name, value in {**fields, "vllm_xargs": others}.items() if name != "vllm_xargs" or others}


def prefill_body(
    api: Api, fields: Mapping[str, Any], transfer_id: TransferId, *, hints: Mapping[str, float] = _NO_HINTS
) -> dict[str, Any]:
    """What a prefill instance is asked: this prompt, one token, keep the KV."""
    return {
        **({"vllm_xargs": dict(hints)} if hints else {}),
        **{name: value for name, value in fields.items() if name in _PROMPT_FIELDS[api]},
        ("max_tokens" if api == "completions" else "max_completion_tokens"): 1,
        "temperature": 0,
        "stream": False,
        "return_token_ids": True,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id},
    }


def decode_body(
    api: Api,
    fields: Mapping[str, Any],
    *,
    token_ids: Sequence[int] | None = None,
    transfer_id: TransferId | None = None,
    handoff: str | None = None,
    num_cached_tokens: int | None = None,
    hints: Mapping[str, float] = _NO_HINTS,
) -> dict[str, Any]:
    """What a decode instance is asked: the client's own request, with the prompt's token ids and KV where known.

    Args:
        api: which of OpenAI's interfaces.
        fields: the client's fields, from `known`.
        token_ids: the prompt's token ids, so that it is not rendered and tokenised again.
        transfer_id: the transfer that `handoff` belongs to.
        handoff: what the prefill instance gave for the KV; without it, decode computes the prompt itself.
        num_cached_tokens: prompt tokens that the prefill instance had cached; vLLM reports them in `usage`.
        hints: what the request asks of the scheduler.
    """
    body, params = dict(fields), dict[str, Any]()
    if hints:
        body["vllm_xargs"] = {**(fields.get("vllm_xargs") or {}), **hints}
    if handoff is not None:
        params.update(do_remote_prefill=True, do_remote_decode=False, transfer_id=transfer_id, handoff=handoff)
        if num_cached_tokens is not None:
            params["remote_prefill_cached_tokens"] = num_cached_tokens
    if token_ids is not None and api == "completions":
        body["prompt"] = list(token_ids)
    elif token_ids is not None:
        params["prompt_token_ids"] = list(token_ids)
    if params:
        body["kv_transfer_params"] = params
    return body


def encode(body: Mapping[str, Any]) -> bytes:
    """Serialise a body for an engine. Pure ASCII, so that no engine can read it in two ways."""
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} appears twice")
    return result


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _check_reserved(body: Mapping[str, Any]) -> None:
    for path, name in _client_names(body):
        if _normal(name) in RESERVED:
            raise ApiError(400, f"the field {path}{name!r} is reserved for the server", param=name)
    for name, value in (body.get("vllm_xargs") or {}).items():
        if not all(isinstance(item, str | int | float) for item in (value if isinstance(value, list) else [value])):
            message = f"vllm_xargs[{name[:40]!r}] must be a string, a number or a list of them"
            raise ApiError(400, message, param="vllm_xargs")


def _client_names(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names at every place that vLLM, or a client library, merges into the request's own fields."""
    yield from (("", name) for name in body)
    for container in ("vllm_xargs", "extra_body", "extra_args"):
        inner = body.get(container)
        if isinstance(inner, dict):
            yield from ((f"{container}.", name) for name in inner)
        elif inner is not None:
            raise ApiError(400, f"{container!r} must be an object", param=container)


def _normal(name: str) -> str:
    return name.strip().lower().replace("-", "_")
