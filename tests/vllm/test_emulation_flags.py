"""`--emulate` as `vllm serve` parses it: what it sets, and what it refuses in one line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_disagg import plugin
from vllm_disagg.core.profile import profile_document
from vllm_disagg.emulation.executor import EmulatedExecutor
from vllm_disagg.emulation.settings import CONFIG_KEY, EmulationSettings
from vllm_disagg.profiles import load_profile

pytestmark = pytest.mark.vllm


def parse(*argv: str) -> argparse.Namespace:
    plugin.register()
    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(list(argv))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def profile_file(folder: Path, **changes: Any) -> str:
    document = profile_document(load_profile("tiny"))
    document["model"].update(changes)
    path = folder / "profile.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_without_it_nothing_is_changed() -> None:
    args = parse("m")

    assert args.distributed_executor_backend is None
    assert not args.additional_config


def test_a_profile_is_enough() -> None:
    args = parse("--emulate", "llama-3-8b-a100-80g", "--dilation", "3")

    settings = EmulationSettings.from_config(args.additional_config)
    assert settings == EmulationSettings(emulate="llama-3-8b-a100-80g", emulate_model="llama-3-8b", dilation=3.0)
    assert issubclass(args.distributed_executor_backend, EmulatedExecutor)
    assert args.served_model_name == ["llama-3-8b"]
    assert (args.block_size, args.max_num_batched_tokens, args.max_num_seqs) == (16, 2048, 256)  # vLLM's on an A100
    config = json.loads((Path(args.model_tag) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (32, 8)


def test_a_users_own_settings_stay() -> None:
    args = parse("--emulate", "tiny", "--block-size", "64", "--max-num-seqs", "7", "--additional-config", '{"mine": 1}')

    assert (args.block_size, args.max_num_seqs) == (64, 7)
    assert args.additional_config["mine"] == 1 and CONFIG_KEY in args.additional_config


def test_a_users_own_model_and_profile(tmp_path: Path) -> None:
    folder = parse("--emulate", "tiny").model_tag

    args = parse(folder, "--emulate", profile_file(tmp_path))

    assert args.model_tag == folder
    assert EmulationSettings.from_config(args.additional_config).emulate == str(tmp_path / "profile.json")


def test_a_profile_of_another_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = parse("--emulate", "tiny").model_tag

    message = refusal(capsys, folder, "--emulate", profile_file(tmp_path, num_layers=5))

    assert "with num_layers 5" in message and "has 4" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--emulate", "no-such-profile"), "no profile 'no-such-profile'"),
        (("org/model", "--emulate", "tiny"), "the profile is of tiny, not org/model"),
        (("org/model", "--dilation", "2"), "--dilation needs --emulate"),
        (("--emulate", "tiny", "--dilation", "-1"), "--dilation must be 0 or more, not -1.0"),
        (("--emulate", "tiny", "--tensor-parallel-size", "3"), "no tensor-parallel degree 3, only 1, 2, 4"),
        (("--emulate", "tiny", "--pipeline-parallel-size", "3"), "cannot be cut into 3 pipeline stages"),
        (("--emulate", "tiny", "--distributed-executor-backend", "mp"), "--distributed-executor-backend"),
        (("--emulate", "tiny", "--data-parallel-size", "2"), "--data-parallel-size above 1"),
        (("--emulate", "tiny", "--enable-lora"), "leave --enable-lora out"),
        (("--emulate", "opt-66b-a100-80g"), "no tensor-parallel degree 1, only 2, 3, 4, 8"),
    ],
)
def test_contradictions_are_refused_by_name(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *argv)
