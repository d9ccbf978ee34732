"""What a request's body says about splitting it, read from the parsed JSON in OpenAI's and vLLM's field names.

Anything but the harmless default of a field counts as the unusual shape: a value of a strange type then reaches one
undivided engine, which answers it exactly as it would without us.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeGuard

Api = Literal["completions", "chat"]
Body = Mapping[str, Any]

SHAPE_REASONS: Final[Mapping[str, str]] = {
    "several_choices": "`n` is not 1: every choice would need its own copy of the KV.",
    "best_of": "`best_of` is not 1, as for `n`.",
    "prompt_embeds": "The prompt comes as embeddings, so that there are no token ids to compare.",
    "prompt_form": "The prompt or the messages are missing, empty or of an unusual form.",
    "several_prompts": "`prompt` holds several prompts; an engine's answer carries the handoff of one only.",
    "echo": "`echo` returns the prompt's text, which decode does not have.",
    "prompt_logprobs": "`prompt_logprobs` needs the whole prompt computed where it is answered.",
    "prompt_text": "`return_prompt_text` returns the prompt's text, which decode does not have.",
    "routed_experts": "`routed_experts_prompt_start` returns data of the prompt's computation.",
    "beam_search": "`use_beam_search`: the beams do not carry the handoff.",
    "suffix": "`suffix` is rendered into the prompt by the engine that answers.",
    "truncate_prompt_tokens": "`truncate_prompt_tokens` cuts the prompt by a rule that includes the output length.",
    "multimodal": "A message has a part that is not text; token ids alone do not describe it.",
}
"""Why the shape of a request makes it run locally: label and its meaning."""


def unsplittable(api: Api, body: Body) -> str | None:
    """The first reason of `SHAPE_REASONS` for which this request must not be split; None when it may be."""
    for reason, applies in _CHECKS:
        if applies(body):
            return reason
    return _completions_form(body) if api == "completions" else _chat_form(body)


def estimate_tokens(api: Api, body: Body, num_bytes: int) -> int:
    """About how many tokens the prompt has: exact for token ids, else a quarter of its bytes. At least 1.

    Args:
        api: which of OpenAI's interfaces.
        body: the parsed body.
        num_bytes: its length as it came, which stands for a chat's prompt: looking into that would cost more than the
            estimate is worth.
    """
    ids, text = _measure(api, body, num_bytes)
    return max(1, ids + text // 4)


def certainly_shorter(api: Api, body: Body, num_bytes: int, num_tokens: int) -> bool:
    """Whether the prompt has fewer than `num_tokens` tokens: no tokenizer makes more tokens than bytes. What a chat
    template adds is not counted."""
    return sum(_measure(api, body, num_bytes)) < num_tokens


def _measure(api: Api, body: Body, num_bytes: int) -> tuple[int, int]:
    """Token ids and bytes of text in the prompt; the whole body counts as text where the prompt is not plain."""
    prompt = body.get("prompt") if api == "completions" else None
    if isinstance(prompt, str):
        return 0, len(prompt.encode("utf-8", "surrogatepass"))
    return (len(prompt), 0) if is_token_ids(prompt) else (0, num_bytes)


def is_token_ids(value: object) -> TypeGuard[list[int]]:
    """Whether this is a non-empty list of token ids."""
    return isinstance(value, list) and set(map(type, value)) == {int} and min(value) >= 0


def _other_than(name: str, *harmless: object) -> Callable[[Body], bool]:
    return lambda body: name in body and body[name] not in (None, *harmless)


_CHECKS: Final[tuple[tuple[str, Callable[[Body], bool]], ...]] = (
    ("several_choices", _other_than("n", 1)),
    ("best_of", _other_than("best_of", 1)),
    ("prompt_embeds", _other_than("prompt_embeds")),
    ("echo", _other_than("echo", False)),
    ("prompt_logprobs", _other_than("prompt_logprobs")),
    ("prompt_text", _other_than("return_prompt_text", False)),
    ("routed_experts", _other_than("routed_experts_prompt_start", 0)),
    ("beam_search", _other_than("use_beam_search", False)),
    ("suffix", _other_than("suffix")),
    ("truncate_prompt_tokens", _other_than("truncate_prompt_tokens")),
)


def _completions_form(body: Body) -> str | None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if (isinstance(prompt, str) and prompt) or is_token_ids(prompt):
        return None
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(item, str | list) for item in prompt):
        return "several_prompts"
    return "prompt_form"


def _chat_form(body: Body) -> str | None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        return "prompt_form"
    if all(_is_text(message.get("content")) for message in messages):
        return None
    return "multimodal"


_TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
_TEXT_PART_KEYS: Final = _TEXT_PARTS | {"type", "annotations", "cache_control"}


def _is_text(content: object) -> bool:
    """Whether a message's content is text only. Parts of an unknown type or with an unknown key are not."""
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(_is_text_part(part) for part in content)


def _is_text_part(part: object) -> bool:
    if isinstance(part, str):
        return True
    if not isinstance(part, dict) or not part.keys() <= _TEXT_PART_KEYS:
        return False
    kind = part.get("type", "text")
    return isinstance(kind, str) and kind in _TEXT_PARTS
