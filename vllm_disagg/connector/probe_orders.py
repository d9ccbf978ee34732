"""Orders to probe a prefill engine: each one is obeyed once, by the run of the engine that it names."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from vllm_disagg.connector.pair_probe import PairProbe, run_probe
from vllm_disagg.connector.recent import RecentIds
from vllm_disagg.core.probe import OrderRefused, PairReport, ProbeOrder, check_order
from vllm_disagg.core.types import EngineId, TransferId

logger = logging.getLogger(__name__)

_REMEMBER_S = 24 * 3600.0


class ProbeOrders:
    """Checks orders and obeys them. Any thread may call it, one at a time.

    Args:
        engine_id: this run of this engine.
        key: the deployment key, which signs orders.
        make_probe: a probe by an order.
    """

    def __init__(self, *, engine_id: EngineId, key: bytes, make_probe: Callable[[ProbeOrder], PairProbe]) -> None:
        self._engine_id, self._key, self._make_probe = engine_id, key, make_probe
        self._used = RecentIds(keep_s=_REMEMBER_S)

    def obey(self, raw: bytes) -> PairReport:
        """What came of an order."""
        begun_s = time.monotonic()
        try:
            order = self._checked(raw)
            report = run_probe(lambda: self._make_probe(order))
        except OrderRefused as refusal:
            logger.warning("probe.refused: %s", refusal)
            report = PairReport(stage="greeting", error=str(refusal))
        logger.info("probe.done stage=%s cause=%s s=%.1f", report.stage, report.cause, time.monotonic() - begun_s)
        return report

    def _checked(self, raw: bytes) -> ProbeOrder:
        order = check_order(raw, self._key)
        if order.task != "pair" or order.engine_id != self._engine_id:
            raise OrderRefused("the order is for another engine, or for an earlier run of this one", signed=True)
        if not self._used.add(TransferId(order.nonce), now_s=time.monotonic()):
            raise OrderRefused("the order was obeyed before", signed=True)
        return order
