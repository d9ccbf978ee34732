"""Introductions of prefill engines: each is checked, counted, and taken once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

from vllm_disagg.connector.recent import RecentIds
from vllm_disagg.connector.tally import INTRODUCTIONS, Tally
from vllm_disagg.core.introduction import VALID_S, IntroductionRefused, Refusal, check_introduction
from vllm_disagg.core.types import EngineId, TransferId

logger = logging.getLogger(__name__)

Outcome = Literal["taken"] | Refusal


class Introductions:
    """Those of one decode engine. Used by one thread.

    Args:
        engine_id: this run of this engine.
        key: the deployment key.
        tally: where they are counted, by outcome.
        introduce: takes a prefill engine's run and its control address; False if it knows enough of them.
        clock: monotonic seconds of this host.
    """

    def __init__(
        self,
        *,
        engine_id: EngineId,
        key: bytes,
        tally: Tally,
        introduce: Callable[[EngineId, str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine_id, self._key, self._tally = engine_id, key, tally
        self._introduce, self._clock = introduce, clock
        self._used = RecentIds(keep_s=2 * VALID_S)

    def take(self, raw: bytes) -> dict[str, str]:
        """Connect to a prefill engine that is proven to exist, and to no other one."""
        outcome: Outcome = "taken"
        try:
            self._check_and_take(raw.decode("ascii", errors="replace"))
        except IntroductionRefused as refusal:
            outcome = refusal.reason
            logger.warning("introduction.refused reason=%s: %s", outcome, refusal)
        self._tally.add(INTRODUCTIONS, outcome)
        return {"outcome": outcome}

    def _check_and_take(self, raw: str) -> None:
        now_s = self._clock()
        introduction, nonce = check_introduction(raw, self._key, engine_id=self._engine_id, now_s=now_s)
        if not self._used.add(TransferId(nonce), now_s=now_s):
            raise IntroductionRefused("reused", "the introduction was taken before")
        if not self._introduce(introduction.engine_id, introduction.control):
            raise IntroductionRefused("full", "enough prefill engines are known: this one is met at its first request")
        logger.info("introduction.taken engine=%s control=%s", introduction.engine_id, introduction.control)
