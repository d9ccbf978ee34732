"""The drawn timeline of a run."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from tests.unit.sim_cases import engine, fixed
from vllm_disagg.core.link import Link
from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.run import simulate
from vllm_disagg.sim.system import System
from vllm_disagg.sim.timeline import chrome_trace, parse_window

SPLIT = System(prefill=(engine(),), decode=(engine(pp=2),), link=Link(bytes_per_s=2e4), kv_bytes_per_token=10)
WORKLOAD = fixed(60, 5, num=30, rate=8.0)


def test_every_step_and_transfer_is_drawn_and_no_two_overlap_in_a_row() -> None:
    outcome = simulate(SPLIT, WORKLOAD, log=True, backend="reference")
    trace = chrome_trace(SPLIT, outcome, window_s=(0.0, 1e9))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]

    assert sum(event["name"].startswith("request ") for event in spans) == 30
    assert sum("prompt tokens" in event["name"] or "decoding" in event["name"] for event in spans) == outcome.num_steps
    rows = defaultdict(list)
    for event in spans:
        rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for row in rows.values():
        assert all(earlier[1] <= later[0] + 0.1 for earlier, later in pairwise(sorted(row)))
    assert {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"} == {
        "prefill 0", "decode 0", "requests, to their first decoded token",
    }  # fmt: skip
    json.dumps(trace, allow_nan=False)


def test_a_requests_phases_end_with_its_first_token() -> None:
    outcome = simulate(SPLIT, WORKLOAD, log=True, backend="reference")
    trace = chrome_trace(SPLIT, outcome, window_s=(0.0, 1e9))
    ends = [e["ts"] + e["dur"] for e in trace["traceEvents"] if e["ph"] == "X" and e["args"].get("request") == 7]

    assert max(ends) == pytest.approx(outcome.first_token_s[7] * 1e6)


def test_a_window_leaves_out_the_rest() -> None:
    outcome = simulate(SPLIT, WORKLOAD, log=True, backend="reference")
    trace = chrome_trace(SPLIT, outcome, window_s=(1.0, 1.5))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]

    assert spans and all(event["ts"] <= 1.5e6 for event in spans if event["pid"] < 10)


def test_what_cannot_be_drawn() -> None:
    outcome = simulate(SPLIT, WORKLOAD, backend="reference")

    with pytest.raises(ConfigError, match="needs the run's log"):
        chrome_trace(SPLIT, outcome, window_s=(0.0, 1.0))
    with pytest.raises(ConfigError, match="ends after it begins"):
        chrome_trace(SPLIT, outcome, window_s=(2.0, 1.0))
    with pytest.raises(ConfigError, match="FROM,TO"):
        parse_window("5")
