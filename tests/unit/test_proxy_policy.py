"""Where requests go, as a function of plain values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.core.policy import Decision, Load, decide, least_loaded
from vllm_disagg.core.shapes import Api, certainly_shorter, estimate_tokens, unsplittable


def load(index: int, num_tokens: int = 0, num_requests: int = 0, last_chosen: int = 0) -> Load:
    return Load(index=index, num_tokens=num_tokens, num_requests=num_requests, last_chosen=last_chosen)


def choose(
    prefill: list[Load], decode: list[Load], *, shape: str | None = None, short: bool = False, misfits: Any = ()
) -> Decision:
    return decide(shape=shape, short=short, prefill=prefill, decode=decode, fits=lambda p, d: (p, d) not in misfits)


def test_least_loaded_counts_tokens_then_requests_then_turns() -> None:
    assert least_loaded([]) is None
    assert least_loaded([load(0, 10, 1), load(1, 9, 5)]) == 1
    assert least_loaded([load(0, 9, 5), load(1, 9, 4)]) == 1
    assert least_loaded([load(0, last_chosen=3), load(1, last_chosen=2)]) == 1


def test_split_goes_to_the_least_loaded_of_each_role() -> None:
    decision = choose([load(0, 5), load(1, 3)], [load(0, 1), load(1, 2)])
    assert decision == Decision(route="split", reason="split", prefill=1, decode=0)


def test_without_decode_a_prefill_instance_serves_whatever_it_is() -> None:
    expected = Decision(route="local", reason="no_decode", prefill=1)

    assert choose([load(0, 5), load(1, 4)], []) == expected
    assert choose([load(0, 5), load(1, 4)], [], shape="echo", short=True) == expected


def test_without_anybody_it_is_refused() -> None:
    assert choose([], []) == choose([], [], shape="echo") == Decision(route="refuse", reason="no_instance")


def test_the_first_reason_to_run_locally_is_told() -> None:
    assert choose([], [load(0)], shape="echo", short=True).reason == "echo"
    assert choose([], [load(0)], short=True).reason == "short_prompt"
    assert choose([], [load(0)]).reason == "no_prefill"
    assert choose([load(0)], [load(0)], misfits={(0, 0)}).reason == "incompatible"


def test_a_busier_decode_that_fits_beats_an_idle_one_that_does_not() -> None:
    decision = choose([load(0)], [load(0, 0), load(1, 99)], misfits={(0, 0)})
    assert (decision.route, decision.decode) == ("split", 1)


@given(
    prefill=st.sets(st.integers(0, 3)),
    decode=st.sets(st.integers(0, 3)),
    misfits=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))),
    shape=st.none() | st.just("echo"),
)
def test_a_misfit_is_never_paired_and_nobody_is_refused_while_an_instance_lives(
    prefill: set[int], decode: set[int], misfits: set[tuple[int, int]], shape: str | None
) -> None:
    decision = choose([load(p) for p in prefill], [load(d) for d in decode], shape=shape, misfits=misfits)

    assert (decision.route == "refuse") == (not decode and not prefill)
    assert (decision.decode is not None) == bool(decode)
    if decode:
        assert (decision.route == "split") == (decision.prefill is not None)
    elif prefill:
        assert (decision.route, decision.reason, decision.prefill in prefill) == ("local", "no_decode", True)
    could = shape is None and any((p, d) not in misfits for p in prefill for d in decode)
    assert (decision.route == "split") == could
    if decision.route == "split":
        assert (decision.prefill, decision.decode) not in misfits


@pytest.mark.parametrize(
    ("api", "body"),
    [
        ("completions", {"prompt": "x", "n": 1, "echo": False, "best_of": None, "logprobs": 5}),
        ("completions", {"prompt": ["x"]}),
        ("completions", {"prompt": [1, 2]}),
        ("completions", {"prompt": [[1, 2]]}),
        ("chat", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": []}]}),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}]}),
        ("chat", {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}),
    ],
)
def test_ordinary_requests_may_be_split(api: Api, body: dict[str, Any]) -> None:
    assert unsplittable(api, body) is None


@pytest.mark.parametrize(
    ("api", "body", "reason"),
    [
        ("completions", {"prompt": "x", "n": "1"}, "several_choices"),
        ("completions", {"prompt": "x", "echo": "false"}, "echo"),
        ("completions", {}, "prompt_form"),
        ("completions", {"prompt": ""}, "prompt_form"),
        ("completions", {"prompt": []}, "prompt_form"),
        ("completions", {"prompt": [1, "x"]}, "prompt_form"),
        ("completions", {"prompt": [True]}, "prompt_form"),
        ("completions", {"prompt": [["x"]]}, "prompt_form"),
        ("completions", {"prompt": [[1], [2]]}, "several_prompts"),
        ("chat", {"messages": []}, "prompt_form"),
        ("chat", {"messages": ["x"]}, "prompt_form"),
        ("chat", {"messages": [{"content": [{"type": "input_audio", "input_audio": {}}]}]}, "multimodal"),
        ("chat", {"messages": [{"content": [{"type": "text", "text": "x", "image_url": "y"}]}]}, "multimodal"),
        ("chat", {"messages": [{"content": [{"type": "new_kind", "text": "x"}]}]}, "multimodal"),
        ("chat", {"messages": [{"content": {"type": "text"}}]}, "multimodal"),
    ],
)
def test_everything_unusual_runs_locally(api: Api, body: dict[str, Any], reason: str) -> None:
    assert unsplittable(api, body) == reason


def test_prompts_are_measured() -> None:
    assert estimate_tokens("completions", {"prompt": [7] * 12}, 1000) == 12
    assert estimate_tokens("completions", {"prompt": "x" * 40}, 52) == 10
    assert estimate_tokens("completions", {}, 2) == 1
    assert estimate_tokens("chat", {"messages": []}, 400) == 100
    assert certainly_shorter("completions", {"prompt": [7] * 12}, 1000, 13)
    assert not certainly_shorter("completions", {"prompt": [7] * 12}, 1000, 12)
    assert certainly_shorter("completions", {"prompt": "é" * 4}, 1000, 9)
    assert not certainly_shorter("completions", {"prompt": "é" * 4}, 1000, 8)
    assert certainly_shorter("chat", {"messages": []}, 400, 401)
    assert not certainly_shorter("chat", {"messages": []}, 400, 400)
