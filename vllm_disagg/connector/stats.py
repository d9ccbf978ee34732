"""What an engine with a role reports about KV transfers, on vLLM's own `/metrics`.

All of it is known to the scheduler half, so that nothing has to be aggregated over workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_disagg.connector.tally import Tally
from vllm_disagg.core.lifetime import Transition

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BYTES = tuple(float(4**exponent * 1024) for exponent in range(1, 13))
_RATES = tuple(1e6 * 2.0**exponent for exponent in range(20))
_DESCRIPTORS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)

HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "vllm_disagg_kv_transfer_seconds": ("KV transfer of one request, from its start to prefill's release.", _SECONDS),
    "vllm_disagg_kv_read_seconds": ("The reading part of a KV transfer, on the slowest rank.", _SECONDS),
    "vllm_disagg_kv_transfer_bytes": ("Bytes received for one request, over all ranks.", _BYTES),
    "vllm_disagg_kv_transfer_descriptors": (
        "Copies one request's transfer was cut into, over all ranks.",
        _DESCRIPTORS,
    ),
    "vllm_disagg_kv_read_bytes_per_second": ("Rate of the reading part of a KV transfer, over all ranks.", _RATES),
}
COUNTERS: dict[str, str] = {
    "vllm_disagg_kv_tokens_received_total": "Prompt tokens whose KV decode received instead of computing it.",
    "vllm_disagg_kv_early_reads_total": "KV transfers that were over before the scheduler looked at their request.",
    "vllm_disagg_kv_late_reads_total": "Reads that ended after prefill had let the blocks go, and were dropped.",
    "vllm_disagg_sched_preempted_tokens_total": "Tokens whose KV running requests lost, to be computed again.",
    "vllm_disagg_sched_fetched_ahead_total": "Requests whose KV was fetched while all run slots were taken.",
    "vllm_disagg_sched_admission_pauses_total": "Times that prefill stopped to admit since it held its share of KV.",
    "vllm_disagg_sched_plan_failures_total": "Steps that went in vLLM's order since the plan failed.",
}
LABELLED_COUNTERS: dict[str, tuple[str, str]] = {
    "vllm_disagg_kv_failures_total": ("KV transfers that failed; each was recomputed on decode.", "cause"),
    "vllm_disagg_kv_recomputed_tokens_total": (
        "Prompt tokens computed on decode for want of their KV.",
        "cause",
    ),
    "vllm_disagg_sched_waiting_seconds_total": ("Seconds in which steps left requests waiting, by reason.", "reason"),
    "vllm_disagg_sched_hints_total": ("SLO hints that were not taken as they came.", "outcome"),
    "vllm_disagg_kv_holds_total": ("What happened to the blocks prefill kept for decode.", "event"),
    "vllm_disagg_kv_refused_peers_total": ("Peers refused when they met this engine, by what does not fit.", "factor"),
    "vllm_disagg_kv_introductions_total": ("Prefill engines introduced ahead of their first request.", "outcome"),
    "vllm_disagg_kv_link_stalls_total": (
        "Times in which nothing came from a prefill instance that was read.",
        "prefill",
    ),
    "vllm_disagg_kv_link_rebuilds_total": ("Links replaced since nothing came over them.", "prefill"),
    "vllm_disagg_kv_pair_transfers_total": ("Confirmed KV transfers from one prefill instance.", "prefill"),
    "vllm_disagg_kv_pair_bytes_total": ("Bytes received in them, over all ranks.", "prefill"),
    "vllm_disagg_kv_pair_read_seconds_total": ("Seconds in which they were read, on the slowest rank.", "prefill"),
    "vllm_disagg_kv_pair_descriptors_total": ("Copies they were cut into, over all ranks.", "prefill"),
    "vllm_disagg_kv_transitions_total": (
        "Steps in the lives of requests that are handed over: the state before, and the event.",
        "transition",
    ),
}
GAUGES: dict[str, str] = {
    "vllm_disagg_sched_batch_tokens": "Prompt tokens a step may have now: L_m (prefill), beside streams (decode).",
    "vllm_disagg_kv_held_requests": "Requests whose KV prefill keeps for decode.",
    "vllm_disagg_kv_held_blocks": "KV blocks prefill keeps for decode.",
    "vllm_disagg_kv_held_share": "Share of the KV cache that prefill keeps for decode.",
    "vllm_disagg_sched_without_room_requests": "Requests on prefill's memory until decode has room for their growth.",
    "vllm_disagg_sched_without_room_tokens": "Their tokens.",
    "vllm_disagg_kv_oldest_hold_seconds": "Age of the oldest of them.",
    "vllm_disagg_kv_draining_requests": "Given-up transfers whose blocks decode keeps out of use until they are quiet.",
}


@dataclass
class TransferStats(KVConnectorStats):
    """Observations since the last step. `data` holds plain values only, since it crosses processes:
    histograms as lists, counters as numbers, labelled counters as `name{label}` keys, gauges as numbers."""

    data: dict[str, Any] = field(default_factory=dict)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self.data.setdefault(name, []).append(value)

    def count(self, name: str, amount: float = 1, *, label: str | None = None) -> None:
        """Add to a counter."""
        key = name if label is None else f"{name}{{{label}}}"
        self.data[key] = self.data.get(key, 0) + amount

    def add(self, tally: Tally) -> None:
        """Add what other threads have counted, or what has a label that a peer chooses."""
        for (name, label), amount in tally.take().items():
            self.count(name, amount, label=label or None)

    def transitions(self, taken: Mapping[Transition, int]) -> None:
        """Add steps in the lives of requests."""
        for transition, count in taken.items():
            self.count("vllm_disagg_kv_transitions_total", count, label=transition.label)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self.data[name] = value

    def reset(self) -> None:
        """Start over."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another interval to this one."""
        for key, value in other.data.items():
            if key in GAUGES or key not in self.data:
                self.data[key] = value
            else:
                self.data[key] = self.data[key] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """A few figures for vLLM's periodic log line."""
        seconds = self.data.get("vllm_disagg_kv_transfer_seconds", [])
        summary: dict[str, int | float] = {"transfers": len(seconds)}
        if seconds:
            summary["mean_ms"] = round(1000 * sum(seconds) / len(seconds), 2)
            num_bytes, read_s = (
                sum(self.data.get(name, ()))
                for name in ("vllm_disagg_kv_transfer_bytes", "vllm_disagg_kv_read_seconds")
            )
            summary["mib"] = round(num_bytes / 2**20, 2)
            summary["read_gb_per_s"] = round(num_bytes / read_s / 1e9, 2) if read_s else 0.0
        failures = sum(value for key, value in self.data.items() if key.startswith("vllm_disagg_kv_failures_total"))
        return {**summary, "failures": failures, "held_blocks": self.data.get("vllm_disagg_kv_held_blocks", 0)}

    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.data


