"""Who a decode engine may connect to before a request has come: only those who are proven to be of its deployment."""

from __future__ import annotations

import base64

import pytest

from vllm_disagg.core.introduction import (
    MAX_INTRODUCTION_BYTES,
    VALID_S,
    IntroductionRefused,
    answer_challenge,
    check_introduction,
    make_challenge,
)
from vllm_disagg.core.types import EngineId

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
PREFILL, DECODE = EngineId("prefill-run"), EngineId("decode-run")
CONTROL = "tcp://10.0.0.7:14579"


def introduction(*, key: bytes = KEY, decode: EngineId = DECODE, made_s: float = 100.0) -> str:
    return answer_challenge(make_challenge(decode, key, now_s=made_s), engine_id=PREFILL, control=CONTROL, key=key)


def refusal(raw: str, *, now_s: float = 101.0) -> str:
    with pytest.raises(IntroductionRefused) as caught:
        check_introduction(raw, KEY, engine_id=DECODE, now_s=now_s)
    return caught.value.reason


def test_a_prefill_engine_of_the_deployment_is_believed() -> None:
    told, nonce = check_introduction(introduction(), KEY, engine_id=DECODE, now_s=101.0)

    assert (told.engine_id, told.control) == (PREFILL, CONTROL)
    assert nonce
    assert check_introduction(introduction(), KEY, engine_id=DECODE, now_s=101.0)[1] != nonce


def test_each_introduction_fits_into_what_is_read() -> None:
    challenge = make_challenge(EngineId("d" * 128), KEY, now_s=1e9)
    long = answer_challenge(challenge, engine_id=EngineId("p" * 128), control="tcp://" + "h" * 255, key=KEY)

    assert len(long) < MAX_INTRODUCTION_BYTES


@pytest.mark.parametrize(
    "raw", ["", "x", "é", "AAAA" * 100, "A" * 100_000, base64.urlsafe_b64encode(b"m" * 80).decode()]
)
def test_what_was_not_signed_is_forged(raw: str) -> None:
    assert refusal(raw) == "forged"


def test_every_changed_byte_is_noticed() -> None:
    raw = base64.urlsafe_b64decode(introduction())
    for place in range(len(raw)):
        changed = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        assert refusal(base64.urlsafe_b64encode(changed).decode()) == "forged"


def test_another_deployments_engine_is_a_stranger() -> None:
    assert refusal(introduction(key=OTHER_KEY)) == "forged"


def test_a_challenge_is_no_introduction() -> None:
    assert refusal(make_challenge(DECODE, KEY, now_s=100.0)) == "forged"


def test_prefill_answers_no_stranger() -> None:
    for challenge in ("", "tcp://attacker:1", make_challenge(DECODE, OTHER_KEY, now_s=1.0), introduction()):
        with pytest.raises(IntroductionRefused):
            answer_challenge(challenge, engine_id=PREFILL, control=CONTROL, key=KEY)


def test_an_introduction_for_another_run_of_the_engine_is_not_taken() -> None:
    assert refusal(introduction(decode=EngineId("its last run"))) == "foreign"


@pytest.mark.parametrize("now_s", [100.0 + VALID_S + 1, 99.0])
def test_it_must_answer_a_challenge_of_a_moment_ago(now_s: float) -> None:
    assert refusal(introduction(made_s=100.0), now_s=now_s) == "expired"
