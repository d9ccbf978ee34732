"""Workloads: what is drawn has the stated moments, what is read is what the file says, and bad files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.arrivals import Arrivals, fit_arrivals
from vllm_disagg.sim.lengths import (
    SURROGATES,
    EmpiricalLengths,
    FixedLengths,
    fit_lengths,
    fit_workload,
    lengths_of,
    make_workload,
)
from vllm_disagg.sim.traces import read_burstgpt, read_mooncake, read_sharegpt, read_trace, whole_records
from vllm_disagg.sim.workload import Workload, shared_prefixes


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def workload(**changes: Any) -> Workload:
    values: dict[str, Any] = {
        "arrival_s": np.array([0.0, 1.0, 2.0]),
        "prompt_tokens": np.array([10, 20, 30]),
        "output_tokens": np.array([1, 2, 3]),
        "rate": 1.0,
        "source": "mine",
    }
    return Workload(**values | changes)


# Arrivals.


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 2.0])
def test_gaps_have_the_stated_variability(cv: float) -> None:
    gaps = np.diff(Arrivals(cv=cv).times(50_000, 4.0, rng()))

    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.04)


def test_bursts_keep_the_mean_rate_and_bring_their_share() -> None:
    times = Arrivals(cv=0.0, burst=5.0, burst_share=0.1, burst_every=100).times(10_000, 2.0, rng())

    assert times[-1] == pytest.approx(5000.0, rel=0.01)
    assert np.mean(times % 50.0 < 5.0) == pytest.approx(0.5, abs=0.01)


def test_the_same_seed_gives_the_same_pattern_at_every_rate() -> None:
    slow, fast = (Arrivals(cv=1.5, burst=2.0).times(1000, rate, rng(7)) for rate in (1.0, 8.0))

    assert np.allclose(slow / 8.0, fast, rtol=1e-12)


@pytest.mark.parametrize(
    "bad", [{"cv": -1.0}, {"cv": float("nan")}, {"burst": 0.5}, {"burst": 11.0}, {"burst_share": 0}]
)
def test_arrivals_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Arrivals(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_variability_can_be_fitted(cv: float) -> None:
    assert fit_arrivals(Arrivals(cv=cv).times(50_000, 3.0, rng())).cv == pytest.approx(cv, rel=0.05)


def test_nothing_can_be_fitted_to_requests_that_come_at_once() -> None:
    with pytest.raises(ConfigError, match="at once"):
        fit_arrivals(np.zeros(5))


# Lengths.


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [("sharegpt-like", 755.5, 200.3), ("humaneval-like", 171.3, 98.2), ("longbench-like", 1738.3, 90.7)],
)
def test_surrogates_have_the_published_means_and_say_what_they_are(name: str, prompt: float, output: float) -> None:
    prompts, outputs = SURROGATES[name].sample(50_000, rng())

    assert prompts.mean() == pytest.approx(prompt, rel=0.02)
    assert outputs.mean() == pytest.approx(output, rel=0.02)
    assert (prompts + outputs).max() < 2048
    assert min(prompts.min(), outputs.min()) >= 1
    assert "surrogate" in SURROGATES[name].source


def test_a_fit_keeps_marginals_and_correlation() -> None:
    log = rng().multivariate_normal([6.0, 4.0], [[0.8, 0.5], [0.5, 0.9]], 20_000)
    prompt, output = np.maximum(np.exp(log), 1).astype(np.int64).T

    drawn_prompt, drawn_output = fit_lengths(prompt, output, source="lognormal").sample(20_000, rng(1))

    for drawn, seen in ((drawn_prompt, prompt), (drawn_output, output)):
        assert np.percentile(drawn, [10, 50, 90, 99]) == pytest.approx(np.percentile(seen, [10, 50, 90, 99]), rel=0.1)
    seen_correlation = np.corrcoef(np.log(prompt), np.log(output))[0, 1]
    assert np.corrcoef(np.log(drawn_prompt), np.log(drawn_output))[0, 1] == pytest.approx(seen_correlation, abs=0.04)


def test_a_fit_to_equal_lengths_gives_these() -> None:
    prompt, output = fit_lengths(np.full(9, 100), np.full(9, 7), source="fixed").sample(50, rng())

    assert set(prompt) == {100} and set(output) == {7}


def test_resampling_draws_whole_pairs() -> None:
    lengths = EmpiricalLengths(prompt_tokens=np.array([1, 2, 3]), output_tokens=np.array([10, 20, 30]), source="x")
    prompt, output = lengths.sample(1000, rng())

    assert np.array_equal(prompt * 10, output)
    assert set(prompt) == {1, 2, 3}


# Workloads.


def test_one_seed_gives_one_workload() -> None:
    first, again, other = (
        make_workload(SURROGATES["sharegpt-like"], num_requests=100, rate=2.0, seed=seed) for seed in (5, 5, 6)
    )

    assert np.array_equal(first.arrival_s, again.arrival_s) and np.array_equal(first.prompt_tokens, again.prompt_tokens)
    assert not np.array_equal(first.prompt_tokens, other.prompt_tokens)


def test_lengths_and_arrivals_have_streams_of_their_own() -> None:
    poisson, bursty = (
        make_workload(SURROGATES["sharegpt-like"], num_requests=100, arrivals=Arrivals(cv=cv)) for cv in (1.0, 3.0)
    )

    assert np.array_equal(poisson.output_tokens, bursty.output_tokens)


def test_a_rate_only_rescales_time() -> None:
    base = make_workload(FixedLengths(prompt_tokens=5, output_tokens=2), num_requests=50, rate=2.0)

    assert np.allclose(base.at_rate(8.0).arrival_s, base.arrival_s / 4)
    assert base.at_rate(8.0).rate == 8.0


def test_a_paced_workload_has_exactly_the_rate() -> None:
    paced = make_workload(FixedLengths(prompt_tokens=5, output_tokens=2), num_requests=50).paced(8.0)

    assert paced.arrival_s[-1] == pytest.approx(50 / 8.0)
    assert workload(arrival_s=np.zeros(3)).paced(2.0).rate == 2.0


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_makes_no_sense(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate must be a positive number"):
        workload().at_rate(rate)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arrival_s": np.array([])}, "no requests"),
        ({"arrival_s": np.array([0.0, 2.0, 1.0])}, "never fall"),
        ({"arrival_s": np.array([0.0, 1.0, np.nan])}, "finite"),
        ({"arrival_s": np.array([-1.0, 1.0, 2.0])}, "from 0 on"),
        ({"prompt_tokens": np.array([1, 2])}, "lengths of 2"),
        ({"prompt_tokens": np.array([1, 0, 2])}, "at least 1 token"),
        ({"output_tokens": np.array([0, 1, 2])}, "at least 1 token"),
        ({"rate": 0.0}, "positive number"),
    ],
)
def test_workloads_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        workload(**changes)


def test_requests_beyond_the_context_length_are_left_out() -> None:
    assert workload().capped(22).prompt_tokens.tolist() == [10, 20]
    with pytest.raises(ConfigError, match="no request fits 5"):
        workload().capped(5)


def test_shared_prefixes_of_a_synthetic_workload() -> None:
    made = make_workload(
        FixedLengths(prompt_tokens=100, output_tokens=1), num_requests=300, shared_prefix_tokens=50, num_prefixes=3
    )

    assert set(made.prompt_tokens) == {150}
    assert made.prefixes is not None and made.prefixes.num_chunks == 3
    assert made.head(10).prefixes is not None


def test_only_what_is_shared_is_kept() -> None:
    prefixes = shared_prefixes([[7, 8, 9], [7, 8, 5], [4], [7]], 16)

    assert prefixes is not None
    assert [prefixes.of(index).tolist() for index in range(4)] == [[0, 1], [0, 1], [], [0]]
    assert shared_prefixes([[1], [2], []], 16) is None


# Files.


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_mooncake(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 2000, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 9]},
        {"timestamp": 1000, "input_length": 1024, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 3000, "input_length": 10, "output_length": 1, "hash_ids": [8]},
    ]
    made = read_trace(write(tmp_path, "m.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"))

    assert made.arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert made.prompt_tokens.tolist() == [1024, 1100, 10]
    assert made.rate == 1.0
    assert made.prefixes is not None
    assert [made.prefixes.of(index).tolist() for index in range(3)] == [[0, 1], [0, 1], []]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"timestamp": 1, "input_length": 5}', "output_length must be a whole number"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "input_length must be"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1}', "timestamp must be a number"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "timestamp must be a number from 0 on, not -1"),
        (f'{{"timestamp": 1, "input_length": {10**30}, "output_length": 1}}', "input_length must be a whole number"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}', "hash_ids"),
        (f'{{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [{2**70}]}}', "hash_ids"),
        ('{"timestamp": 1', "not JSON"),
        ("[]", "expected an object"),
    ],
)
def test_a_bad_line_of_mooncake_is_named(tmp_path: Path, line: str, said: str) -> None:
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'

    with pytest.raises(ConfigError, match=rf"m.jsonl:2.*{said}"):
        read_mooncake(write(tmp_path, "m.jsonl", good + line))


def test_azure_with_seven_decimals(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.4799600,3180,8\n2023-11-16 18:17:05.0,5,0\n"
    )
    made = read_trace(write(tmp_path, "a.csv", text))

    assert made.arrival_s == pytest.approx([0.0, 0.5])
    assert made.prompt_tokens.tolist() == [4808, 3180]


@pytest.mark.parametrize("extra", ["", "Session ID,Elapsed time,"])
def test_burstgpt_in_both_forms(tmp_path: Path, extra: str) -> None:
    filler = "s1,0.5," if extra else ""
    text = (
        f"Timestamp,{extra}Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        f"5,{filler}ChatGPT,472,18,490,Conversation log\n"
        f"7,{filler}ChatGPT,472,0,472,Conversation log\n"
        f"45,{filler}GPT-4,1087,230,1317,Conversation log\n"
    )
    file = write(tmp_path, "b.csv", text)

    assert read_trace(file).output_tokens.tolist() == [18, 230]
    assert read_burstgpt(file, model="GPT-4").prompt_tokens.tolist() == [1087]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,1\n", "a.csv:2.*not a date"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,many,1\n", "a.csv:2.*must be a number"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03\n", "too few columns"),
        (f"TIMESTAMP,ContextTokens,GeneratedTokens\n{'7' * 200_000},1,1\n", "a.csv:.*not a line of a table"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,1e12\n",
            "a whole number from 0 to 1000000000",
        ),
        ("TIMESTAMP,ContextTokens\n", "no column 'GeneratedTokens'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("a,b,c\n1,2,3\n", "not a trace of a known kind"),
        ("", "not a trace of a known kind"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_trace(write(tmp_path, "a.csv", text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"Is a directory; expected a trace \(mooncake"):
        read_trace(tmp_path)


CONVERSATIONS = [
    {"id": str(index), "conversations": [{"from": "human", "value": f"{'word ' * (index + 4)}"}] * 4}
    for index in range(40)
]


@pytest.mark.parametrize("missing", [0, 1, 20])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_sharegpt_is_read_up_to_where_it_is_cut_off(tmp_path: Path, missing: int, chunk: int) -> None:
    text = json.dumps(CONVERSATIONS)
    file = write(tmp_path, "s.json", text[: len(text) - missing])

    records = list(whole_records(file, chunk_chars=chunk))

    assert records == CONVERSATIONS[: 40 - (missing > 1)]


def test_sharegpt_is_prepared_as_distserve_does(tmp_path: Path) -> None:
    short = {"id": "s", "conversations": [{"from": "human", "value": "a b c d e"}] * 2}
    file = write(tmp_path, "s.json", json.dumps([short, *CONVERSATIONS]))

    made = read_sharegpt(file, count_tokens=lambda text: len(text.split()), max_total=100)

    turns = made.prompt_tokens / made.output_tokens
    assert np.array_equal(turns, np.rint(turns)) and set(turns) == {1.0, 2.0, 3.0}
    assert (made.prompt_tokens + made.output_tokens).max() <= 100
    assert "estimated" not in made.source
    assert "estimated" in read_trace(file).source


def test_sharegpt_without_a_usable_conversation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable conversation"):
        read_trace(write(tmp_path, "s.json", "[{}]"))


def test_a_trace_can_be_fitted_and_resampled(tmp_path: Path) -> None:
    rows = [
        json.dumps({"timestamp": 1000 * index, "input_length": 100 + index, "output_length": 10}) for index in range(50)
    ]
    trace = read_trace(write(tmp_path, "m.jsonl", "\n".join(rows)))
    lengths, arrivals = fit_workload(trace)

    assert arrivals.cv == 0.0
    assert lengths.sample(100, rng())[0].min() >= 100
    assert set(lengths_of(trace).sample(500, rng())[0]) <= set(trace.prompt_tokens)


@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=8))
def test_shared_prefixes_find_the_same_common_beginnings(chunks: list[list[int]]) -> None:
    # A chunk's number stands for all tokens up to its end, as in a chain of hashes.
    chains = [[hash(tuple(part[: k + 1])) % 2**31 for k in range(len(part))] for part in chunks]
    prefixes = shared_prefixes(chains, 16)

    def common(a: list[int], b: list[int]) -> int:
        return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    for first in range(len(chunks)):
        for second in range(first):
            expected = common(chains[first], chains[second])
            found = 0 if prefixes is None else common(prefixes.of(first).tolist(), prefixes.of(second).tolist())
            assert found == expected
