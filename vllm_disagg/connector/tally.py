"""Counts that any thread adds to and the engine's main thread carries to the metrics."""

from __future__ import annotations

import threading
from collections import Counter

MAX_LABELS = 64
"""Label values of one metric; what comes after them is counted as `OTHER`, so that no peer can add series for ever."""

OTHER = "other"

REFUSED_PEERS = "vllm_disagg_kv_refused_peers_total"
"""Labelled with the factor that differs: a key of the fingerprint, or one of these three."""

LATE_READS = "vllm_disagg_kv_late_reads_total"

LINK_STALLS, LINK_REBUILDS = "vllm_disagg_kv_link_stalls_total", "vllm_disagg_kv_link_rebuilds_total"
"""Labelled with the prefill instance's control address."""

INTRODUCTIONS = "vllm_disagg_kv_introductions_total"
"""Labelled with their outcome."""

KEY_FACTOR, PROTOCOL_FACTOR, LAYOUT_FACTOR = "deployment key", "vllm_disagg protocol", "layout"


class Tally:
    """Amounts by metric and label since the last `take`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._amounts: Counter[tuple[str, str]] = Counter()
        self._labels: dict[str, set[str]] = {}

    def add(self, metric: str, label: str, amount: float = 1) -> None:
        """Count something."""
        with self._lock:
            self._amounts[metric, self._known(metric, label)] += amount  # type: ignore[assignment]  # typeshed: int

    def take(self) -> dict[tuple[str, str], float]:
        """What was added since the last call."""
        with self._lock:
            amounts, self._amounts = self._amounts, Counter()
        return dict(amounts)

    def _known(self, metric: str, label: str) -> str:
        labels = self._labels.setdefault(metric, set())
        if label not in labels and len(labels) >= MAX_LABELS:
            return OTHER
        labels.add(label)
        return label
