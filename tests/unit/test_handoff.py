"""The handoff is a capability: nobody without the key writes one, and it fits one prompt only."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.core.handoff import HANDOFF_VERSION, Handoff, check_fits, prompt_digest, seal, unseal
from vllm_disagg.core.types import EngineId, new_nonce, new_transfer_id
from vllm_disagg.errors import InvalidHandoff

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
PROMPT = list(range(70))


def make_handoff(**changes: Any) -> Handoff:
    values: dict[str, Any] = {
        "version": HANDOFF_VERSION,
        "transfer_id": new_transfer_id(),
        "engine_id": EngineId("engine"),
        "control": "tcp://127.0.0.1:14579",
        "block_ids": ((5, 6, 9),),
        "num_tokens": len(PROMPT),
        "prompt_digest": prompt_digest(PROMPT, salt="s"),
        "lease_s": 30.0,
        "nonce": new_nonce(),
    }
    return Handoff(**{**values, **changes})


def fits(handoff: Handoff, **changes: Any) -> None:
    values: dict[str, Any] = {"token_ids": PROMPT, "salt": "s", "block_size": 32, "num_groups": 1}
    check_fits(handoff, **{**values, **changes})


def test_what_was_sealed_is_unsealed_unchanged() -> None:
    handoff = make_handoff()

    assert unseal(seal(handoff, KEY), KEY) == handoff


def test_another_deployments_handoff_is_refused() -> None:
    with pytest.raises(InvalidHandoff, match="not signed with this deployment's key"):
        unseal(seal(make_handoff(), OTHER_KEY), KEY)


@given(st.data())
def test_no_edited_handoff_is_accepted(data: st.DataObject) -> None:
    raw = bytearray(base64.urlsafe_b64decode(seal(make_handoff(), KEY)))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))

    with pytest.raises(InvalidHandoff):
        unseal(base64.urlsafe_b64encode(bytes(raw)).decode(), KEY)


@given(
    st.one_of(
        st.none(), st.integers(), st.text(), st.binary(), st.lists(st.text()), st.dictionaries(st.text(), st.text())
    )
)
def test_anything_else_is_refused_without_another_exception(value: object) -> None:
    with pytest.raises(InvalidHandoff):
        unseal(value, KEY)


def test_a_handoff_of_a_later_version_is_named() -> None:
    with pytest.raises(InvalidHandoff, match="version 99"):
        unseal(seal(make_handoff(version=99), KEY), KEY)


def test_it_fits_its_own_prompt() -> None:
    fits(make_handoff())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [*PROMPT[:-1], 999]}, "another prompt"),
        ({"token_ids": PROMPT[:-1]}, "another prompt"),
        ({"salt": "tenant"}, "another prompt"),
        ({"num_groups": 2}, "KV cache groups"),
        ({"block_size": 16}, "fewer than the 5 blocks"),
    ],
)
def test_it_fits_no_other_request(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidHandoff, match=message):
        fits(make_handoff(), **changes)


def test_negative_blocks_are_refused() -> None:
    with pytest.raises(InvalidHandoff, match="negative"):
        fits(make_handoff(block_ids=((5, -6, 9),)))


def test_a_prompt_digest_tells_token_boundaries_apart() -> None:
    assert prompt_digest([1, 23]) != prompt_digest([12, 3])
