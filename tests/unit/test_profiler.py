"""The profiler's decisions: what is measured, what the steps were, what is kept, and what is written."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_disagg.core.latency import LatencyModel, Regime, work_of
from vllm_disagg.core.probe import PairReport, ReadTiming, SourceReport, WorkerReport
from vllm_disagg.core.profile import ModelShape, parse_profile, profile_document
from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.fit import Fit, judge_profile, region_of
from vllm_disagg.profiler.cells import (
    LONGEST_GROWTH,
    Cell,
    Limits,
    Pace,
    Prompts,
    Streams,
    cell_seconds,
    make_cells,
    pace_cell,
)
from vllm_disagg.profiler.document import entries_beside, fit_steps, profile_of, report, write_profile
from vllm_disagg.profiler.drive import Batch, Seen, Stream, Window
from vllm_disagg.profiler.engine import StepTail, shape_of_folder, tensor_parallel_of
from vllm_disagg.profiler.facts import EngineFacts, read_facts, write_facts
from vllm_disagg.profiler.journal import Entry, Journal
from vllm_disagg.profiler.machine import Drift, at_mean_pace
from vllm_disagg.profiler.points import measured, spreads
from vllm_disagg.profiler.run import _in_turn
from vllm_disagg.profiler.seen import steps_seen
from vllm_disagg.profiler.settings import ProfileSettings
from vllm_disagg.profiler.transfer import transfer_of

TRUTH = LatencyModel(
    prefill=(Regime(constant_s=0.02, per_token_s=0.002, per_area_s=1e-6, per_prefill_s=0.001),),
    decode=(
        Regime(up_to=4, constant_s=0.04, per_decode_s=0.003, per_context_s=2e-6),
        Regime(constant_s=0.02, per_decode_s=0.008, per_context_s=2e-6),
    ),
    mixed=(Regime(constant_s=0.05, per_token_s=0.002, per_decode_s=0.004, per_context_s=2e-6),),
)
SHAPE = ModelShape(
    name="model", num_layers=2, num_heads=4, num_kv_heads=4, head_size=8, hidden_size=32, weight_bytes=1000,
    kv_bytes_per_token=512, max_model_len=4096,
)  # fmt: skip
FACTS = EngineFacts(
    model=SHAPE, device="a core", device_memory_bytes=2**30, tp=1, kv_capacity_tokens=20_000, block_size=16,
    step_tokens=2048, max_seqs=64, versions={"vllm": "1"},
)  # fmt: skip
LIMITS = Limits(step_tokens=2048, max_seqs=64, max_model_len=4096, kv_tokens=20_000)
PACE = Pace(token_s=0.002, step_s=0.04)


# What is measured.


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        replace(LIMITS, fills_kv=True),
        replace(LIMITS, sees_steps=False),
        Limits(step_tokens=256, max_seqs=4, max_model_len=512, kv_tokens=1024),
        Limits(step_tokens=64, max_seqs=1, max_model_len=400, kv_tokens=500),
        Limits(step_tokens=8192, max_seqs=1024, max_model_len=131_072, kv_tokens=400_000, fills_kv=True),
    ],
)
@pytest.mark.parametrize("pace", [PACE, Pace(token_s=1e-5, step_s=0.01), Pace(token_s=0.05, step_s=1.0)])
def test_no_cell_is_more_than_the_engine_can_hold(limits: Limits, pace: Pace) -> None:
    cells = make_cells(limits, pace, budget_s=240)

    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        if isinstance(cell, Prompts):
            assert sum(cell.lengths) <= limits.step_tokens or (len(cell.lengths) == 1 and limits.sees_steps)
            assert max(cell.lengths) < limits.max_model_len and len(cell.lengths) <= limits.max_seqs
        else:
            assert max(cell.contexts) + LONGEST_GROWTH <= limits.max_model_len
            assert len(cell.contexts) == 1 or sum(cell.contexts) <= limits.kv_tokens
            assert [rung.num_streams for rung in cell.rungs] == sorted(
                {rung.num_streams for rung in cell.rungs}, reverse=True
            )
            assert cell.rungs[0].num_streams == len(cell.contexts) and cell.rungs[-1].num_streams == 1
            for rung in cell.rungs:
                for lengths in rung.prompts:
                    assert rung.num_streams + len(lengths) <= limits.max_seqs
                    assert rung.num_streams + sum(lengths) <= limits.step_tokens


def test_all_kinds_of_work_are_covered() -> None:
    cells = make_cells(LIMITS, PACE, budget_s=240)
    prompts = [cell.lengths for cell in cells if isinstance(cell, Prompts)]
    streams = [cell for cell in cells if isinstance(cell, Streams)]

    assert min(map(sum, prompts)) == 16 and max(map(sum, prompts)) == 2048
    assert {1, 2, 4, 8} <= {len(lengths) for lengths in prompts}
    assert sum(len(set(lengths)) > 1 for lengths in prompts) >= 10  # of mixed lengths
    assert {len(cell.contexts) for cell in streams} >= {64}
    assert max(max(cell.contexts) for cell in streams) > 2000
    assert any(len(set(cell.contexts)) > 8 for cell in streams)
    assert any(len(lengths) > 1 for cell in streams for rung in cell.rungs for lengths in rung.prompts)


def test_a_slow_engine_is_asked_for_less() -> None:
    def effort(pace: Pace) -> int:
        return sum(sum(cell.lengths) for cell in make_cells(LIMITS, pace, budget_s=240) if isinstance(cell, Prompts))

    assert effort(Pace(token_s=0.05, step_s=1.0)) < effort(PACE) / 2


@pytest.mark.parametrize("pace", [PACE, Pace(token_s=1e-4, step_s=0.02)])
def test_measuring_all_once_fits_the_budget(pace: Pace) -> None:
    cells = make_cells(LIMITS, pace, budget_s=240)

    assert sum(cell_seconds(cell, pace, fills_kv=False) for cell in cells) < 1.5 * 240


def test_filled_contexts_cost_nothing() -> None:
    [*_, cell] = [cell for cell in make_cells(LIMITS, PACE, budget_s=240) if isinstance(cell, Streams)]

    assert cell_seconds(cell, PACE, fills_kv=True) < cell_seconds(cell, PACE, fills_kv=False) - 1


# Steps that a client can tell.


class Clock:
    """An engine that hands out tokens on time, and a client that gets them a little later."""

    def __init__(self, *, late_s: float = 0.004) -> None:
        self.now_s, self.late_s, self.rng = 0.0, late_s, random.Random(1)

    def step(self, requests: Sequence[tuple[Stream, int, int]]) -> float:
        """`(stream, computed, new)`; returns how long it took."""
        step_s = TRUTH.step_s(work_of((computed, new) for _, computed, new in requests))
        self.now_s += step_s
        for stream, _, _ in requests:
            stream.arrivals.append((self.now_s + self.late_s + self.rng.uniform(0, 0.0005), 1))
        return step_s


def test_a_batch_behind_another_prompt_is_timed_from_its_token() -> None:
    clock, blocker, batch = Clock(), Stream(100), tuple(Stream(length) for length in (300, 50, 7))
    clock.step([(blocker, 0, 100)])
    took_s = clock.step([(stream, 0, stream.num_prompt_tokens) for stream in batch])

    [step] = steps_seen(Seen(batches=[Batch(blocker.arrivals[0][0], batch)]))

    assert step.requests == ((0, 300), (0, 50), (0, 7))
    assert step.step_s == pytest.approx(took_s, abs=0.001)


def test_a_batch_that_took_two_steps_is_left_out() -> None:
    clock, blocker, batch = Clock(), Stream(100), (Stream(300), Stream(50))
    clock.step([(blocker, 0, 100)])
    for stream in batch:
        clock.step([(stream, 0, stream.num_prompt_tokens)])

    assert steps_seen(Seen(batches=[Batch(blocker.arrivals[0][0], batch)])) == []


def test_steps_of_streams_are_told_with_their_contexts_and_the_prompts_beside_them() -> None:
    clock, streams, prompts = Clock(), [Stream(40), Stream(700)], [Stream(64), Stream(20)]
    took, begin_s = [], 0.0
    for number in range(12):
        parts = [(stream, stream.num_prompt_tokens + number - 1, 1) for stream in streams]
        if number == 0:
            parts = [(stream, 0, stream.num_prompt_tokens) for stream in streams]
        elif number == 7:
            parts += [(prompt, 0, prompt.num_prompt_tokens) for prompt in prompts]
        took.append(clock.step(parts))
        if number == 2:
            begin_s = clock.now_s + 0.01
    window = Window(begin_s, clock.now_s + 1, tuple(streams), tuple(prompts))

    steps = steps_seen(Seen(windows=[window]))

    assert len(steps) == 8  # of 9 moments in the window
    assert [step.step_s for step in steps] == pytest.approx(took[4:], abs=0.002)
    assert sorted(steps[0].requests) == [(43, 1), (703, 1)]
    assert sorted(steps[3].requests) == [(0, 20), (0, 64), (46, 1), (706, 1)]


def test_tokens_that_come_together_tell_nothing() -> None:
    streams = (Stream(10), Stream(10))
    for stream in streams:
        stream.arrivals += [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 2), (5.0, 1), (6.0, 1)]

    steps = steps_seen(Seen(windows=[Window(0.5, 9.0, streams, ())]))

    assert [step.at_s for step in steps] == [1.0, 2.0, 5.0]


def test_a_stream_that_misses_a_step_makes_it_unclear() -> None:
    one, other = Stream(10), Stream(10)
    one.arrivals += [(float(number), 1) for number in range(1, 6)]
    other.arrivals += [(float(number), 1) for number in (1, 2, 4, 5)]

    steps = steps_seen(Seen(windows=[Window(0.5, 9.0, (one, other), ())]))

    assert [step.at_s for step in steps] == [1.0, 4.0]


# Points.


def run(*requests: tuple[int, int], step_s: float = 0.1, at_s: float = 0.0) -> RecordedStep:
    return RecordedStep(at_s=at_s, step_s=step_s, requests=requests)


def test_equal_steps_are_one_point_at_their_median() -> None:
    steps = {
        "a": [[run((0, 64), step_s=0.2), run((0, 64), step_s=9.0)], [run((0, 64), step_s=0.22)]],
        "b": [[run((0, 64), step_s=0.21), run((10, 1), step_s=0.05), run((11, 1), step_s=0.06), run((12, 1))]],
        "c": [[run((10, 1), step_s=0.05)], []],
    }

    points = measured(steps)

    assert [(item.num_steps, item.point.seconds) for item in points] == [
        (4, pytest.approx(0.215)), (3, 0.06), (1, 0.05),
    ]  # fmt: skip
    assert points[1].point.work.decode_context == 12
    assert len({item.point.group for item in points}) == 3
    assert set(spreads(points)) == {"prefill", "decode"}


def test_empty_steps_and_times_that_cannot_be_are_left_out() -> None:
    assert measured({"a": [[run(), run((0, 5), step_s=0.0)]]}) == []


# The journal.


def entry(cell: str = "prompts 16", turn: int = 0) -> Entry:
    return Entry(cell=cell, turn=turn, seconds=1.5, steps=(run((0, 16), (20, 1)), run((36, 1), at_s=2.0)))


def test_what_was_measured_is_there_after_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "profile.json.partial"
    with Journal(path, {"model": "m", "shape": (1, 2)}) as journal:
        journal.know({"token_s": 0.5})
        journal.add(entry())
        journal.add(entry("streams 5", 1))
    path.write_bytes(path.read_bytes() + b'{"cell": "torn')

    with Journal(path, {"model": "m", "shape": (1, 2)}) as again:
        assert again.entries == [entry(), entry("streams 5", 1)]
        assert again.spent_s == 3.0 and again.known == {"token_s": 0.5}
        again.add(entry("third"))

    assert [item.cell for item in Journal(path, {"model": "m", "shape": (1, 2)}).entries] == [
        "prompts 16", "streams 5", "third",
    ]  # fmt: skip


def test_a_journal_of_another_engine_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.partial"
    with Journal(path, {"model": "m", "device": "H200"}):
        pass

    with pytest.raises(ConfigError, match=r'p.partial was begun with device "H200", now it is "H100": start it as'):
        Journal(path, {"model": "m", "device": "H100"})
    with pytest.raises(ConfigError, match="was begun with device"):
        Journal(path, {"model": "m"})


@pytest.mark.parametrize(
    "text",
    [
        "no journal", "{}\n", "[]\n", "no json\n",
        '{"format":"vllm-disagg-profile-journal","version":2,"subject":{}}\n',
        '{"format":"vllm-disagg-profile-journal","version":1,"subject":{}}\n{"cell":"a"}\n',
        '{"format":"vllm-disagg-profile-journal","version":1,"subject":{}}\n{"known":3}\n',
        '{"format":"vllm-disagg-profile-journal","version":1,"subject":{}}\n'
        '{"cell":"a","turn":0,"seconds":1,"steps":[[1,2]]}\n',
    ],
)  # fmt: skip
def test_what_is_no_journal_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.partial"
    path.write_text(text)

    with pytest.raises(ConfigError, match="journal"):
        Journal(path, {})
    assert path.read_text() == text


# What an engine says.


def test_facts_travel_beside_the_log(tmp_path: Path) -> None:
    assert read_facts(tmp_path / "steps") is None
    write_facts(FACTS, tmp_path / "steps")

    assert read_facts(tmp_path / "steps") == FACTS
    (tmp_path / "steps.engine.json").write_text('{"model": 1}')
    with pytest.raises(ConfigError, match="does not say what the engine is"):
        read_facts(tmp_path / "steps")


def test_a_log_is_read_from_where_it_was(tmp_path: Path) -> None:
    log = tmp_path / "steps"
    log.write_text(run((0, 1)).line())
    tail = StepTail(log)
    with log.open("a") as file:
        file.write(run((0, 2)).line() + run((0, 3)).line()[:10])
        file.flush()
        assert tail.new() == [run((0, 2))]
        file.write(run((0, 3)).line()[10:])
    assert tail.new() == [run((0, 3))]
    assert tail.new() == []


def test_a_shape_from_a_models_own_configuration(tmp_path: Path) -> None:
    config = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "num_hidden_layers": 30}
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "max_position_embeddings": 8192}))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 77)

    shape = shape_of_folder(tmp_path, cache_dtype="auto")

    assert (shape.head_size, shape.kv_bytes_per_token, shape.weight_bytes) == (64, 2 * 30 * 3 * 64 * 2, 77)
    assert shape_of_folder(tmp_path, cache_dtype="fp8").kv_bytes_per_token == 30 * 2 * 3 * 64
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--shape"):
        shape_of_folder(tmp_path, cache_dtype="auto")


@pytest.mark.parametrize(
    ("arguments", "degree"),
    [((), 1), (("-tp", "2"), 2), (("--tensor-parallel-size=4",), 4), (("--tensor_parallel_size", "8"), 8)],
)
def test_the_degree_among_an_engines_flags(arguments: tuple[str, ...], degree: int) -> None:
    assert tensor_parallel_of(("model", *arguments)) == degree


# Settings.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "name a model to measure"),
        ({"engine": ("--max-model-len", "64")}, "name a model to measure"),
        ({"engine": ("m",), "url": "http://h:1"}, "leave the model"),
        ({"url": "h:1"}, "--url must be a URL"),
        ({"engine": ("m",), "steps": "file"}, "--steps needs --url"),
        ({"engine": ("m",), "device": "H200"}, "--device needs --url"),
        ({"engine": ("m",), "budget_min": 0.0}, "--budget-min must be positive, not 0.0"),
        ({"engine": ("m",), "budget_min": float("nan")}, "--budget-min must be positive, not nan"),
        ({"engine": ("m",), "cores": 0}, "--cores must be at least 1, not 0"),
        ({"engine": ("m", "--port=80")}, "--port cannot be given to `profile`: a free one"),
        ({"engine": ("m", "--kv_role", "prefill")}, "--kv-role cannot be given"),
        ({"engine": ("m", "-pp", "2")}, "-pp cannot be given"),
        ({"engine": ("m",), "prefill": "http://h:1"}, "give both or neither"),
        ({"url": "http://h:1", "device_memory_gib": -1.0}, "--device-memory-gib must be positive"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        ProfileSettings(**given)

    assert said in str(error.value)


# The document.


def synthetic(*, noise: float = 0.02, fills_kv: bool = False) -> dict[str, list[list[RecordedStep]]]:
    """The steps that an engine with `TRUTH` would take for every cell."""
    rng, found = random.Random(7), {}
    for cell in make_cells(LIMITS, PACE, budget_s=240):
        found[cell.name] = [[_step(requests, rng, noise) for requests in _works(cell, rng)] for _ in range(2)]
    return found


def _works(cell: Cell, rng: random.Random) -> list[list[tuple[int, int]]]:
    if isinstance(cell, Prompts):
        if sum(cell.lengths) > LIMITS.step_tokens:
            return [[(at, 2048)] for at in range(0, cell.lengths[0], 2048)]
        return [[(0, length) for length in cell.lengths]] * cell.repeats
    works = []
    for rung in cell.rungs:
        streams = [(context + rng.randint(1, 9), 1) for context in cell.contexts[: rung.num_streams]]
        works += [streams] * 5 + [[*streams, *((0, length) for length in lengths)] for lengths in rung.prompts]
    return works


def _step(requests: list[tuple[int, int]], rng: random.Random, noise: float) -> RecordedStep:
    step_s = TRUTH.step_s(work_of(requests)) * rng.lognormvariate(0, noise)
    if rng.random() < 0.02:
        step_s *= rng.uniform(2, 6)  # something else ran
    return run(*requests, step_s=step_s)


def test_the_cells_suffice_to_find_the_truth() -> None:
    result = fit_steps(FACTS, synthetic(), seconds=200.0, from_log=True)
    rng = random.Random(3)
    fresh = [[(0, rng.randint(16, 600)) for _ in range(rng.randint(1, 3))] for _ in range(100)]
    fresh += [[(rng.randint(20, 3000), 1) for _ in range(rng.randint(1, 60))] for _ in range(100)]
    fresh += [
        [(rng.randint(20, 3000), 1) for _ in range(rng.randint(1, 40))] + [(0, rng.randint(16, 600))]
        for _ in range(100)
    ]

    off = [abs(result.fit.latency.step_s(work_of(work)) / TRUTH.step_s(work_of(work)) - 1) for work in fresh]

    assert sorted(off)[150] < 0.02 and sorted(off)[285] < 0.06
    assert all(error.median < 0.03 for error in result.fit.errors.values())
    assert result.fit.mixed_lengths is not None and result.fit.mixed_lengths.num_points >= 10


# A machine that becomes slower and faster meanwhile.


def timeline(
    pace: Callable[[float], float],
    *,
    noise: float = 0.02,
    truth: Callable[[list[tuple[int, int]]], float] | None = None,
) -> dict[str, list[list[RecordedStep]]]:
    """The same cells, one after the other on one clock, with looks at the pace between them."""
    rng, found, at_s, since_s = random.Random(7), defaultdict[str, list[list[RecordedStep]]](list), 0.0, 10.0
    took_s = truth or (lambda requests: TRUTH.step_s(work_of(requests)))

    def measure(name: str, cell: Cell) -> None:
        nonlocal at_s, since_s
        steps, begin_s = [], at_s
        for requests in _works(cell, rng):
            step_s = took_s(requests) * pace(at_s) * rng.lognormvariate(0, noise)
            steps.append(run(*requests, step_s=step_s, at_s=at_s))
            at_s += step_s + 0.003
        found[name].append(steps)
        since_s += at_s - begin_s

    for turn in range(2):
        for cell in _in_turn(make_cells(LIMITS, PACE, budget_s=240), turn):
            if since_s > 6:
                measure("pace", pace_cell(LIMITS))
                since_s = 0.0
            measure(cell.name, cell)
    return found


def swell(at_s: float) -> float:
    """Up and down by a quarter, and for a while by more."""
    return (1 + 0.25 * math.sin(at_s / 25)) * (1.4 if 60 < at_s < 90 else 1.0)


def off_from_the_truth(fit: Fit) -> float:
    """At the median, over steps that were not measured, but for a factor that all have in common."""
    rng = random.Random(3)
    works = [[(rng.randint(20, 3000), 1) for _ in range(rng.randint(1, 60))] for _ in range(100)]
    works += [[(0, rng.randint(16, 600)) for _ in range(rng.randint(1, 3))] for _ in range(100)]
    ratios = [fit.latency.step_s(work_of(work)) / TRUTH.step_s(work_of(work)) for work in works]
    return statistics.median(abs(ratio / statistics.median(ratios) - 1) for ratio in ratios)


def test_a_drifting_pace_is_not_taken_for_a_cost_of_what_was_measured_then() -> None:
    result = fit_steps(FACTS, timeline(swell), seconds=200.0, from_log=True)

    assert result.drift.fast < 0.9 and result.drift.slow > 1.15
    assert max(error.median for error in result.as_measured.errors.values()) > 0.05
    assert max(error.median for error in result.fit.errors.values()) < 0.03
    assert off_from_the_truth(result.fit) < 0.5 * off_from_the_truth(result.as_measured)
    told = profile_of(result, command="").entry(1).measurement
    raw, steady = (told[name]["decode"]["median"] for name in ("held_out_errors_as_measured", "held_out_errors"))
    assert steady < 0.5 * raw and told["drift"]["slow"] > told["drift"]["fast"]
    [line] = [line for line in report(result) if "pace moved" in line]
    assert f"decode {raw:.1%}" in line


def test_a_machine_that_keeps_its_pace_is_left_alone() -> None:
    result = fit_steps(FACTS, timeline(lambda at_s: 1.0), seconds=200.0, from_log=True)

    assert 0.99 < result.drift.fast <= 1.0 <= result.drift.slow < 1.01
    for region, error in result.as_measured.errors.items():
        assert result.fit.errors[region].median == pytest.approx(error.median, abs=0.003)


def test_what_the_model_cannot_say_stays_its_error() -> None:
    """Batches of an odd number take longer: no pace explains that, though all steps of such a time are slow."""

    def odd(requests: list[tuple[int, int]]) -> float:
        return TRUTH.step_s(work_of(requests)) * (1.3 if len(requests) % 2 else 1.0)

    still, moved = (
        fit_steps(FACTS, timeline(pace, truth=odd), seconds=200.0, from_log=True) for pace in (lambda at_s: 1.0, swell)
    )

    assert still.fit.errors["decode"].p90 > 0.15
    assert moved.fit.errors["decode"].p90 > 0.8 * still.fit.errors["decode"].p90


def test_noise_is_not_taken_for_a_pace() -> None:
    result = fit_steps(FACTS, timeline(lambda at_s: 1.0, noise=0.1), seconds=200.0, from_log=True)

    assert result.drift.slow / result.drift.fast < 1.03


def test_what_was_measured_only_once_says_nothing_of_the_pace() -> None:
    steps = {name: runs[:1] for name, runs in timeline(swell).items() if name.startswith("streams")}

    assert at_mean_pace(steps) == (steps, Drift())


def test_the_document_is_a_profile_that_says_how_it_was_made() -> None:
    result = fit_steps(FACTS, synthetic(), seconds=200.0, from_log=True)
    document = json.loads(json.dumps(profile_document(profile_of(result, command="vllm-disagg profile m"))))
    profile = parse_profile(document, origin="new")

    assert profile.kind == "measured" and profile.device == "a core" and profile.model == SHAPE
    assert profile.kv_capacity_tokens(1, 1) == 20_000
    assert judge_profile(profile)[0] == "good"
    told = profile.entry(1).measurement
    assert told["method"] == "steps" and told["command"] == "vllm-disagg profile m"
    assert told["engine"]["max_seqs"] == 64 and told["l_m_tokens"] == result.l_m_tokens
    assert told["ranges"]["prefill_tokens"][1] >= 2048
    assert set(told["held_out_errors"]) == {"prefill", "decode", "mixed", "prefill_mixed_lengths"}
    assert len(told["points"]) == len(result.points) and len(told["points"][0]) == len(told["points_columns"])
    for work in ([(0, 512)], [(300, 1)] * 40, [(0, 100), (300, 1)]):
        assert profile.entry(1).latency.step_s(work_of(work)) == pytest.approx(result.fit.latency.step_s(work_of(work)))
    assert any(line.startswith("prefill, mixed lengths") for line in report(result))


def test_what_is_emulated_is_never_called_measured() -> None:
    facts = msgspec.structs.replace(FACTS, emulated="emulated tiny dilation=1")
    profile = profile_of(fit_steps(facts, synthetic(), seconds=1.0, from_log=True), command="")

    assert profile.kind == "guess" and "emulated tiny" in profile.source


def test_a_file_gains_another_degree_and_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    result = fit_steps(FACTS, synthetic(), seconds=200.0, from_log=False)
    assert entries_beside(FACTS, path) == {}
    write_profile(profile_of(result, command=""), path)
    two = msgspec.structs.replace(FACTS, tp=2)

    beside = entries_beside(two, path)
    write_profile(profile_of(replace(result, facts=two), command="", beside=beside), path)

    assert sorted(parse_profile(json.loads(path.read_text()), origin="").entries) == [1, 2]
    for other, said in (
        (msgspec.structs.replace(FACTS, device="another"), "with device 'a core'"),
        (msgspec.structs.replace(FACTS, model=replace(SHAPE, num_layers=3)), "of another shape"),
        (msgspec.structs.replace(FACTS, emulated="x"), "with kind 'measured'"),
    ):
        with pytest.raises(ConfigError, match=said):
            entries_beside(other, path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="exists and is not a profile"):
        entries_beside(FACTS, path)


def test_too_little_time_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match=r"too few to fit .*--budget-min"):
        fit_steps(FACTS, {"a": [[run((0, 5))]]}, seconds=1.0, from_log=True)


def test_the_hosts_time_is_what_lies_between_steps_without_a_pause() -> None:
    steps = synthetic()
    steps["pauses"] = [[run((0, 9), at_s=0.0), run((9, 1), at_s=0.103), run((10, 1), at_s=0.205)]]

    assert fit_steps(FACTS, {"pauses": steps["pauses"], **_apart(steps)}, seconds=1, from_log=True).between_steps_s == (
        pytest.approx(0.0025, abs=1e-6)
    )
    assert fit_steps(FACTS, steps, seconds=1.0, from_log=False).between_steps_s is None


def _apart(steps: dict[str, list[list[RecordedStep]]]) -> dict[str, list[list[RecordedStep]]]:
    """Each step in a run of its own, so that none follows another."""
    return {name: [[step] for run_ in runs for step in run_] for name, runs in steps.items() if name != "pauses"}


def test_every_region_of_the_synthetic_steps_is_there() -> None:
    regions = {region_of(item.point.work) for item in measured(synthetic())}

    assert regions == {"prefill", "decode", "mixed"}


# The way of KV.


def test_the_rate_is_that_of_the_slowest_workers_pages() -> None:
    def source(rate: float, per_copy_s: float) -> SourceReport:
        sizes = (4096, 65536, 1 << 20)
        reads = tuple(
            ReadTiming(copy_bytes=size, num_copies=8, seconds=8 * (size / rate + per_copy_s)) for size in sizes
        )
        return SourceReport(peer="p", wire="cma", carrier="nixl", reads=reads, intact=True)

    report_ = PairReport(
        stage="done",
        round_trips_s=(0.001, 0.002, 0.009),
        workers=(WorkerReport(sources=(source(4e9, 1e-6), source(1e9, 20e-6))),),
    )

    found = transfer_of(report_, page_bytes=16384)

    assert found is not None and found["wire"] == "cma" and found["latency_s"] == 0.002
    assert found["bytes_per_s"] == pytest.approx(16384 / (16384 / 1e9 + 20e-6), rel=0.05)
    assert transfer_of(None, page_bytes=1) is None and transfer_of(PairReport(stage="greeting"), page_bytes=1) is None
