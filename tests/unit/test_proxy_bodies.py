"""The allowlist: whatever a client sends, only the proxy writes KV parameters and request ids."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.core.scheduling.hints import after
from vllm_disagg.core.shapes import Api
from vllm_disagg.core.types import TransferId
from vllm_disagg.proxy.bodies import FIELDS, RESERVED, decode_body, encode, known, parse, prefill_body, without_hints
from vllm_disagg.proxy.replies import ApiError

APIS: tuple[Api, ...] = get_args(Api)
TRANSFER = TransferId("0" * 32)
DISGUISES = ["KV-transfer-params", " kv_transfer_params ", "Request_ID"]
SPELLINGS = [*sorted(RESERVED), *(name.upper() for name in sorted(RESERVED)), *DISGUISES]

names = st.sampled_from([*sorted(FIELDS["chat"] | FIELDS["completions"]), *SPELLINGS, "extra_body", "unknown"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(), inner, max_size=3)
)
pairs = st.lists(st.tuples(names, values), max_size=6)


def json_of(members: list[tuple[str, Any]]) -> bytes:
    """An object as text, so that a key may come twice."""
    return ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in members) + "}").encode()


@given(members=pairs, api=st.sampled_from(APIS))
def test_no_reserved_field_of_a_client_ever_reaches_an_engine(members: list[tuple[str, Any]], api: Api) -> None:
    try:
        fields = known(api, parse(json_of(members)))
    except ApiError as error:
        assert error.status == 400
        return

    asked = json.loads(encode(prefill_body(api, fields, TRANSFER)))
    split = json.loads(encode(decode_body(api, fields, token_ids=[1], transfer_id=TRANSFER, handoff="h")))
    local = json.loads(encode(decode_body(api, fields)))

    ids = {} if api == "completions" else {"prompt_token_ids": [1]}
    assert asked.pop("kv_transfer_params") == {
        "do_remote_decode": True, "do_remote_prefill": False, "transfer_id": TRANSFER,
    }  # fmt: skip
    assert split.pop("kv_transfer_params") == {
        "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": TRANSFER, "handoff": "h", **ids,
    }  # fmt: skip
    for body in (asked, split, local):
        assert body.keys() <= FIELDS[api]
        assert not {name.strip().lower().replace("-", "_") for name in body.get("vllm_xargs") or {}} & RESERVED
    assert local == fields


@given(members=pairs)
def test_a_key_that_comes_twice_is_refused(members: list[tuple[str, Any]]) -> None:
    with pytest.raises(ApiError, match="appears twice"):
        parse(json_of([*members, ("top_k", 1), ("top_k", 2)]))


@given(raw=st.binary() | st.text().map(str.encode))
def test_whatever_bytes_come_the_answer_is_an_object_or_a_400(raw: bytes) -> None:
    try:
        assert isinstance(parse(raw), dict)
    except ApiError as error:
        assert error.status == 400


@pytest.mark.parametrize("place", ["vllm_xargs", "extra_body", "extra_args"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_reserved_names_are_named_wherever_they_hide(place: str, name: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(json.dumps({place: {name: "x"}}).encode())
    assert caught.value.param == name


def test_reserved_names_may_be_part_of_what_a_user_says() -> None:
    tool = {"function": {"parameters": {"properties": {"request_id": {"type": "string"}}}}}
    body = {"messages": [{"role": "user", "content": "kv_transfer_params"}], "tools": [tool]}
    assert known("chat", parse(json.dumps(body).encode())) == body


def test_text_survives_unchanged() -> None:
    text = 'é\u2028"\\\U0001f600\x00' + "\ud800"
    raw = json.dumps({"prompt": text}).encode()
    assert json.loads(encode(decode_body("completions", parse(raw)))) == {"prompt": text}


def test_xargs_are_passed_on() -> None:
    xargs = {"a": 1, "b": "x", "c": [1.5, "y"], "d": True}
    assert known("chat", parse(json.dumps({"vllm_xargs": xargs}).encode())) == {"vllm_xargs": xargs}


def test_hints_reach_both_engines_and_other_arguments_decode_alone() -> None:
    fields = without_hints({"prompt": [1], "vllm_xargs": {"slo_ttft_ms": 9e9, "mine": 1}})
    hints = {"slo_ttft_ms": 250.0}

    assert fields == {"prompt": [1], "vllm_xargs": {"mine": 1}}
    assert prefill_body("completions", fields, TRANSFER, hints=hints)["vllm_xargs"] == hints
    assert decode_body("completions", fields, hints=hints)["vllm_xargs"] == {"mine": 1, **hints}
    assert without_hints({"prompt": [1], "vllm_xargs": {"slo_priority": 1}}) == {"prompt": [1]}
    assert "vllm_xargs" not in prefill_body("completions", {"prompt": [1]}, TRANSFER)


def test_of_the_time_to_the_first_token_what_is_left_travels() -> None:
    assert after({"slo_ttft_ms": 300.0, "slo_tpot_ms": 40.0}, 0.1) == {"slo_ttft_ms": 200.0, "slo_tpot_ms": 40.0}
    assert after({"slo_ttft_ms": 300.0}, 5.0) == {"slo_ttft_ms": 1.0}
