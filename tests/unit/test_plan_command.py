"""`vllm-disagg plan` and `vllm-disagg simulate`: what they print and write, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vllm_disagg import cli
from vllm_disagg.core.link import LINKS, Link
from vllm_disagg.core.profile import profile_document
from vllm_disagg.errors import ConfigError, NoFeasiblePlacement
from vllm_disagg.plan_command import question_of, system_of
from vllm_disagg.plan_settings import PlanSettings, SimulateSettings
from vllm_disagg.planner.candidates import Shape
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.system import System

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
    assert document["scheduling"] == "phase"


def test_plan_draws_what_other_targets_and_rates_would_change(tmp_path: Path) -> None:
    file = tmp_path / "around.svg"
    lines = output("plan", *QUICK, "--slo-ttft-s", "0.01", "--slo-tpot-s", "0.01", "--plot", str(file))

    assert "both targets times" in lines
    assert file.read_text().count("<path") > 20
    with pytest.raises(ConfigError, match=r"--plot .*around\.word"):
        output("plan", *QUICK, "--slo-ttft-s", "0.01", "--slo-tpot-s", "0.01", "--plot", str(tmp_path / "around.word"))


def test_simulate_prints_a_line_per_rate_and_where_the_time_goes(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    options = ("--profile", "tiny", "--workload", "fixed:64/8", "--requests", "200", "--rates", "10,20")
    lines = output("simulate", *options, "--prefill", "1", "--out", str(file)).splitlines()

    assert "kv transfer" in lines[1]
    assert [line.split()[0] for line in lines[2:4]] == ["10", "20"]
    assert lines[-1].endswith("(2 devices)")
    assert [run["rate"] for run in json.loads(file.read_text())["runs"]] == [10.0, 20.0]


def test_how_instances_schedule_makes_a_difference(tmp_path: Path) -> None:
    """Prompts of one length that fit L_m only one at a time: packing is plain to see in the time they take to run."""

    def prefill_run_s(scheduling: str) -> float:
        file = tmp_path / f"{scheduling}.json"
        options = ("--profile", "tiny", "--workload", "fixed:64/8", "--requests", "400", "--rates", "600")
        output(
            "simulate", *options, "--prefill", "1", "--kv-scheduling", scheduling, "--kv-batch-tokens", "64",
            "--out", str(file),
        )  # fmt: skip
        return float(json.loads(file.read_text())["runs"][0]["phases_s"]["prefill_run"])

    assert prefill_run_s("phase") == prefill_run_s("distserve") < prefill_run_s("vllm")


def measured_profile(folder: Path, **measurement: Any) -> str:
    """The tiny profile, with this measured beside its step times."""
    return profile_file(folder, measurement=measurement)


PAIR = {"wire": "cma", "carrier": "nixl", "bytes_per_s": 2.5e9, "latency_s": 0.001, "page_bytes": 4096}


def simulated(**settings: Any) -> System:
    return system_of(SimulateSettings(workload="fixed:64/8", prefill=1, **settings))


def test_what_was_measured_is_what_is_simulated(tmp_path: Path) -> None:
    profile = measured_profile(tmp_path, between_steps_s=0.002, transfer=PAIR)

    system = simulated(profile=profile)
    assert {engine.step_overhead_s for engine in system.engines} == {0.002}
    assert system.link == Link(bytes_per_s=2.5e9, latency_s=0.001) == simulated(profile=profile, link="profile").link

    told = simulated(profile=profile, link="25g", step_overhead_ms=0.0)
    assert {engine.step_overhead_s for engine in told.engines} == {0.0}
    assert told.link == LINKS["25g"]


def test_as_many_links_as_ranks_that_read_side_by_side(tmp_path: Path) -> None:
    profile = measured_profile(tmp_path, transfer=PAIR)

    assert simulated(profile=profile, prefill_pp=2, pp=4).link.bytes_per_s == 2 * 2.5e9


def test_a_profile_that_measured_neither_gives_what_is_usual(tmp_path: Path) -> None:
    profile = measured_profile(tmp_path, between_steps_s=None, transfer=None)

    for system in (simulated(profile=profile), simulated(profile="tiny")):
        assert {engine.step_overhead_s for engine in system.engines} == {0.0}
        assert system.link == LINKS["nvlink"]


def test_a_plan_rests_on_what_was_measured_and_says_so(tmp_path: Path) -> None:
    profile = measured_profile(tmp_path, between_steps_s=0.002, transfer=PAIR)
    options = ("plan", "--profile", profile, *QUICK[2:], "--slo-ttft-s", "0.05", "--slo-tpot-s", "0.05")

    resources = question_of(PlanSettings(profile=profile, workload="fixed:64/8", seeds=1)).resources
    assert resources.cluster.intra == Link(bytes_per_s=2.5e9, latency_s=0.001)
    assert resources.decode_engine(Shape(1, 1)).step_overhead_s == 0.002
    said = output(*options)
    assert "host's time per step as measured: 2.00 ms" in said and "link as measured: 2.50 GB/s" in said
    assert "as measured" not in output(*options, "--step-overhead-ms", "0", "--intra-link", "nvlink")


@pytest.mark.parametrize(
    ("measurement", "said"),
    [
        ({"between_steps_s": -0.1}, r"between_steps_s: expected 0 or more, not -0\.1"),
        ({"between_steps_s": "quick"}, "between_steps_s: expected a finite number, not 'quick'"),
        ({"transfer": {"wire": "cma"}}, "transfer.bytes_per_s: missing"),
        ({"transfer": {**PAIR, "bytes_per_s": 0.0}}, "transfer.bytes_per_s: nothing can travel at 0"),
        ({"transfer": {**PAIR, "latency_s": float("nan")}}, "transfer.latency_s: expected a finite number"),
        ({"transfer": 3}, "transfer: expected an object, not 3"),
    ],
)
def test_a_measurement_that_cannot_be(measurement: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        output("simulate", "--profile", measured_profile(tmp_path, **measurement))


def test_simulate_draws_what_it_prints(tmp_path: Path) -> None:
    file, trace = tmp_path / "rates.svg", tmp_path / "trace.json"
    options = ("--profile", "tiny", "--workload", "fixed:64/8", "--requests", "200", "--rates", "20,10")
    output("simulate", *options, "--plot", str(file), "--timeline", str(trace), "--timeline-window", "0,5")

    assert file.read_text().count("<path") > 10
    assert any(event["name"].endswith("decoding") for event in json.loads(trace.read_text())["traceEvents"])
    with pytest.raises(ConfigError, match=r"--plot .*rates\.word"):
        output("simulate", *options, "--plot", str(tmp_path / "rates.word"))


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
        (("plan", *QUICK, "--intra-link", "string"), "--intra-link: the link must be one of"),
        (("plan", *QUICK, "--intra-link", "profile"), "--intra-link profile: this profile has measured none"),
        (("plan", *QUICK, "--inter-link", "profile"), "--inter-link: the link must be one of"),
        (("simulate", "--link", "profile"), "--link profile: this profile has measured none"),
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
        (("simulate", "--policy", "decode"), "--policy must be one of chunked, whole, prefill_first, not 'decode'"),
        (("simulate", "--kv-scheduling", "best"), "--kv-scheduling must be one of phase, vllm, distserve"),
        (("simulate", "--kv-prefill-order", "lifo"), "prefill order must be one of fcfs, sjf, edf"),
        (("plan", *QUICK, "--kv-held-share", "2"), "held share must be above 0"),
        (("simulate", "--requests", "0"), "--requests must be at least 1"),
        (("simulate", "--seed", "-1"), "--seed must be 0 or more, not -1"),
        (("simulate", "--tp", "3"), "no tensor-parallel degree 3"),
        (("simulate", "--pp", "0"), "--pp must be at least 1, not 0"),
        (("simulate", "--timeline-window", "90,60"), "FROM,TO in seconds.* not '90,60'"),
        (("simulate", "--out", "no/such.json"), "--out no/such.json cannot be written: No such file or directory"),
        (("simulate", "--profile", "tiny", "--workload", "fixed:9000/1"), "no request fits 4096 tokens"),
        (("plan", *QUICK, "--out", "."), "--out . is a folder"),
        (("plan", *QUICK, "--prefill-price", "0"), "price of a device must be a positive number, not 0.0"),
        (("plan", *QUICK, "--nodes", "0"), "at least one node with one device, not 0 x 2"),
        (("plan", "--workload", "."), "Is a directory; expected a trace"),
        (("plan", "--workload", f"fixed:{10**20}/1"), "fixed:PROMPT/OUTPUT"),
        (("plan", "--profile", "."), "give a JSON file or one of"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(cli.cli, arguments, catch_exceptions=False)


def profile_file(folder: Path, **more: dict[str, Any]) -> str:
    """The tiny profile, whose entries also say this."""
    document = profile_document(load_profile("tiny"))
    for entry in document["entries"]:
        entry.update(more)
    file = folder / "profile.json"
    file.write_text(json.dumps(document))
    return str(file)


def test_requests_that_no_engine_takes_are_counted(tmp_path: Path) -> None:
    rows = [{"timestamp": 100 * at, "input_length": 20 if at else 9000, "output_length": 4} for at in range(40)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))

    lines = output("simulate", "--profile", "tiny", "--workload", str(trace), "--rates", "5")

    assert lines.endswith(
        "warning: 1 of 40 requests (2.50% of them) is longer than the model's 4096 tokens and left out\n"
    )


def test_requests_that_do_not_fit_the_memory_are_counted(tmp_path: Path) -> None:
    small = edited(tmp_path, ("entries", 0, "kv_capacity_tokens"), {"1": 64})
    file = tmp_path / "runs.json"
    options = ("--profile", small, "--workload", "fixed:64/8", "--requests", "20", "--rates", "5", "--out", str(file))

    lines = output("simulate", *options)

    assert "warning: at 5/s 20 of 20 requests (100.00% of them) are refused" in lines
    assert "never" in lines
    assert json.loads(file.read_text())["runs"][0]["ttft_p50_s"] is None


def test_a_doubtful_fit_is_said_to_be_one(tmp_path: Path) -> None:
    residuals = {"decode_median_relative_error": 0.08, "prefill_median_relative_error": 0.02}
    doubtful = profile_file(tmp_path, residuals=residuals)

    last = output("plan", "--profile", doubtful, *QUICK[2:]).splitlines()[-1]

    assert last.startswith("warning: the fitted decode steps") and "off by 8.0%" in last


def test_a_bad_fit_is_refused_unless_accepted(tmp_path: Path) -> None:
    bad = profile_file(tmp_path, residuals={"decode_median_relative_error": 0.2})

    with pytest.raises(ConfigError, match=r"off by 20.0% .* or plan all the same with --accept-fit"):
        output("plan", "--profile", bad, *QUICK[2:])
    assert "off by 20.0%" in output("plan", "--profile", bad, "--accept-fit", *QUICK[2:])


def edited(folder: Path, path: tuple[str | int, ...], value: Any) -> str:
    """The tiny profile with one field changed."""
    document = profile_document(load_profile("tiny"))
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = folder / "profile.json"
    file.write_text(json.dumps(document))
    return str(file)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("entries", 0, "decode", 0, "constant_ms"), float("nan"), "expected a finite number, not nan"),
        (("entries", 0, "prefill", 0, "per_token_ms"), "fast", "expected a finite number, not 'fast'"),
        (("model", "weight_bytes"), 10**13, "10000 GB of weights"),
        (("model", "max_model_len"), 20, "no request fits 20 tokens"),
        (("version",), 2, "expected format"),
    ],
)
def test_a_profile_that_cannot_be(path: tuple[str | int, ...], value: Any, said: str, tmp_path: Path) -> None:
    file = edited(tmp_path, path, value)
    if path == ("model", "weight_bytes"):
        document = json.loads(Path(file).read_text())
        for entry in document["entries"]:
            entry["kv_capacity_tokens"] = {}
        Path(file).write_text(json.dumps(document))

    with pytest.raises((ConfigError, NoFeasiblePlacement), match=said):
        output("plan", "--profile", file, *QUICK[2:])


def test_profiles_of_two_models_do_not_go_together(tmp_path: Path) -> None:
    other = edited(tmp_path, ("model", "name"), "another")

    with pytest.raises(ConfigError, match="give profiles of the same model"):
        output("plan", "--prefill-profile", other, *QUICK)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "or empty"),
        ("[]", "no usable conversation"),
        ('{"timestamp": 0, "input_length": -5, "output_length": 4}', "input_length"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests in it"),
        ("\x00\x01", "not a trace of a known kind"),
    ],
)
def test_a_trace_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)

    with pytest.raises(ConfigError, match=said):
        output("plan", "--profile", "tiny", "--workload", str(trace))


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        output("simulate", "--profile", "tiny", "--workload", "fixed:8/2", "--requests", "50", "--rates", "1",
               "--out", str(tmp_path / "no" / "such.json"))  # fmt: skip


def test_targets_that_cannot_be_met_name_the_nearest() -> None:
    with pytest.raises(NoFeasiblePlacement, match="the nearest that can be met"):
        CliRunner().invoke(cli.cli, ("plan", *QUICK, "--slo-ttft-s", "1e-4"), catch_exceptions=False)
