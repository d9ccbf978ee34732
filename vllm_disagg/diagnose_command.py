"""`vllm-disagg diagnose`: scrape running engines for a while, ask `planner.diagnose`, print."""

from __future__ import annotations

import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from vllm_disagg.errors import ConfigError
from vllm_disagg.plan_settings import DiagnoseSettings
from vllm_disagg.planner.diagnose import Histogram, Window, diagnose

_TIMEOUT_S = 5.0
_MOST_BYTES = 16 * 2**20
_PREFIX = "vllm:"
_GAUGES = {"num_requests_running": "running", "num_requests_waiting": "waiting", "kv_cache_usage_perc": "kv_usage"}


@dataclass(slots=True)
class Scrape:
    """One look at an engine, summed over its engine cores.

    Args:
        counters, gauges: by name without `vllm:`.
        buckets: histogram to upper bound to the cumulative count.
        sums: histogram to its sum.
    """

    counters: dict[str, float] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, dict[float, float]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)


def run_diagnose(settings: DiagnoseSettings, say: Callable[[str], None]) -> None:
    """Watch the engines and print what presses each.

    Raises:
        ConfigError: a setting is out of range, or an engine cannot be read; the text names it.
    """
    if not settings.urls:
        raise ConfigError("give the URL of at least one running vLLM, such as http://127.0.0.1:8000")
    if not (math.isfinite(settings.window_s) and settings.window_s > 0 and settings.interval_s > 0):
        raise ConfigError(
            f"--window-s and --interval-s must be positive, not {settings.window_s!r} and {settings.interval_s!r}"
        )
    say(f"watching {len(settings.urls)} engine(s) for {settings.window_s:g} s ...")
    for url, window in watch(settings.urls, window_s=settings.window_s, interval_s=settings.interval_s).items():
        say("")
        say(url)
        for finding in diagnose(window):
            say(f"- {finding.name} ({finding.phase}): {finding.said}")
            say(f"  look at: {finding.look_at}")
            if finding.splitting:
                say(f"  splitting the phases {finding.splitting}")


def watch(urls: tuple[str, ...], *, window_s: float, interval_s: float) -> dict[str, Window]:
    """Scrape all engines now, every interval, and at the window's end."""
    begin_s = time.monotonic()
    seen: dict[str, list[Scrape]] = {url: [scrape(url)] for url in urls}
    while (left_s := begin_s + window_s - time.monotonic()) > 0:
        time.sleep(min(interval_s, left_s))
        for url in urls:
            seen[url].append(scrape(url))
    seconds = time.monotonic() - begin_s
    return {url: window_of(scrapes, seconds) for url, scrapes in seen.items()}


def scrape(url: str) -> Scrape:
    """One look.

    Raises:
        ConfigError: there is no answer within 5 s, or not vLLM's metrics.
    """
    address = url.rstrip("/") + "/metrics"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"{url}: expected an http or https URL")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - checked above
            text = answer.read(_MOST_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ConfigError(f"{address} cannot be read: {error}") from error
    return parse(text, address)


def parse(text: str, address: str) -> Scrape:
    """Read Prometheus' text format.

    Raises:
        ConfigError: it is malformed, or without vLLM's metrics.
    """
    found = Scrape()
    try:
        for family in text_string_to_metric_families(text):
            if not family.name.startswith(_PREFIX):
                continue
            name = family.name.removeprefix(_PREFIX)
            for sample in family.samples:
                if family.type == "histogram":
                    _histogram(found, name, sample.name, sample.labels, sample.value)
                elif family.type == "counter" and not sample.name.endswith("_created"):
                    found.counters[name] = found.counters.get(name, 0.0) + sample.value
                elif family.type == "gauge" and name in _GAUGES:
                    found.gauges[name] = found.gauges.get(name, 0.0) + sample.value
    except ValueError as error:
        raise ConfigError(f"{address}: these are not Prometheus metrics: {error}") from error
    if "num_requests_running" not in found.gauges:
        raise ConfigError(
            f"{address} has none of vLLM's metrics: is it a vLLM API server, without --disable-log-stats?"
        )
    return found


def _histogram(found: Scrape, name: str, sample: str, labels: dict[str, str], value: float) -> None:
    if sample.endswith("_bucket"):
        buckets = found.buckets.setdefault(name, {})
        bound = float(labels["le"])
        buckets[bound] = buckets.get(bound, 0.0) + value
    elif sample.endswith("_sum"):
        found.sums[name] = found.sums.get(name, 0.0) + value


def window_of(scrapes: list[Scrape], seconds: float) -> Window:
    """What happened between the first and the last look. An engine that was restarted between counts from 0."""
    first, last = scrapes[0], scrapes[-1]
    restarted = any(value < first.counters.get(name, 0.0) for name, value in last.counters.items())
    if restarted:
        first = Scrape()
    histograms = {}
    for name, buckets in last.buckets.items():
        before = first.buckets.get(name, {})
        bounds = tuple(sorted(buckets))
        cumulative = [buckets[bound] - before.get(bound, 0.0) for bound in bounds]
        counts = tuple(b - a for a, b in zip([0.0, *cumulative[:-1]], cumulative, strict=True))
        histograms[name] = Histogram(
            bounds=bounds, counts=counts, total=last.sums.get(name, 0.0) - first.sums.get(name, 0.0)
        )
    return Window(
        seconds=seconds,
        histograms=histograms,
        counters={name: value - first.counters.get(name, 0.0) for name, value in last.counters.items()},
        **{short: [one.gauges.get(name, 0.0) for one in scrapes] for name, short in _GAUGES.items()},
    )
