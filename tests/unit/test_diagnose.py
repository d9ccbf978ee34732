"""What is said of a running engine: the rules, and the command against a server that counts as vLLM does."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client import Histogram as Counted

from vllm_disagg import cli
from vllm_disagg.diagnose_command import Scrape, parse, window_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.diagnose import Histogram, Window, diagnose

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, math.inf)
TOKENS = (100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, math.inf)


def histogram(*values: float, bounds: tuple[float, ...] = SECONDS) -> Histogram:
    counts = [sum(low < value <= high for value in values) for low, high in zip((0.0, *bounds), bounds, strict=False)]
    return Histogram(bounds=bounds, counts=tuple(map(float, counts)), total=sum(values))


def window(**changes: Any) -> Window:
    """A quiet engine."""
    histograms = {
        "time_to_first_token_seconds": histogram(*[0.1] * 100),
        "request_queue_time_seconds": histogram(*[0.005] * 100),
        "inter_token_latency_seconds": histogram(*[0.03] * 1000),
        "request_prompt_tokens": histogram(*[400.0] * 100, bounds=TOKENS),
        "request_generation_tokens": histogram(*[150.0] * 100, bounds=TOKENS),
    } | changes.pop("histograms", {})
    values: dict[str, Any] = {
        "seconds": 60.0, "histograms": histograms, "running": [8.0] * 20, "waiting": [0.0] * 20,
        "kv_usage": [0.4] * 20, "counters": {"prefix_cache_queries": 40_000.0, "prefix_cache_hits": 20_000.0},
    }  # fmt: skip
    return Window(**values | changes)


def names(observed: Window) -> list[str]:
    return [finding.name for finding in diagnose(observed)]


def test_nothing_is_made_up_about_a_quiet_engine() -> None:
    assert names(window()) == ["quiet"]
    assert names(Window(seconds=10.0)) == ["too_few"]


def test_waiting_for_the_first_step_is_prefills_queue() -> None:
    late = {"request_queue_time_seconds": histogram(*[0.06] * 100)}
    (finding,) = diagnose(window(histograms=late))

    assert (finding.name, finding.phase) == ("prefill_queue", "prefill")
    assert "60% of a mean TTFT of 100 ms" in finding.said and "400 tokens" in finding.said


def test_streams_that_stutter_beside_long_prompts() -> None:
    stutter = {"inter_token_latency_seconds": histogram(*[0.03] * 960, *[0.4] * 40)}

    assert names(window(histograms=stutter)) == ["interference"]
    short = stutter | {"request_prompt_tokens": histogram(*[60.0] * 100, bounds=TOKENS)}
    assert names(window(histograms=short)) == ["quiet"]


def test_a_full_kv_cache_that_leaves_the_device_idle() -> None:
    (finding,) = diagnose(window(kv_usage=[0.97] * 20, waiting=[3.0] * 20))

    assert finding.name == "kv_full" and "97% full with 8 requests running" in finding.said
    assert "compute idle" in finding.said
    assert names(window(kv_usage=[0.97] * 20)) == ["quiet"]
    assert names(window(counters={"num_preemptions": 4.0})) == ["kv_full"]


def test_long_prompts_that_are_never_reused() -> None:
    turns = {
        "request_prompt_tokens": histogram(*[3000.0] * 100, bounds=TOKENS),
    }
    cold = {"prefix_cache_queries": 300_000.0, "prefix_cache_hits": 900.0}

    assert names(window(histograms=turns, counters=cold)) == ["prefix_reuse"]


def test_more_load_than_leaves_comes_first() -> None:
    growing = [float(step) for step in range(20)]

    assert names(window(waiting=growing)) == ["overload"]


def test_quantiles_are_prometheus_own() -> None:
    some = Histogram(bounds=(1.0, 2.0, math.inf), counts=(10.0, 10.0, 0.0), total=25.0)

    assert some.quantile(0.5) == 1.0 and some.quantile(0.75) == 1.5
    assert Histogram(bounds=(1.0, math.inf), counts=(0.0, 5.0)).quantile(0.9) == 1.0
    assert math.isnan(Histogram().quantile(0.5))


class Engine:
    """Counts as vLLM does, and serves it."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        label = ["model_name", "engine"]
        self.ttft = Counted("vllm:time_to_first_token_seconds", "", label, registry=registry, buckets=SECONDS)
        self.queue = Counted("vllm:request_queue_time_seconds", "", label, registry=registry, buckets=SECONDS)
        self.running = Gauge("vllm:num_requests_running", "", label, registry=registry)
        self.preempted = Counter("vllm:num_preemptions", "", label, registry=registry)
        self.registry = registry
        for number in ("0", "1"):  # two engine cores behind one server
            self.running.labels("model", number).set(2)
            self.preempted.labels("model", number)

    def serve_requests(self, num: int) -> None:
        for number in ("0", "1"):
            for _ in range(num):
                self.ttft.labels("model", number).observe(0.15)
                self.queue.labels("model", number).observe(0.09)

    def text(self) -> str:
        return str(generate_latest(self.registry).decode())


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(engine.text().encode())
            engine.serve_requests(30)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_command_counts_only_what_happened_while_it_watched() -> None:
    engine = Engine()
    engine.serve_requests(1000)
    with served(engine) as url:
        done = CliRunner().invoke(cli.cli, ("diagnose", url, "--window-s", "0.2", "--interval-s", "0.1"))

    assert done.exit_code == 0
    assert "prefill_queue (prefill): 60% of a mean TTFT of 150 ms" in done.output


def test_engine_cores_are_added_up_and_a_restart_counts_from_zero() -> None:
    engine = Engine()
    engine.serve_requests(3)
    first = parse(engine.text(), "here")
    engine.serve_requests(4)
    last = parse(engine.text(), "here")

    assert window_of([first, last], 1.0).of("time_to_first_token_seconds").num == 8
    assert window_of([Scrape(counters={"num_preemptions": 5.0}), first], 1.0).of("request_queue_time_seconds").num == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "at least one running vLLM"),
        (("ftp://host",), "expected an http"),
        (("http://127.0.0.1:9",), "cannot be read"),
        (("http://127.0.0.1:9", "--window-s", "0"), "must be positive"),
    ],
)
def test_what_cannot_be_watched(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(cli.cli, ("diagnose", *arguments), catch_exceptions=False)


def test_what_is_not_vllm_is_said_to_be_so() -> None:
    with pytest.raises(ConfigError, match="none of vLLM's metrics"):
        parse("# TYPE other gauge\nother 1\n", "here")
    with pytest.raises(ConfigError, match="not Prometheus metrics"):
        parse("<html>{}", "here")
