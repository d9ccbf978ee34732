"""The whole profiler against an engine whose steps are known, with a log of its steps and without one."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.contract.step_engine import StepEngine
from vllm_disagg.core.latency import LatencyModel, Regime, work_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.console import Console
from vllm_disagg.planner.fit import region_of
from vllm_disagg.profiler.drive import EngineTrouble
from vllm_disagg.profiler.run import run_profile
from vllm_disagg.profiler.settings import ProfileSettings
from vllm_disagg.profiles import load_profile

TRUTH = LatencyModel(
    prefill=(Regime(constant_s=0.006, per_token_s=4e-5, per_prefill_s=2e-4),),
    decode=(Regime(constant_s=0.006, per_decode_s=2e-4, per_context_s=4e-7),),
    mixed=(Regime(constant_s=0.008, per_token_s=5e-5, per_decode_s=2e-4, per_context_s=4e-7),),
)


def measure(engine: StepEngine, out: Path, *, budget_s: float = 8.0, **more: Any) -> tuple[list[str], str]:
    said = io.StringIO()
    settings = ProfileSettings(
        url=engine.url, shape="tiny", device="steps", device_memory_gib=1.0, step_tokens=512, max_seqs=32,
        out=str(out), budget_min=budget_s / 60, **more,
    )  # fmt: skip
    return run_profile(settings, Console(said)), said.getvalue()


def errors(out: Path) -> dict[str, float]:
    """Median difference from the truth by kind of step, over steps that were not measured."""
    rng, model = random.Random(3), load_profile(str(out)).entry(1).latency
    off: dict[str, list[float]] = {}
    for number in range(180):
        prompts = [(0, rng.randint(10, 160)) for _ in range(rng.randint(1, 3))]
        streams = [(rng.randint(20, 1000), 1) for _ in range(rng.randint(1, 20))]
        work = work_of((prompts, streams, prompts + streams)[number % 3])
        off.setdefault(region_of(work), []).append(abs(model.step_s(work) / TRUTH.step_s(work) - 1))
    return {region: sorted(values)[len(values) // 2] for region, values in off.items()}


def test_what_a_log_says_gives_the_truth_back(tmp_path: Path) -> None:
    log, out = tmp_path / "steps", tmp_path / "profile.json"
    with StepEngine(TRUTH, log=log) as engine:
        lines, _ = measure(engine, out, steps=str(log))
        assert engine.most_running >= 16

    found = errors(out)
    print(lines, found)
    assert max(found.values()) < 0.02
    told = json.loads(out.read_text())["entries"][0]
    assert told["kv_capacity_tokens"] == {"1": 8000}
    assert told["measurement"]["method"] == "steps" and told["measurement"]["between_steps_s"] >= 0
    assert not (tmp_path / "profile.json.partial").exists()


def test_without_a_log_steps_are_told_from_when_tokens_come(tmp_path: Path) -> None:
    """That they are timed well is another matter, and not for a machine that runs tests: see `tests/e2e`."""
    out = tmp_path / "profile.json"
    with StepEngine(TRUTH) as engine:
        lines, _ = measure(engine, out)

    print(lines, errors(out))
    told = json.loads(out.read_text())["entries"][0]["measurement"]
    assert told["method"] == "streams" and told["between_steps_s"] is None
    columns = told["points_columns"]
    works = [dict(zip(columns, point, strict=True)) for point in told["points"]]
    assert max(work["num_decodes"] for work in works) >= 16 and max(work["num_prefills"] for work in works) >= 4
    assert max(work["prefill_tokens"] + work["num_decodes"] for work in works) <= 512
    assert any(work["num_decodes"] and work["num_prefills"] for work in works)


def test_what_was_measured_before_the_engine_broke_is_not_lost(tmp_path: Path) -> None:
    log, out = tmp_path / "steps", tmp_path / "profile.json"
    with StepEngine(TRUTH, log=log, breaks_after=60) as engine, pytest.raises(EngineTrouble, match="answers 500"):
        measure(engine, out, steps=str(log))
    journal = tmp_path / "profile.json.partial"
    before = journal.read_text().count('"cell"')
    assert before > 2 and not out.exists()

    with StepEngine(TRUTH, log=log) as engine:
        lines, said = measure(engine, out, steps=str(log))
        with pytest.raises(ConfigError, match="is a profile with device 'steps'"):
            run_profile(
                ProfileSettings(
                    url=engine.url, shape="tiny", device="other", device_memory_gib=1.0, out=str(out), steps=str(log)
                ),
                Console(io.StringIO()),
            )

    assert f"going on from {journal}: {before} cells" in said
    assert lines[-1] == f"wrote {out}"


def test_an_engine_that_is_given_no_time_says_so_and_keeps_what_there_is(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    with StepEngine(TRUTH) as engine, pytest.raises(ConfigError, match=r"too few to fit .*--budget-min"):
        measure(engine, out, budget_s=1.0)

    assert (tmp_path / "profile.json.partial").exists() and not out.exists()
