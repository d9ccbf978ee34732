"""What both engines tell of their transfers, as vLLM's own statistics carry it to `/metrics`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry

from tests.vllm.in_process import BLOCK_SIZE, NUM_BLOCKS, Engine, Pair, prompt
from tests.vllm.test_seam_code import make_metrics

pytestmark = pytest.mark.vllm


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    engines = Pair(tmp_path)
    yield engines
    engines.close()


def published(engine: Engine) -> CollectorRegistry:
    """What Prometheus would scrape, after the way through vLLM's serialisation."""
    metrics, registry = make_metrics()
    metrics.observe(json.loads(json.dumps(engine.take_stats())))
    return registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> Any:
    return registry.get_sample_value(f"vllm_disagg_kv_{name}", {"engine": "0", **labels})


def test_transfers_are_told_by_pair(pair: Pair) -> None:
    for seed in (1, 2):
        pair.decode_rightly(prompt(5 * BLOCK_SIZE, seed=seed), pair.prefilled(prompt(5 * BLOCK_SIZE, seed=seed)))

    told = published(pair.decode)

    labels = [
        sample.labels["prefill"]
        for family in told.collect()
        for sample in family.samples
        if sample.name == "vllm_disagg_kv_pair_bytes_total"
    ]
    assert len(labels) == 1 and labels[0].startswith("127.0.0.1:")
    assert value(told, "pair_transfers_total", prefill=labels[0]) == 2
    assert value(told, "pair_bytes_total", prefill=labels[0]) == value(told, "transfer_bytes_sum") > 0
    assert value(told, "pair_descriptors_total", prefill=labels[0]) == value(told, "transfer_descriptors_sum") > 0
    assert value(told, "pair_read_seconds_total", prefill=labels[0]) == value(told, "read_seconds_sum") > 0
    assert value(told, "read_bytes_per_second_count") == 2
    assert value(told, "late_reads_total") == 0


def test_failures_tell_how_many_tokens_they_cost(pair: Pair) -> None:
    params = pair.prefilled(prompt(70))
    pair.decode.run_until_finished(pair.decode.add(prompt(70), {**params, "handoff": "spoilt"}, max_tokens=2))

    told = published(pair.decode)

    assert value(told, "failures_total", cause="invalid_handoff") == 1
    assert value(told, "recomputed_tokens_total", cause="invalid_handoff") == 70


def test_held_blocks_and_their_age_are_told(pair: Pair) -> None:
    pair.prefilled(prompt(3 * BLOCK_SIZE))

    told = published(pair.prefill)

    assert value(told, "held_requests") == 1
    assert value(told, "held_blocks") == 3
    assert value(told, "held_share") == 3 / (NUM_BLOCKS - 1)
    assert value(told, "oldest_hold_seconds") > 0
    assert value(told, "holds_total", event="granted") == 1


def test_refused_peers_are_told_by_factor(pair: Pair) -> None:
    for engine in (pair.prefill, pair.decode):
        control = engine.scheduler.connector._control
        control.tally.add("vllm_disagg_kv_refused_peers_total", "dtype")

        assert value(published(engine), "refused_peers_total", factor="dtype") == 1
