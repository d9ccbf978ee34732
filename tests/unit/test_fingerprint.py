"""Engines that do not fit are refused with the factor named."""

from __future__ import annotations

import pytest

from vllm_disagg.core.fingerprint import check_compatible, digest_of
from vllm_disagg.errors import IncompatiblePeer

OURS = {"model": "llama", "dtype": "float32", "block size": "32"}


def test_equal_engines_fit() -> None:
    check_compatible(OURS, dict(reversed(OURS.items())))


def test_the_differing_factor_is_named() -> None:
    with pytest.raises(IncompatiblePeer, match="dtype is 'float32' here and 'bfloat16' at the peer") as refusal:
        check_compatible(OURS, {**OURS, "dtype": "bfloat16"})
    assert refusal.value.factor == "dtype"


@pytest.mark.parametrize(("ours", "theirs"), [(OURS, {}), ({}, OURS)])
def test_a_factor_that_one_side_lacks_is_a_difference(ours: dict[str, str], theirs: dict[str, str]) -> None:
    with pytest.raises(IncompatiblePeer, match="absent"):
        check_compatible(ours, theirs)


def test_digests_do_not_depend_on_key_order() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
