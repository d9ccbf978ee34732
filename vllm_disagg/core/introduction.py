"""How a decode engine learns of a prefill engine before its first request, through somebody without the key.

    proxy                      decode's API server        prefill's API server
      | --- who may be introduced? --->|                           |
      |<---------- challenge ----------|                           |
      | ------------------------- challenge ---------------------->|
      |<----------------------- introduction ----------------------|
      | -------- introduction -------->|

A decode engine connects to nobody whom a client or the proxy names: the introduction is signed under the deployment
key, by the very run of the prefill engine that it names. It answers a challenge that this run of the decode engine has
made a moment ago by its own clock, and works once. So nothing in it depends on another host's clock, and an old one is
of no use. Version history:

1  first version
"""

from __future__ import annotations

import secrets
from typing import Final, Literal, TypeVar

import msgspec

from vllm_disagg.core.signed import sign, verified
from vllm_disagg.core.types import EngineId
from vllm_disagg.errors import ConfigError

INTRODUCE_PATH: Final = "/disagg/introduce"
INTRODUCTION_VERSION: Final = 1
VALID_S: Final = 30.0
"""From a challenge to the introduction that answers it, by the clock of the host that made the challenge."""

MAX_INTRODUCTION_BYTES: Final = 4096

Refusal = Literal["forged", "foreign", "expired", "reused", "full"]
"""Why an introduction is not taken: not signed with our key, for another run of this engine, too late, seen before, or
enough engines are known."""


class Challenge(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What a decode engine wants answered.

    Attributes:
        engine_id: its own run.
        made_s: when it was made, on its host's monotonic clock; of no meaning elsewhere.
        nonce: another one each time.
    """

    version: int
    engine_id: EngineId
    made_s: float
    nonce: str


class Introduction(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """A prefill engine's answer: this run of mine listens there. `challenge` is the one that it was given."""

    version: int
    engine_id: EngineId
    control: str
    challenge: str


Word = TypeVar("Word", Challenge, Introduction)


class IntroductionRefused(ConfigError):
    """It is not taken, and nobody is connected to. `reason` is its label in the metrics."""

    def __init__(self, reason: Refusal, text: str) -> None:
        self.reason: Refusal = reason
        super().__init__(text)


def make_challenge(engine_id: EngineId, key: bytes, *, now_s: float) -> str:
    """A fresh challenge of this decode engine.

    Args:
        engine_id: its run.
        key: the deployment key.
        now_s: its host's monotonic clock.
    """
    challenge = Challenge(version=INTRODUCTION_VERSION, engine_id=engine_id, made_s=now_s, nonce=secrets.token_hex(16))
    return sign(msgspec.msgpack.encode(challenge), key, "challenge").decode("ascii")


def answer_challenge(challenge: str, *, engine_id: EngineId, control: str, key: bytes) -> str:
    """A prefill engine introduces itself.

    Raises:
        IntroductionRefused: the challenge is not of an engine of this deployment.
    """
    _opened(challenge, key, "challenge", Challenge)
    introduction = Introduction(version=INTRODUCTION_VERSION, engine_id=engine_id, control=control, challenge=challenge)
    return sign(msgspec.msgpack.encode(introduction), key, "introduction").decode("ascii")


def check_introduction(raw: str, key: bytes, *, engine_id: EngineId, now_s: float) -> tuple[Introduction, str]:
    """What a decode engine may believe.

    Returns:
        The introduction, and the nonce by which it is known when it comes again.

    Raises:
        IntroductionRefused: forged, for another engine or another run of this one, or answered too late.
    """
    introduction = _opened(raw, key, "introduction", Introduction)
    challenge = _opened(introduction.challenge, key, "challenge", Challenge)
    if challenge.engine_id != engine_id:
        raise IntroductionRefused("foreign", "the introduction is for another engine, or an earlier run of this one")
    if not 0 <= now_s - challenge.made_s <= VALID_S:
        raise IntroductionRefused(
            "expired",
            f"the introduction came {now_s - challenge.made_s:.0f} s after its challenge; {VALID_S:g} s count",
        )
    return introduction, challenge.nonce


def _opened(raw: str, key: bytes, purpose: str, kind: type[Word]) -> Word:
    text = raw.encode("ascii", errors="replace")
    body = verified(text, key, purpose, max_bytes=MAX_INTRODUCTION_BYTES)
    if body is None:
        raise IntroductionRefused("forged", f"the {purpose} is not signed with this deployment's key")
    try:
        word = msgspec.msgpack.decode(body, type=kind)
    except (ValueError, RecursionError) as error:
        raise IntroductionRefused(
            "forged", f"the {purpose} has another layout: run the same vllm_disagg everywhere"
        ) from error
    if word.version != INTRODUCTION_VERSION:
        raise IntroductionRefused(
            "forged", f"the {purpose} has version {word.version}; this engine reads {INTRODUCTION_VERSION}"
        )
    return word
