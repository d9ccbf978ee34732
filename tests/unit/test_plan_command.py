"""`vllm-disagg plan` and `vllm-disagg simulate`: what they print and write, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vllm_disagg import cli
from vllm_disagg.errors import ConfigError, NoFeasiblePlacement

QUICK = ("--profile", "tiny", "--workload", "fixed:64/8", "--devices-per-node", "2", "--seeds", "2", "--processes", "1")


def output(*arguments: str) -> str:
    done = CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_plan_prints_a_ranking_and_one_sentence_and_writes_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    lines = output("plan", *QUICK, "--slo-ttft-s", "0.01", "--slo-tpot-s", "0.01", "--explain", "--out", str(file))

    document = json.loads(file.read_text())
    assert document["verdict"] in lines
    assert lines.startswith("placement")
    assert "eq. 1" in lines and "eq. 3" in lines
    assert document["placement"]["num_devices"] <= 2


def test_simulate_prints_a_line_per_rate_and_where_the_time_goes(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    options = ("--profile", "tiny", "--workload", "fixed:64/8", "--requests", "200", "--rates", "10,20")
    lines = output("simulate", *options, "--prefill", "1", "--out", str(file)).splitlines()

    assert "kv transfer" in lines[1]
    assert [line.split()[0] for line in lines[2:4]] == ["10", "20"]
    assert lines[-1].endswith("(2 devices)")
    assert [run["rate"] for run in json.loads(file.read_text())["runs"]] == [10.0, 20.0]


def test_simulate_replays_a_trace(tmp_path: Path) -> None:
    rows = [{"timestamp": 100 * index, "input_length": 20, "output_length": 4} for index in range(30)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))

    lines = output("simulate", "--profile", "tiny", "--workload", str(trace), "--rates", "5")

    assert "Mooncake trace trace.jsonl" in lines
    assert "30 requests are too few" in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "--workload", "nothing"), "neither a file nor one of"),
        (("plan", "--workload", "fixed:5"), "fixed:PROMPT/OUTPUT"),
        (("plan", *QUICK, "--intra-link", "string"), "the link must be one of"),
        (("plan", *QUICK, "--first-token", "proxy"), "--first-token must be one of"),
        (("plan", *QUICK, "--goal", "1.5"), "goal must lie between 0 and 1"),
        (("plan", *QUICK, "--slo-ttft-s", "-1"), "positive number of seconds"),
        (("plan", *QUICK, "--seeds", "0"), "--seeds must be at least 1"),
        (("plan", *QUICK, "--processes", "0"), "--processes must be at least 1"),
        (("plan", *QUICK, "--rate", "nan"), "the rate must be a positive number"),
        (("plan", "--profile", "h900"), "no profile 'h900'"),
        (("plan", *QUICK, "--model", "gpt-9"), "not 'gpt-9'"),
        (("plan", "--profile", "tiny", "--workload", "fixed:9000/1"), "no request fits 4096 tokens"),
        (("simulate", "--rates", "fast"), "--rates must be positive numbers"),
        (("simulate", "--rates", "1,-2"), "--rates must be positive numbers"),
        (("simulate", "--decode", "0"), "--decode at least 1"),
        (("simulate", "--policy", "lifo"), "--policy must be one of"),
        (("simulate", "--requests", "0"), "--requests must be at least 1"),
        (("simulate", "--tp", "3"), "no tensor-parallel degree 3"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        output("simulate", "--profile", "tiny", "--workload", "fixed:8/2", "--requests", "50", "--rates", "1",
               "--out", str(tmp_path / "no" / "such.json"))  # fmt: skip


def test_targets_that_cannot_be_met_name_the_nearest() -> None:
    with pytest.raises(NoFeasiblePlacement, match="the nearest that can be met"):
        CliRunner().invoke(cli.cli, ("plan", *QUICK, "--slo-ttft-s", "1e-4"), catch_exceptions=False)
