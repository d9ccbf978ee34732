"""Requests whose split answers must equal the undivided engine's, token by token. Seeded: the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.e2e.client import Case
from tests.e2e.engines import BLOCK_SIZE, MAX_MODEL_LEN

_WORDS = [
    "river",
    "stone",
    "engine",
    "paper",
    "window",
    "garden",
    "music",
    "number",
    "silver",
    "morning",
    "question",
    "answer",
    "bridge",
    "forest",
    "village",
    "market",
    "doctor",
    "captain",
    "letter",
    "mountain",
    "winter",
    "summer",
    "yellow",
    "purple",
    "simple",
    "distant",
    "gentle",
    "broken",
    "hidden",
    "ancient",
]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}


VOCABULARY = range(1000, 30000)
"""Ids of ordinary tokens of SmolLM2 and of emulated models."""

BYTES = range(5, 250)
"""The same of the tiny Llama, whose tokens are bytes."""


def prompt_of(num_tokens: int, seed: int, vocabulary: range = VOCABULARY) -> list[int]:
    """Token ids of plausible text; every seed begins differently, so that no prefix is cached by accident."""
    rng = random.Random(seed)
    return [rng.choice(vocabulary) for _ in range(num_tokens)]


def text_of(num_words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(_WORDS) for _ in range(num_words))


def length_cases(lengths: Sequence[int], *, seed: int, max_tokens: int = 6) -> list[Case]:
    """One completion for each prompt length, every third of them streaming."""
    return [
        Case(
            name=f"length {length}",
            body={"prompt": prompt_of(length, seed + length), "max_tokens": min(max_tokens, MAX_MODEL_LEN - length)},
            stream=index % 3 == 2,
        )
        for index, length in enumerate(lengths)
    ]


def boundaries(blocks: Sequence[int]) -> list[int]:
    """Each multiple of the block size, one less, and one more."""
    return [BLOCK_SIZE * block + offset for block in blocks for offset in (-1, 0, 1) if BLOCK_SIZE * block + offset > 0]


def chat_cases(count: int, *, seed: int) -> list[Case]:
    """Chats of one and of several turns, streaming and not."""
    cases = []
    for index in range(count):
        messages = [{"role": "user", "content": f"{seed + index}: {text_of(5 + 9 * index, seed + index)}. Continue."}]
        if index % 3 == 1:
            messages.insert(0, {"role": "system", "content": f"You are assistant {index}. Be brief."})
        if index % 3 == 2:
            messages += [
                {"role": "assistant", "content": text_of(12, index)},
                {"role": "user", "content": "Why?"},
            ]
        cases.append(
            Case(name=f"chat {index}", body={"messages": messages, "max_completion_tokens": 12}, stream=index % 2 == 1)
        )
    return cases


def shape_cases(*, seed: int, repeat: int = 1) -> list[Case]:
    """Request shapes that people use: stop strings, logprobs, one token, guided JSON, penalties, seeds, biases."""
    cases: list[Case] = []
    for round_ in range(repeat):
        prompt = prompt_of(50 + 37 * round_, seed + 100 * round_)
        question = [{"role": "user", "content": f"{seed + round_}: {text_of(20, seed + round_)}. Tell me a story."}]
        shapes: dict[str, dict[str, Any]] = {
            "one token": {"prompt": prompt, "max_tokens": 1},
            "one token chat": {"messages": question, "max_completion_tokens": 1},
            "stop string": {"messages": question, "max_completion_tokens": 40, "stop": [" the", "."]},
            "stop string included": {
                "messages": question, "max_completion_tokens": 30, "stop": [","], "include_stop_str_in_output": True,
            },
            "stop token": {"prompt": prompt, "max_tokens": 20, "stop_token_ids": list(range(20, 400))},
            "logprobs": {"prompt": prompt, "max_tokens": 6, "logprobs": 3},
            "logprobs chat": {"messages": question, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 2},
            "guided json": {
                "messages": question,
                "max_completion_tokens": 40,
                "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}},
            },
            "guided choice": {
                "prompt": prompt, "max_tokens": 8, "structured_outputs": {"choice": ["yes indeed", "no never"]},
            },
            "penalties": {
                "prompt": prompt, "max_tokens": 8, "frequency_penalty": 0.5, "presence_penalty": 0.5,
                "repetition_penalty": 1.2,
            },
            "min tokens": {"messages": question, "min_tokens": 8, "max_completion_tokens": 10},
            "logit bias": {"prompt": prompt, "max_tokens": 5, "logit_bias": {"500": 5.0}},
            "ignore eos": {"messages": question, "max_completion_tokens": 12, "ignore_eos": True},
            "text prompt": {"prompt": f"{seed + round_} {text_of(30, seed + round_)}", "max_tokens": 8},
            "seeded sampling": {"prompt": prompt, "max_tokens": 8, "temperature": 0.8, "seed": 7 + round_},
        }  # fmt: skip
        for index, (name, body) in enumerate(shapes.items()):
            for stream in (False, True):
                salted = {**body, "cache_salt": f"{seed}-{round_}-{index}-{stream}"}
                cases.append(Case(name=f"{name} {round_} stream={stream}", body=salted, stream=stream))
    return cases


def local_cases(*, seed: int) -> list[Case]:
    """Shapes that cannot be split: served by the decode instance alone, with the same answer."""
    prompt = prompt_of(45, seed)
    bodies: dict[str, dict[str, Any]] = {
        "several choices": {"prompt": prompt, "max_tokens": 4, "n": 2, "temperature": 0.7, "seed": 3},
        "several prompts": {"prompt": [prompt, prompt[::-1]], "max_tokens": 4},
        "echo": {"prompt": text_of(10, seed), "max_tokens": 4, "echo": True, "logprobs": 1},
        "prompt logprobs": {"prompt": prompt, "max_tokens": 4, "prompt_logprobs": 1},
    }
    return [Case(name=name, body=body, route="local") for name, body in bodies.items()]
