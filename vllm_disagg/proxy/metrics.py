"""The proxy's metrics: one table of names and help texts, one registry per app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METRICS: Final[Mapping[str, str]] = {
    "vllm_disagg_proxy_requests_total": "Requests by interface, final route (split, local, refuse) and reason.",
    "vllm_disagg_proxy_responses_total": "Answers by HTTP status; a stream that breaks later still counts as 200.",
    "vllm_disagg_proxy_requests_in_progress": "Requests that have been accepted and not yet ended.",
    "vllm_disagg_proxy_leg_seconds": "Seconds from sending a leg to its answer (prefill) or first event (decode).",
    "vllm_disagg_proxy_leg_failures_total": "Legs that failed, by leg (prefill, decode, stream, models) and cause.",
    "vllm_disagg_proxy_releases_total": "KV given back to prefill instances without a pull, by result.",
    "vllm_disagg_proxy_instances_up": "Whether an instance may be given requests, by role and place in its list.",
    "vllm_disagg_proxy_outstanding_tokens": "Prompt tokens of the requests outstanding on an instance.",
    "vllm_disagg_proxy_incompatible_pairs": "Pairs of a prefill and a decode instance whose KV caches do not match.",
    "vllm_disagg_proxy_introductions_total": "Introductions of a prefill to a decode instance, by result.",
    "vllm_disagg_proxy_client_disconnects_total": "Clients that left before their answer ended, by phase.",
    "vllm_disagg_proxy_dropped_fields_total": "Unknown fields in clients' bodies that were not forwarded.",
    "vllm_disagg_proxy_slo_hints_total": "SLO hints that were not taken as they came.",
}
"""Every metric of the proxy and its help text."""

_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ProxyMetrics:
    """The metrics of one app. Instances appear by role and number, since `/metrics` must not show the topology."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests_total", "api", "route", "reason")
        self._responses = self._counter("responses_total", "status")
        self._in_progress = self._gauge("requests_in_progress")
        self._leg_seconds = self._histogram("leg_seconds", "leg")
        self._leg_failures = self._counter("leg_failures_total", "leg", "cause")
        self._releases = self._counter("releases_total", "result")
        self._up = self._gauge("instances_up", "role", "instance")
        self._outstanding = self._gauge("outstanding_tokens", "role", "instance")
        self._incompatible = self._gauge("incompatible_pairs")
        self._introductions = self._counter("introductions_total", "result")
        self._disconnects = self._counter("client_disconnects_total", "phase")
        self._dropped = self._counter("dropped_fields_total")
        self._hints = self._counter("slo_hints_total", "outcome")

    def request(self, api: str, route: str, reason: str) -> None:
        """One request has ended."""
        self._requests.labels(api, route, reason).inc()

    def response(self, status: int) -> None:
        """One answer has begun."""
        self._responses.labels(str(status)).inc()

    def in_progress(self, number: int) -> None:
        """How many requests are in progress now."""
        self._in_progress.set(number)

    def leg(self, leg: str, seconds: float) -> None:
        """One leg has answered."""
        self._leg_seconds.labels(leg).observe(seconds)

    def leg_failed(self, leg: str, cause: str) -> None:
        """One leg has failed."""
        self._leg_failures.labels(leg, cause).inc()

    def release(self, result: str) -> None:
        """One release has ended: released, not_held, or failed."""
        self._releases.labels(result).inc()

    def instance_up(self, role: str, index: int, up: bool) -> None:
        """Whether an instance may be given requests."""
        self._up.labels(role, str(index)).set(up)

    def outstanding(self, role: str, index: int, num_tokens: int) -> None:
        """What an instance has in hand."""
        self._outstanding.labels(role, str(index)).set(num_tokens)

    def incompatible_pairs(self, number: int) -> None:
        """How many pairs do not match."""
        self._incompatible.set(number)

    def introduction(self, result: str) -> None:
        """One introduction has ended: taken, refused, failed, or unsupported."""
        self._introductions.labels(result).inc()

    def disconnect(self, phase: str) -> None:
        """One client has left."""
        self._disconnects.labels(phase).inc()

    def dropped_fields(self, number: int) -> None:
        """Fields of one body that were not forwarded."""
        self._dropped.inc(number)

    def hint(self, outcome: str) -> None:
        """One SLO hint was clamped or ignored."""
        self._hints.labels(outcome).inc()

    def value(self, name: str, **labels: str) -> float:
        """One sample, 0 when it has never been touched. For tests and status pages."""
        return self._registry.get_sample_value(name, labels) or 0.0

    def exposition(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, short: str, *labels: str) -> Counter:
        name = f"vllm_disagg_proxy_{short}"
        return Counter(name, METRICS[name], labels, registry=self._registry)

    def _gauge(self, short: str, *labels: str) -> Gauge:
        name = f"vllm_disagg_proxy_{short}"
        return Gauge(name, METRICS[name], labels, registry=self._registry)

    def _histogram(self, short: str, *labels: str) -> Histogram:
        name = f"vllm_disagg_proxy_{short}"
        return Histogram(name, METRICS[name], labels, registry=self._registry, buckets=_BUCKETS_S)