class TransferPromMetrics(KVConnectorPromMetrics):
    """The same on Prometheus, with vLLM's own labels (`model_name`, `engine`) and one of ours where there is one."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        histogram, counter, gauge = metric_types[Histogram], metric_types[Counter], metric_types[Gauge]
        self._metrics: dict[str, Any] = {}
        for name, (text, buckets) in HISTOGRAMS.items():
            self._metrics[name] = histogram(name=name, documentation=text, buckets=list(buckets), labelnames=labelnames)
        for name, text in COUNTERS.items():
            self._metrics[name] = counter(name=name, documentation=text, labelnames=labelnames)
        for name, (text, label) in LABELLED_COUNTERS.items():
            self._metrics[name] = counter(name=name, documentation=text, labelnames=[*labelnames, label])
        for name, text in GAUGES.items():
            self._metrics[name] = gauge(
                name=name, documentation=text, labelnames=labelnames, multiprocess_mode="mostrecent"
            )
        for name in (*HISTOGRAMS, *COUNTERS, *GAUGES):
            for values in per_engine_labelvalues.values():
                self._metrics[name].labels(*values)  # shown from the start, with nothing counted

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Called in the API server for each step that had something to tell."""
        values = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            name, _, label = key.rstrip("}").partition("{")
            metric = self._metrics.get(name)
            if metric is None:
                continue
            child = metric.labels(*values, label) if label else metric.labels(*values)
            if name in HISTOGRAMS:
                for item in value:
                    child.observe(item)
            elif name in GAUGES:
                child.set(value)
            else:
                child.inc(value)
